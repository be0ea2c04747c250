"""Sampling of the next token from logits, with the filters and their order as in Hugging Face transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dymoe_runtime.errors import DymoeError

# Inclusive. The bounds of the repetition penalty keep it from scaling a logit of ordinary size beyond float32.
LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 1000.0),
    "top_k": (0, 2**31 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "seed": (0, 2**63 - 1),
}
WHOLE_NUMBERS = ("top_k", "seed")
# They change greedy sampling, too.
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
# Inclusive, as in OpenAI's interface: the ends make a token certain or impossible.
MAX_BIAS = 100.0
# Most tokens with a bias: more than a request needs, and few enough to add at every step.
MAX_BIASED = 65_536

# A lower temperature is greedy: dividing by it could overflow float32, and the likeliest token wins in any case.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """Settings of how the next token is chosen; the defaults are greedy.

    `logit_bias` maps token ids to what is added to their logits; it is kept as pairs with rising ids. Raises DymoeError
    for a value outside LIMITS, and for a bias that is not from -100 to 100.

    >>> SamplingParams(temperature=0.8, top_p=0.95, seed=1).greedy
    False
    >>> SamplingParams(top_p=1.5)
    Traceback (most recent call last):
    dymoe_runtime.errors.DymoeError: --top-p 1.5: must be a number from 0.0 to 1.0
    """

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    min_p: float = 0.0  # 0 is off
    repetition_penalty: float = 1.0  # 1 is off; counts the prompt and what was generated
    presence_penalty: float = 0.0  # 0 is off; counts what was generated
    frequency_penalty: float = 0.0  # 0 is off; counts what was generated
    seed: int = 0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            kinds = int if name in WHOLE_NUMBERS else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                kind = "a whole number" if name in WHOLE_NUMBERS else "a number"
                flag = "--" + name.replace("_", "-")
                raise DymoeError(f"{flag} {value}: must be {kind} from {low} to {high}")
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Return whether the likeliest token is always chosen."""
        return self.temperature < GREEDY_BELOW

    @property
    def bias(self) -> tuple[tuple[int, float], ...]:
        """Return the pairs of `logit_bias`."""
        return tuple(self.logit_bias)  # type: ignore[arg-type]

    @staticmethod
    def from_generation_config(config: Mapping[str, Any]) -> SamplingParams:
        """Return what a generation_config.json asks for; filters that it does not name are off.

        As in transformers it is greedy where `do_sample` is false. A file that has a temperature or a filter but no
        `do_sample` asks to sample. Raises DymoeError for a value that is not possible.
        """
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        values = {name: config[name] for name in names if config.get(name) is not None}
        if values.get("top_k") == -1:  # how some write that it is off
            del values["top_k"]
        penalty = {name: value for name, value in values.items() if name == "repetition_penalty"}
        samples = config.get("do_sample")
        if not isinstance(samples, bool | None):
            raise DymoeError(f"do_sample {samples!r}: must be true or false")
        if not (values.keys() - penalty.keys() if samples is None else samples):
            return SamplingParams(**penalty)
        return SamplingParams(**{"temperature": 1.0, **values})

    def to_json(self) -> dict[str, Any]:
        """Return the settings by their names, as values of JSON."""
        return asdict(self) | {"logit_bias": [list(pair) for pair in self.bias]}

    def __str__(self) -> str:
        """Return the settings that are not off, such as 'temperature 0.8, top-p 0.95, seed 0'."""
        off = SamplingParams()
        values = {name: getattr(self, name) for name in LIMITS if name != "seed"}
        given = [
            f"{name.replace('_', '-')} {value:g}"
            for name, value in values.items()
            if value != getattr(off, name) and not (self.greedy and name not in PENALTIES)
        ]
        if self.bias:
            given.append(f"logit-bias of {len(self.bias)} token{'s' * (len(self.bias) > 1)}")
        return ", ".join(["greedy", *given] if self.greedy else [*given, f"seed {self.seed}"])


def _checked_bias(bias: object) -> tuple[tuple[int, float], ...]:
    """Return pairs of ids and biases, with rising ids; raise DymoeError if `bias` is neither a mapping nor pairs."""
    entries: list[Any] = (
        list(bias.items() if isinstance(bias, Mapping) else bias) if isinstance(bias, Iterable) else [0]
    )
    if not all(map(_is_bias, entries)):
        raise DymoeError(f"logit_bias: give a map of token ids to numbers from {-MAX_BIAS:g} to {MAX_BIAS:g}")
    pairs = {int(token_id): float(value) for token_id, value in entries}
    if len(entries) > MAX_BIASED:
        raise DymoeError(f"logit_bias: {len(entries)} tokens; give at most {MAX_BIASED}")
    return tuple(sorted(pairs.items()))


def _is_bias(entry: object) -> bool:
    """Return whether an entry is a pair of a token id and a bias."""
    if not isinstance(entry, Sequence) or len(entry) != 2:
        return False
    token_id, value = entry
    return (
        type(token_id) is int
        and 0 <= token_id < 2**31
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and -MAX_BIAS <= value <= MAX_BIAS
    )


class Sampler:
    """A sampler with a random generator of its own: equal seeds and logits give equal tokens.

    It counts what it has chosen, for the presence and the frequency penalty. Hence each answer has a sampler of its
    own.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        # Greedy sampling avoids numpy.random, whose import takes some time and memory.
        self._generator = None if params.greedy else np.random.default_rng(params.seed)
        self._counts: dict[int, int] | None = {} if params.presence_penalty or params.frequency_penalty else None

    def sample(
        self,
        logits: np.ndarray,
        history: Sequence[int],
        allow: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> int:
        """Return the next token id from logits float32 [V].

        `allow` makes the logits of forbidden ids -inf, after bias and penalties and before all filters.

        `history` holds the ids of the prompt and of the tokens generated so far; an `array("q")` is read in place, a
        list is copied. Raises DymoeError if a logit is NaN or the largest is infinite, or if an id of the logit bias is
        not below V.
        """
        check_logits(logits)
        scores = self._penalized(logits, history)
        if allow is not None:
            scores = allow(scores)
            if scores.max() == -math.inf:
                raise DymoeError("the grammar leaves no token that the model knows; use another grammar")
        if self._generator is None:
            token_id = int(scores.argmax())
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                ids, scores = candidates(scores, self.params)
            check_logits(scores)
            token_id = int(ids[draw(scores, self._generator)])
        if self._counts is not None:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
        return token_id

    def _penalized(self, logits: np.ndarray, history: Sequence[int]) -> np.ndarray:
        """Return the scores after the bias and the penalties; the same array if all are off."""
        params = self.params
        scores = penalize_repetition(add_bias(logits, params.bias), history, params.repetition_penalty)
        if self._counts:
            scores = penalize_presence(scores, self._counts, params.presence_penalty, params.frequency_penalty)
        return scores


def check_logits(logits: np.ndarray) -> None:
    """Raise DymoeError if a logit is NaN or the largest is infinite."""
    top = float(logits.max())  # a single NaN makes the maximum NaN
    if not math.isfinite(top):
        kind = "NaN" if math.isnan(top) else "infinite"
        raise DymoeError(f"the model produced {kind} logits; its weights may be damaged: run dymoe-bundle verify")


def log_probabilities(logits: np.ndarray, token_id: int, count: int) -> dict[str, Any]:
    """Return the `logprob` of `token_id` under logits [V], and the `top_logprobs`: the `count` likeliest, falling.

    Raises DymoeError if `count` is negative.
    """
    if count < 0:
        raise DymoeError(f"logprobs {count}: must be at least 0")
    logits = logits.astype(np.float64)
    logs = logits - logits.max()
    logs -= np.log(np.exp(logs).sum())
    ids = np.argsort(-logs, kind="stable")[:count].tolist()
    return {"logprob": float(logs[token_id]), "top_logprobs": tuple((i, float(logs[i])) for i in ids)}


def candidates(scores: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Apply temperature, top-k, top-p and min-p, in this order, to scores [V].

    Returns rising ids [C] and their scores [C]; scores that top-p or min-p remove are -inf.
    """
    scores = scores / params.temperature
    if params.top_k:
        ids = top_k_ids(scores, params.top_k)
        scores = scores[ids]
    else:
        ids = np.arange(len(scores))
    if params.top_p < 1.0:
        scores = keep_top_p(scores, params.top_p)
    if params.min_p:
        scores = keep_min_p(scores, params.min_p)
    return ids, scores


def penalize_repetition(scores: np.ndarray, history: Sequence[int], penalty: float) -> np.ndarray:
    """Divide positive and multiply negative scores of ids in `history` by `penalty` (arXiv 1909.05858).

    Returns new scores, or the same array if nothing changes. Ids beyond the scores are ignored.
    """
    if penalty == 1.0 or not len(history):
        return scores
    ids = np.asarray(history, dtype=np.int64)
    ids = ids[ids < len(scores)]
    seen = scores[ids]
    scores = scores.copy()
    scores[ids] = np.where(seen < 0, seen * penalty, seen / penalty)
    return scores


def add_bias(scores: np.ndarray, bias: Sequence[tuple[int, float]]) -> np.ndarray:
    """Return scores [V] with the bias of each token id added; the same array if there is none.

    Raises DymoeError if an id is not below V.
    """
    if not bias:
        return scores
    ids, values = zip(*bias, strict=True)
    if max(ids) >= len(scores):
        raise DymoeError(f"logit_bias: the model has no token {max(ids)}; give ids below {len(scores)}")
    scores = scores.copy()
    scores[list(ids)] += np.array(values, scores.dtype)
    return scores


def penalize_presence(scores: np.ndarray, counts: Mapping[int, int], presence: float, frequency: float) -> np.ndarray:
    """Return scores [V] less `presence` and `frequency` times the count, for each id in `counts`.

    This is OpenAI's formula: a logit becomes logit - count * frequency - (1 if count > 0 else 0) * presence.
    """
    scores = scores.copy()
    times = np.fromiter(counts.values(), np.float64, len(counts))
    scores[list(counts)] -= (times * frequency + presence).astype(scores.dtype)
    return scores


def top_k_ids(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the ids of the k largest scores and of all scores equal to the smallest of them, rising."""
    k = min(k, len(scores))
    smallest = np.partition(scores, len(scores) - k)[len(scores) - k]
    return np.flatnonzero(scores >= smallest)


def keep_top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Set to -inf all but the fewest tokens whose probabilities reach p (nucleus sampling, arXiv 1904.09751).

    Of equal scores at the boundary the lowest ids stay; transformers leaves that to an unstable sort.
    """
    ascending = np.sort(scores)
    cumulative = weights(ascending).cumsum(dtype=np.float64)
    removed = min(int(np.searchsorted(cumulative, (1 - p) * cumulative[-1], side="right")), len(scores) - 1)
    lowest = ascending[removed]
    kept = scores >= lowest
    removed_ties = removed - int(np.searchsorted(ascending, lowest))
    if removed_ties:
        ties = np.flatnonzero(scores == lowest)
        kept[ties[-removed_ties:]] = False
    return np.where(kept, scores, np.float32(-math.inf))


def keep_min_p(scores: np.ndarray, min_p: float) -> np.ndarray:
    """Set to -inf the tokens that are less than `min_p` times as likely as the likeliest (arXiv 2407.01082)."""
    return np.where(weights(scores) < min_p, np.float32(-math.inf), scores)


def draw(scores: np.ndarray, generator: np.random.Generator) -> int:
    """Draw one index from the softmax of scores [C], by inverting its distribution function."""
    distribution = weights(scores).cumsum(dtype=np.float64)
    # Above zero and at most the total, so the first index that reaches it has a probability above zero.
    point = (1 - generator.random()) * distribution[-1]
    return int(np.searchsorted(distribution, point))


def weights(scores: np.ndarray) -> np.ndarray:
    """Return numbers proportional to the probabilities of scores [C], 1 for the likeliest."""
    powers: np.ndarray = np.exp(scores - scores.max())
    return powers
