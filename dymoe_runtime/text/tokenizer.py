"""The tokenizer of a model, loaded from its Hugging Face files."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from dymoe_runtime.errors import DymoeError, TemplateFailed
from dymoe_runtime.text.added_tokens import add_tokens
from dymoe_runtime.text.reasoning import Splitter, make_splitter
from dymoe_runtime.text.sampling import SamplingParams
from dymoe_runtime.text.tokenizer_files import CONFIG, RESTORE, load_backend, read_if_there, read_object, refusing
from dymoe_runtime.text.tool_calls.formats import format_of
from dymoe_runtime.text.tool_calls.messages import uses_tools, variants
from dymoe_runtime.text.tool_calls.parser import Format

# Characters of a text that is encoded while other threads run, which takes a pool of threads.
LONG = 4096


class BundleOf(Protocol):
    """The part of a bundle that says where its tokenizer is."""

    @property
    def path(self) -> Path:
        """Return the directory."""


class SpecOf(Protocol):
    """The part of a model's specification that a tokenizer needs."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Return the ids that end a text."""


class ModelOfBundle(Protocol):
    """A model loaded from a bundle."""

    @property
    def bundle(self) -> BundleOf:
        """Return the bundle."""

    @property
    def spec(self) -> SpecOf:
        """Return the specification."""


class Tokenizer:
    """A Hugging Face tokenizer with its special tokens and chat templates.

    `bos_id` is None if there is no such token. `eos_ids` are the ids that end a text. `vocab_size` is one more than the
    largest id; the model's logits may be wider. `special_ids` maps the text of each special token to its id; decoding
    skips these ids.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str],
        eos_ids: Iterable[int] = (),
        generation: Mapping[str, Any] | None = None,
        template_file: Path | None = None,
    ) -> None:
        """Wrap `backend`; `special_tokens` maps names such as `bos_token` to texts; an empty one is no token.

        `generation` is what generation_config.json holds. Errors name `template_file` as that of the chat templates.
        """
        _mark_special(backend, special_tokens.values())
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._chat_templates = dict(chat_templates)
        self._template_file = template_file
        self._generation = dict(generation or {})
        self.bos_id = self._named_id("bos_token")
        eos_id = self._named_id("eos_token")
        self.eos_ids = frozenset(eos_ids) | ({eos_id} if eos_id is not None else frozenset())
        added = backend.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in added.items() if token.special}
        self.vocab_size = max([backend.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added)])

    @classmethod
    def load(cls, path: str | os.PathLike[str], eos_ids: Iterable[int] = ()) -> Tokenizer:
        """Load tokenizer.json from the directory or packed bundle `path`, with other files there, if any.

        `eos_ids` come from the model's configuration and are joined with those of the files. Raises DymoeError
        naming the file if one is missing or malformed.

        >>> tokenizer = Tokenizer.load("build/demo.dymoe")
        >>> tokenizer.decode(tokenizer.encode("Once upon a time"))
        'Once upon a time'
        """
        directory = Path(path)
        backend = load_backend(directory)
        config = read_object(directory / CONFIG)
        generation = read_object(directory / "generation_config.json")
        special_tokens = add_tokens(backend, directory, config)
        templates, template_file = _chat_templates(config, directory)
        # Then the texts of special tokens in a prompt are text like any other.
        backend.encode_special_tokens = config.get("split_special_tokens") is True
        _check_clean_up(config, backend, directory)
        templates, template_file = _chat_templates(config, directory)
        return cls(
            backend,
            special_tokens,
            templates,
            {*eos_ids, *_generation_eos_ids(generation, directory)},
            generation=generation,
            template_file=template_file,
        )

    @classmethod
    def of(cls, model: ModelOfBundle) -> Tokenizer:
        """Load the tokenizer of a loaded model; raise DymoeError as `load` does."""
        return cls.load(model.bundle.path, model.spec.eos_ids)

    def _named_id(self, name: str) -> int | None:
        text = self._special_tokens.get(name)
        return self._backend.token_to_id(text) if text else None

    @property
    def special_tokens(self) -> dict[str, str]:
        """Return name -> text of the special tokens, as chat templates see them."""
        return dict(self._special_tokens)

    @property
    def sampling(self) -> SamplingParams:
        """Return how to sample, as generation_config.json says; greedy if it does not.

        Raises DymoeError if a value there is not possible.
        """
        try:
            return SamplingParams.from_generation_config(self._generation)
        except DymoeError as error:
            raise DymoeError(f"the model's generation_config.json: {error}; give --greedy") from error

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`.

        With `add_special_tokens` the post-processor of tokenizer.json adds its own; as in transformers, nothing else
        does, `add_bos_token` neither. Raises DymoeError if the text is not valid Unicode, and TypeError if it is no
        text.
        """
        ids: list[int] = self._encoding(text, add_special_tokens).ids
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of `text`, without added ones, and the characters (first, last + 1) of each.

        Raises DymoeError as `encode` does.
        """
        encoding = self._encoding(text, add_special_tokens=False, offsets=True)
        return encoding.ids, encoding.offsets

    def _encoding(self, text: str, add_special_tokens: bool, offsets: bool = False) -> Any:
        if not isinstance(text, str):
            raise TypeError(f"expected a text, got {type(text).__name__}")
        try:
            with refusing("tokenizer.json: cannot encode the text", RESTORE):
                if offsets or len(text) <= LONG:
                    return self._backend.encode(text, add_special_tokens=add_special_tokens)
                (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
                return encoding
        except TypeError as error:  # a lone surrogate, which is how Python passes on undecodable bytes
            raise DymoeError("the text is not valid Unicode; save or pass it as UTF-8") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; ids outside the vocabulary add nothing."""
        with refusing("tokenizer.json: cannot decode tokens", RESTORE):
            text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def decode_each(self, texts: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each list of ids, special tokens left out; faster than `decode` again and again."""
        with refusing("tokenizer.json: cannot decode tokens", RESTORE):
            decoded: list[str] = self._backend.decode_batch([list(ids) for ids in texts], skip_special_tokens=True)
        return decoded

    def token(self, token_id: int) -> str | None:
        """Return the token as the vocabulary spells it, or None if the id is outside the vocabulary."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def id_of(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary spells it, or None if it is not in the vocabulary."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    @property
    def decoder_types(self) -> list[str]:
        """Return the types of the decoders in tokenizer.json, in the order in which they run."""
        decoder = self._backend.decoder
        return [] if decoder is None else list(_flatten_decoders(json.loads(decoder.__getstate__())))

    @property
    def has_chat_template(self) -> bool:
        """Return whether the model has a chat template."""
        return bool(self._chat_templates)

    @property
    def chat_template(self) -> str | None:
        """Return the chat template for messages without tools, or None if the model has none."""
        return self._pick_chat_template(tools=False) if self._chat_templates else None

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """Return `messages` as the prompt that the model was trained on; encode it with add_special_tokens=False.

        `tools` are definitions of functions in OpenAI's form. Messages may have `tool_calls`, whose arguments are
        objects or JSON, and the role "tool". Where the template takes no tools, a system message, or the first one of
        the user, has the definitions. `kwargs` are passed to the template, such as `enable_thinking`.

        Raises DymoeError if there is no template, or if a definition or a call is malformed, and TemplateFailed if the
        template refuses the messages or asks for more time or memory than a template may use.
        """
        from dymoe_runtime.text.chat_template import reason, render  # imports jinja2, which plain prompts do not need

        template = self._pick_chat_template(tools is not None)
        variables = {"documents": None, **self._special_tokens, **kwargs}
        forms: Iterable[tuple[Sequence[Mapping[str, Any]], Any]] = [(messages, tools)]
        if uses_tools(messages, tools):
            forms = variants(messages, tools, template)
        refusal: Exception | None = None
        for said, defined in forms:
            form = {"messages": said, "tools": defined, "add_generation_prompt": add_generation_prompt}
            try:
                return render(template, variables | form)
            except Exception as error:  # a template is a program of the model's author: it can raise anything
                refusal = refusal or error
        where = "" if self._template_file is None else f"{self._template_file}: "
        why = "it takes no messages" if refusal is None else reason(refusal)
        raise TemplateFailed(where, why) from refusal

    @property
    def template_variables(self) -> frozenset[str]:
        """Return the names that the chat template reads, such as `enable_thinking`."""
        from dymoe_runtime.text.chat_template import variables_of  # imports jinja2

        return variables_of(self._pick_chat_template(tools=False)) - {"messages", "add_generation_prompt"}

    def check_variables(self, variables: Collection[str]) -> None:
        """Raise DymoeError if the chat template does not read one of `variables`."""
        known = self.template_variables if variables else frozenset()
        for name in variables:
            if name not in known:
                own = ", ".join(sorted(known)) or "none"
                raise DymoeError(f"the chat template reads no variable '{name}' (it reads: {own}); leave it out")

    def splitter(self, prompt: str) -> Splitter:
        """Return a new splitter of reasoning from the answer to a prompt that `chat` returned."""
        form = self.tool_format
        marks = () if form is None else set(form.special) & self.special_ids.keys()
        return make_splitter(self._pick_chat_template(tools=False), prompt, self.special_ids, marks)

    @cached_property
    def tool_format(self) -> Format | None:
        """Return how answers write calls of tools; None if it is not known, or there is no chat template."""
        return format_of(self._pick_chat_template(tools=True), self.special_ids) if self._chat_templates else None

    def _pick_chat_template(self, tools: bool) -> str:
        if not self._chat_templates:
            raise DymoeError("the model has no chat template; give it plain text with --prompt")
        name = "tool_use" if tools and "tool_use" in self._chat_templates else "default"
        if name not in self._chat_templates:
            found = ", ".join(self._chat_templates)
            raise DymoeError(f"no chat template is named 'default' (found: {found}); use --prompt")
        return self._chat_templates[name]


def _check_clean_up(config: Mapping[str, Any], backend: tokenizers.Tokenizer, directory: Path) -> None:
    """Raise DymoeError if decoding would have to remove spaces before punctuation, as it never does for BPE."""
    forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    if config.get("clean_up_tokenization_spaces") and (forced or not isinstance(backend.model, tokenizers.models.BPE)):
        raise DymoeError(
            f"{directory / CONFIG}: clean_up_tokenization_spaces is not supported for this tokenizer; set it to false"
        )


def _generation_eos_ids(generation: Mapping[str, Any], directory: Path) -> list[int]:
    entry = generation.get("eos_token_id")
    ids = [] if entry is None else entry if isinstance(entry, list) else [entry]
    if not all(type(i) is int for i in ids):
        path = directory / "generation_config.json"
        raise DymoeError(f"{path}: eos_token_id {entry!r} is neither an id nor a list of ids; {RESTORE}")
    return ids


def _chat_templates(config: Mapping[str, Any], directory: Path) -> tuple[dict[str, str], Path]:
    """Return name -> template, and their file; a chat_template.jinja replaces those of tokenizer_config.json."""
    own = read_if_there(directory / "chat_template.jinja")
    if own is not None:
        return {"default": own}, directory / "chat_template.jinja"
    entry, path = config.get("chat_template"), directory / CONFIG
    if entry is None:
        return {}, path
    try:
        named = dict(entry) if isinstance(entry, Mapping) else {item["name"]: item["template"] for item in entry}
    except (TypeError, KeyError):
        named = {"": None}
    templates = {"default": entry} if isinstance(entry, str) else named
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise DymoeError(f"{path}: chat_template is not a text or a list of templates with names; {RESTORE}")
    return templates, path


def _mark_special(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Make decoding skip named special tokens that tokenizer.json lists as ordinary words."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    known = {text: None for text in texts if text and text not in added and backend.token_to_id(text) is not None}
    backend.add_special_tokens(list(known))


def _flatten_decoders(state: Mapping[str, Any]) -> Iterable[str]:
    if state["type"] == "Sequence":
        for inner in state["decoders"]:
            yield from _flatten_decoders(inner)
    else:
        yield state["type"]
