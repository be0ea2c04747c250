"""Bundles and checkpoints as a model of lm-eval: `--model dymoe`.

lm-eval looks for the class by the entry point `lm_eval.models`, from its first release after 0.4.13 on. With older
ones import this module first, or call `dymoe-lm-eval`, which does.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.load import load_model, load_scorer
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.model.score import Head, WindowModel
from dymoe_runtime.process import resident_bytes
from dymoe_runtime.spec import ModelSpec
from dymoe_runtime.text.generate import generate
from dymoe_runtime.text.sampling import SamplingParams
from dymoe_runtime.text.tokenizer import Tokenizer
from dymoe_runtime.tools.evaluate import open_checkpoint
from dymoe_runtime.tools.likelihood import Request, rolling_requests, score_requests
from dymoe_runtime.units import parse_size

log = logging.getLogger(__name__)

PHASES = ("decode", "prefill")
# Arguments that only a bundle has, and their defaults.
BUNDLE_ARGS: dict[str, Any] = {
    "memory": None,
    "kv_bits": 16,
    "point": None,
    "quality": None,
    "tiers": "auto",
    "eval_phase": PHASES[0],
}
# Arguments of all models.
COMMON_ARGS: dict[str, Any] = {
    "context": None,
    "threads": None,
    "max_gen_toks": 256,
    "prefix_token_id": None,
    "enable_thinking": None,
}
# What lm-eval passes to every model: one window runs at a time, on the CPU.
IGNORED_ARGS = ("batch_size", "max_batch_size", "device")
# Names of the limit of an answer in a task, the first given counts.
MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING_KEYS = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    "seed",
)


@dataclass(frozen=True)
class _Windows:
    """A `WindowModel` of functions."""

    spec: ModelSpec
    hidden: Head
    logits: Head


@register_model("dymoe")
class DymoeLM(TemplateLM):  # type: ignore[misc]
    """A bundle, or a checkpoint in float32, for lm-eval.

    Log-likelihoods are those of `dymoe-run --eval`. Texts become tokens as in lm-eval's own `hf` model, so that the
    results can be compared. One model is loaded at a time, when the first request of its kind comes.
    """

    def __init__(self, bundle: str | None = None, checkpoint: str | None = None, **args: Any) -> None:
        """Open `bundle` or `checkpoint`, a path.

        Further arguments, as in `--model_args bundle=my.dymoe,memory=4GiB,point=3`, are those of dymoe-run with
        underscores: memory (of the model, beside what lm-eval itself takes), context, kv_bits, point, quality, tiers,
        threads, eval_phase; and lm-eval's max_gen_toks and prefix_token_id; and enable_thinking for chat templates.
        Raises DymoeError if one is unknown or wrong, or the files cannot be read.
        """
        super().__init__()
        if (bundle is None) == (checkpoint is None):
            raise DymoeError("--model_args: give either bundle=PATH or checkpoint=PATH")
        self._args = _complete(args, COMMON_ARGS if bundle is None else COMMON_ARGS | BUNDLE_ARGS)
        self._path = Path(str(bundle or checkpoint))
        self._kernels = load_kernels(threads=self._args["threads"])
        self._resources = ExitStack()
        weakref.finalize(self, self._resources.close)
        self._bundle: Bundle | None = None
        self._windows: WindowModel | None = None
        self._window = 0  # tokens that `_windows` takes
        if bundle is None:
            self._windows = open_checkpoint(self._path, self._kernels)
            self._spec, self._window = self._windows.spec, self._windows.spec.max_context
        else:
            self._bundle = Bundle.open(self._path)
            self._spec = self._bundle.spec
            self._options = _options(self._args)
        self.max_length = self._args["context"] or self._spec.max_context
        if not 2 <= self.max_length <= self._spec.max_context:
            raise DymoeError(f"context={self.max_length}: expected 2 to the model's context, {self._spec.max_context}")
        self._tokenizer = Tokenizer.load(self._path, self._spec.eos_ids)

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text."""
        ids = self._spec.eos_ids or sorted(self._tokenizer.eos_ids)
        if not ids:
            raise DymoeError(f"{self._path}: no token ends a text; give prefix_token_id=ID in --model_args")
        return ids[0]

    @property
    def prefix_token_id(self) -> int:
        """Return the token before a text that has no context: BOS, or the end of a text if there is none."""
        given: int | None = self._args["prefix_token_id"]
        if given is not None:
            return given
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Return the name under which lm-eval caches requests."""
        return str(self._path.resolve()).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text; by default with the tokenizer's BOS unless the text begins with it."""
        if add_special_tokens is None:
            prefix = self._tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not (prefix and string.startswith(prefix))
        return self._tokenizer.encode(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return messages as a prompt; without `add_generation_prompt` the last message stays open."""
        thinking = self._args["enable_thinking"]
        variables = {} if thinking is None else {"enable_thinking": thinking}
        prompt = self._tokenizer.chat(chat_history, add_generation_prompt, **variables)
        if add_generation_prompt:
            return prompt
        last = chat_history[-1]["content"].strip()
        return prompt[: prompt.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return a message in the model's template, by which lm-eval tells templates apart; None if none is wanted."""
        return self.apply_chat_template([{"role": "user", "content": "message"}]) if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes beside its results."""
        return {"model_max_length": self.max_length, "model_kernels": self._kernels.name}

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        windows = self._open_windows(max((len(a) + len(b) - 1 for a, b in pairs), default=1))
        results: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(pairs), desc="dymoe", disable=disable_tqdm) as progress:
            for index, result in score_requests(windows, pairs):
                results[index] = (result.value, result.greedy)
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
                progress.update()
        return [results[index] for index in range(len(pairs))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of each whole text, in windows of `max_length` tokens."""
        parts = [
            rolling_requests(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length)
            for request in requests
        ]
        pairs = [(None, list(context), list(continuation)) for part in parts for context, continuation in part]
        values = iter([value for value, _ in self._loglikelihood_tokens(pairs, disable_tqdm)])
        return [sum(next(values) for _ in part) for part in parts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each context: greedy, unless the task's generation_kwargs ask to sample."""
        if self._bundle is None:
            raise DymoeError("a checkpoint only scores texts; compile it, and give bundle=PATH to generate answers")
        jobs = []
        for index, request in enumerate(requests):
            text, kwargs = request.args
            stop, tokens, params = _generation(kwargs, self._args["max_gen_toks"], index)
            if tokens >= self.max_length:
                raise DymoeError(f"max_gen_toks={tokens} leaves no room for a prompt in a context of {self.max_length}")
            jobs.append((self._cut(self.tok_encode(text), self.max_length - tokens), stop, tokens, params))
        self._close()
        context = max((len(ids) + tokens for ids, _, tokens, _ in jobs), default=2)
        answers = []
        with load_model(self._bundle, self._beside(context=context), self._kernels) as model:
            for request, (ids, stop, tokens, params) in zip(
                requests, tqdm(jobs, desc="dymoe", disable=disable_tqdm), strict=True
            ):
                model.reset()
                answers.append(
                    "".join(token.text for token in generate(model, self._tokenizer, ids, params, tokens, stop))
                )
                self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _open_windows(self, longest: int) -> WindowModel:
        """Return a model that runs windows of `longest` tokens."""
        if self._windows is None or self._window < longest:
            assert self._bundle is not None
            self._close()
            scorer = self._resources.enter_context(load_scorer(self._bundle, self._beside(), longest, self._kernels))
            by_prefill = self._args["eval_phase"] == "prefill"
            self._windows = _Windows(scorer.spec, partial(scorer.hidden, by_prefill=by_prefill), scorer.logits)
            self._window = longest
        return self._windows

    def _beside(self, **changes: Any) -> RunOptions:
        """Return the options with a budget beside what this process, lm-eval and its data, has in memory now."""
        held = 0 if self._options.memory_bytes is None else resident_bytes()
        return replace(self._options, uncounted_bytes=held, **changes)

    def _close(self) -> None:
        """Close the scorer: two models would not share the memory."""
        self._resources.close()
        self._windows, self._window = None, 0

    def _fitting(self, context: list[int], continuation: list[int]) -> Request:
        """Return a request that leaves out the first tokens of a context that is too long.

        A context of spaces alone comes without tokens, because lm-eval moves its spaces to the continuation.
        """
        context = context or [self.prefix_token_id]
        if len(continuation) > self.max_length:
            raise DymoeError(
                f"a continuation of {len(continuation)} tokens does not fit the context of {self.max_length}; "
                "give a larger context= if the model has it"
            )
        return self._cut(context, self.max_length + 1 - len(continuation)), continuation

    def _cut(self, ids: list[int], longest: int) -> list[int]:
        if len(ids) > longest:
            log.warning("a prompt of %d tokens is cut to its last %d, which fit the context", len(ids), longest)
        return ids[-longest:]


def _complete(given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return all `known` arguments; raise DymoeError for another one, or one of a wrong type."""
    args = {name: value for name, value in given.items() if name not in IGNORED_ARGS}
    for name in args:
        if name not in known:
            raise DymoeError(
                f"--model_args: {name} is not known here; expected bundle or checkpoint, and {', '.join(known)}"
            )
    args = {**known, **args}
    for name in ("context", "threads", "max_gen_toks", "prefix_token_id"):
        if args[name] is not None and type(args[name]) is not int:
            raise DymoeError(f"{name}={args[name]}: expected a whole number")
    if args["max_gen_toks"] < 1:
        raise DymoeError(f"max_gen_toks={args['max_gen_toks']}: expected at least 1")
    if args.get("eval_phase", PHASES[0]) not in PHASES:
        raise DymoeError(f"eval_phase={args['eval_phase']}: expected {' or '.join(PHASES)}")
    return args


def _options(args: Mapping[str, Any]) -> RunOptions:
    """Return the options of a bundle from the arguments."""
    memory, quality, tier = args["memory"], args["quality"], args["tiers"]
    try:
        memory_bytes = None if memory is None else parse_size(str(memory))
        quality = None if quality is None else float(quality)
        tier = None if tier == "auto" else int(tier)
    except ValueError as error:
        raise DymoeError(f"--model_args: {error}") from error
    return RunOptions(
        memory_bytes=memory_bytes,
        kv_bits=args["kv_bits"],
        point=None if args["point"] is None else str(args["point"]),
        quality=quality,
        tier=tier,
        threads=args["threads"],
    )


def _generation(kwargs: Mapping[str, Any], max_tokens: int, index: int) -> tuple[tuple[str, ...], int, SamplingParams]:
    """Return (stop strings, most tokens, sampling) of a task's generation_kwargs.

    Sampling takes another seed for each request, because a task may repeat one. Raises DymoeError for a key that is not
    known and would change the answer.
    """
    left = {key: value for key, value in kwargs.items() if value is not None}
    until = left.pop("until", ())
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    limits = [left.pop(key) for key in MAX_TOKENS_KEYS if key in left]
    sampling = {key: left.pop(key) for key in SAMPLING_KEYS if key in left}
    sample = left.pop("do_sample", sampling.get("temperature", 0) > 0)
    if left.pop("num_beams", 1) != 1 or left:
        raise DymoeError(
            f"generation_kwargs: {', '.join(left) or 'num_beams'} is not supported; "
            f"leave it out of the task, or override it with --gen_kwargs"
        )
    sampling["temperature"] = float(sampling.get("temperature", 1.0)) if sample else 0.0
    sampling["seed"] = sampling.get("seed", 0) + index
    return stop, int(limits[0]) if limits else max_tokens, SamplingParams(**sampling)
