"""The tokenizer of a model, loaded from its Hugging Face files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import parse_json, read_member
from dymoe_runtime.text import tokenizer_check
from dymoe_runtime.text.reasoning import Splitter, make_splitter
from dymoe_runtime.text.sampling import SamplingParams

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
RESTORE = "copy it from the model's repository or recompile the bundle"


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
        add_bos: bool = False,
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap `backend`; `special_tokens` maps names in SPECIAL_TOKENS to texts in the vocabulary.

        `generation` is what generation_config.json holds.
        """
        _mark_special(backend, special_tokens.values())
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._chat_templates = dict(chat_templates)
        self._add_bos = add_bos
        self._generation = dict(generation or {})
        self.bos_id = self._named_id("bos_token")
        eos_id = self._named_id("eos_token")
        self.eos_ids = frozenset(eos_ids) | ({eos_id} if eos_id is not None else frozenset())
        added = backend.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in added.items() if token.special}
        self.vocab_size = max([backend.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added)])

    @classmethod
    def load(cls, path: str | os.PathLike[str], eos_ids: Iterable[int] = ()) -> Tokenizer:
        """Load tokenizer.json from the directory `path`, with tokenizer_config.json and other files that may be there.

        `eos_ids` come from the model's configuration and are joined with those of the files. Raises DymoeError
        naming the file if one is missing or malformed.

        >>> tokenizer = Tokenizer.load("build/demo.dymoe")
        >>> tokenizer.decode(tokenizer.encode("Once upon a time"))
        'Once upon a time'
        """
        directory = Path(path)
        backend = _load_backend(directory / "tokenizer.json")
        config = _read_json(directory / "tokenizer_config.json", optional=True)
        generation = _read_json(directory / "generation_config.json", optional=True)
        names = {**_read_json(directory / "special_tokens_map.json", optional=True), **config}
        return cls(
            backend,
            _special_tokens(names, backend, directory),
            _chat_templates(config, directory),
            {*eos_ids, *_generation_eos_ids(generation, directory)},
            add_bos=config.get("add_bos_token") is True,
            generation=generation,
        )

    @classmethod
    def of(cls, model: ModelOfBundle) -> Tokenizer:
        """Load the tokenizer of a loaded model; raise DymoeError as `load` does."""
        return cls.load(model.bundle.path, model.spec.eos_ids)

    def _named_id(self, name: str) -> int | None:
        text = self._special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

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

        With `add_special_tokens` the post-processor and `add_bos_token` may add special tokens. Raises DymoeError if
        the text is not valid Unicode, and TypeError if it is no text.
        """
        ids: list[int] = self._encoding(text, add_special_tokens).ids
        wants_bos = add_special_tokens and self._add_bos and self.bos_id is not None
        return [self.bos_id, *ids] if wants_bos and ids[:1] != [self.bos_id] else ids  # type: ignore[list-item]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of `text`, without added ones, and the characters (first, last + 1) of each.

        Raises DymoeError as `encode` does.
        """
        encoding = self._encoding(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _encoding(self, text: str, add_special_tokens: bool) -> Any:
        if not isinstance(text, str):
            raise TypeError(f"expected a text, got {type(text).__name__}")
        try:
            with _refusing("tokenizer.json: cannot encode the text", RESTORE):
                return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:  # a lone surrogate, which is how Python passes on undecodable bytes
            raise DymoeError("the text is not valid Unicode; save or pass it as UTF-8") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; ids outside the vocabulary add nothing."""
        with _refusing("tokenizer.json: cannot decode tokens", RESTORE):
            text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str | None:
        """Return the token as the vocabulary spells it, or None if the id is outside the vocabulary."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    @property
    def decoder_types(self) -> list[str]:
        """Return the types of the decoders in tokenizer.json, in the order in which they run."""
        decoder = self._backend.decoder
        return [] if decoder is None else list(_flatten_decoders(json.loads(decoder.__getstate__())))

    @property
    def has_chat_template(self) -> bool:
        """Return whether the model has a chat template."""
        return bool(self._chat_templates)

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """Return `messages` as the prompt that the model was trained on; encode it with add_special_tokens=False.

        `kwargs` are passed to the template, such as `tools` or `enable_thinking`. Raises DymoeError if there is no
        template, or if the template refuses the messages.
        """
        from dymoe_runtime.text.chat_template import compiled  # imports jinja2, which plain prompts do not need

        template = self._pick_chat_template(bool(kwargs.get("tools")))
        variables = {"tools": None, "documents": None, **self._special_tokens, **kwargs}
        try:
            return compiled(template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as error:  # a template is a program of the model's author: it can raise anything
            raise DymoeError(f"the chat template failed: {error}; change the messages or use --prompt") from error

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
        return make_splitter(self._pick_chat_template(tools=False), prompt, self.special_ids)

    def _pick_chat_template(self, tools: bool) -> str:
        if not self._chat_templates:
            raise DymoeError("the model has no chat template; give it plain text with --prompt")
        name = "tool_use" if tools and "tool_use" in self._chat_templates else "default"
        if name not in self._chat_templates:
            found = ", ".join(self._chat_templates)
            raise DymoeError(f"no chat template is named 'default' (found: {found}); use --prompt")
        return self._chat_templates[name]


@contextmanager
def _refusing(what: str, remedy: str) -> Iterator[None]:
    """Raise DymoeError, which begins with `what`, where the library `tokenizers` fails within this context.

    It raises Exception itself, and where it panics an exception that is none. A TypeError is passed on.
    """
    try:
        yield
    except BaseException as error:
        panics = type(error).__name__ == "PanicException"
        if isinstance(error, TypeError) or not (panics or isinstance(error, Exception)):
            raise
        raise DymoeError(f"{what} ({error}); {remedy}") from error


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    text = _read_text(path)
    with _refusing(f"{path}: not a valid tokenizer", RESTORE):
        backend = tokenizers.Tokenizer.from_str(tokenizer_check.checked(text))
    # Training settings that would silently shorten or lengthen a prompt.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_text(path: Path) -> str:
    text = _read_if_there(path)
    if text is None:
        raise DymoeError(f"{path}: missing; {RESTORE}")
    return text


def _read_if_there(path: Path) -> str | None:
    data = read_member(path, RESTORE)
    try:
        return None if data is None else data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DymoeError(f"{path}: cannot be read ({error}); {RESTORE}") from error


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    text = _read_if_there(path) if optional else _read_text(path)
    if text is None:
        return {}
    values = parse_json(text, str(path), RESTORE)
    if re.search(r"\\u[dD]", text):
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DymoeError(f"{path}: a text has half of a surrogate pair; {RESTORE}") from error
    return values


def _special_tokens(names: Mapping[str, Any], backend: tokenizers.Tokenizer, directory: Path) -> dict[str, str]:
    """Return name -> text of the special tokens.

    Raises DymoeError if bos or eos is not in the vocabulary, because generation depends on them.
    """
    tokens = {}
    for name in SPECIAL_TOKENS:
        entry = names.get(name)
        text = entry.get("content") if isinstance(entry, dict) else entry
        if text is None:
            continue
        if not isinstance(text, str):
            raise DymoeError(f"{directory / 'tokenizer_config.json'}: {name} is not a text; {RESTORE}")
        if backend.token_to_id(text) is None and name in ("bos_token", "eos_token"):
            raise DymoeError(f"{directory / 'tokenizer.json'}: no token is the {name} {text!r}; {RESTORE}")
        tokens[name] = text
    return tokens


def _generation_eos_ids(generation: Mapping[str, Any], directory: Path) -> list[int]:
    entry = generation.get("eos_token_id")
    ids = [] if entry is None else entry if isinstance(entry, list) else [entry]
    if not all(type(i) is int for i in ids):
        path = directory / "generation_config.json"
        raise DymoeError(f"{path}: eos_token_id {entry!r} is neither an id nor a list of ids; {RESTORE}")
    return ids


def _chat_templates(config: Mapping[str, Any], directory: Path) -> dict[str, str]:
    """Return name -> template; a chat_template.jinja replaces those of tokenizer_config.json."""
    own = _read_if_there(directory / "chat_template.jinja")
    if own is not None:
        return {"default": own}
    entry = config.get("chat_template")
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {"default": entry}
    items = entry if isinstance(entry, list) else [None]
    pairs: list[tuple[Any, Any]] = [
        (item.get("name"), item.get("template")) for item in items if isinstance(item, dict)
    ]
    if len(pairs) < len(items) or not all(isinstance(part, str) for pair in pairs for part in pair):
        path = directory / "tokenizer_config.json"
        raise DymoeError(f"{path}: chat_template is not a text or a list of templates; {RESTORE}")
    return dict(pairs)


def _mark_special(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Make decoding skip named special tokens that tokenizer.json lists as ordinary words."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    known = {text: None for text in texts if text not in added and backend.token_to_id(text) is not None}
    backend.add_special_tokens(list(known))


def _flatten_decoders(state: Mapping[str, Any]) -> Iterable[str]:
    if state["type"] == "Sequence":
        for inner in state["decoders"]:
            yield from _flatten_decoders(inner)
    else:
        yield state["type"]
