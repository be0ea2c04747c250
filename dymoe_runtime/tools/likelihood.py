"""Log-likelihoods of given texts, from which benchmarks compute task scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.model.score import SCORED_ROWS, WindowModel, log_softmax

# Token ids of a context, which is not scored, and of a continuation, which is.
Request = tuple[Sequence[int], Sequence[int]]


class LogLikelihood(NamedTuple):
    """The log-likelihood of a continuation in nats, and whether greedy decoding would generate it."""

    value: float
    greedy: bool


def log_likelihoods(model: WindowModel, requests: Sequence[Request]) -> list[LogLikelihood]:
    """Return the log-likelihood of each continuation after its context, in the order of the requests.

    Requests whose tokens agree up to the last one share a pass: the choices of a question whose answers are single
    tokens take one. Raises DymoeError if a context is empty, a request does not fit the model's window (all its tokens
    but the last count), or the model's output is not finite.

    >>> from dymoe_runtime import Tokenizer, load_scorer
    >>> with load_scorer("build/demo.dymoe", window=64) as scorer:
    ...     tokenizer = Tokenizer.load(scorer.bundle.path, scorer.spec.eos_ids)
    ...     context = tokenizer.encode("Once upon a")
    ...     results = log_likelihoods(scorer, [(context, tokenizer.encode(text)) for text in (" time", " dog")])
    >>> results[0].value > results[1].value
    True
    """
    found = dict(score_requests(model, requests))
    return [found[index] for index in range(len(requests))]


def rolling_log_likelihood(model: WindowModel, ids: Sequence[int], prefix_id: int, window: int) -> float:
    """Return the log-likelihood in nats of a whole text, of any length, after the token `prefix_id`.

    Windows of `window` tokens are those of `rolling_requests`. Raises DymoeError as `log_likelihoods` does.
    """
    return sum(result.value for result in log_likelihoods(model, rolling_requests(ids, prefix_id, window)))


def rolling_requests(ids: Sequence[int], prefix_id: int, window: int) -> list[Request]:
    """Return requests that score each of `ids` once, in windows of at most `window` tokens.

    The windows are lm-eval's: each continues after one token of the one before, and the last is as long as the others,
    so that its first tokens are context.
    """
    text = [prefix_id, *ids]
    requests: list[Request] = []
    done = 1
    while done < len(text):
        end = min(done + window, len(text))
        requests.append((text[max(0, end - 1 - window) : done], text[done:end]))
        done = end
    return requests


def score_requests(model: WindowModel, requests: Sequence[Request]) -> Iterator[tuple[int, LogLikelihood]]:
    """Yield (index, log-likelihood) of each request as soon as it is known; `log_likelihoods` says what it raises."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(requests):
        if not len(context):
            raise DymoeError(
                "a context is empty; begin it with the token that begins a text, such as the tokenizer's BOS"
            )
        ids = (*context, *continuation)
        model.spec.check_ids(ids)
        if len(continuation):
            groups.setdefault(ids[:-1], []).append(index)
        else:
            yield index, LogLikelihood(0.0, True)
    for inputs, members in groups.items():
        results = _score_group(model, np.array(inputs), [requests[index] for index in members])
        yield from zip(members, results, strict=True)


def _score_group(model: WindowModel, ids: np.ndarray, requests: Sequence[Request]) -> list[LogLikelihood]:
    """Score requests whose tokens before the last are all `ids`."""
    hidden = model.hidden(ids)
    starts = [len(context) - 1 for context, _ in requests]  # positions that predict the first scored tokens
    targets = [np.array(continuation, dtype=np.int64) for _, continuation in requests]
    values, greedy = [0.0] * len(requests), [True] * len(requests)
    for begin in range(min(starts), len(ids), SCORED_ROWS):
        end = min(begin + SCORED_ROWS, len(ids))
        with np.errstate(over="ignore", invalid="ignore"):  # the sums are checked
            log_p = log_softmax(model.logits(hidden[begin:end]))
        best = log_p.argmax(-1)
        for index, (start, wanted) in enumerate(zip(starts, targets, strict=True)):
            rows = np.arange(max(begin, start), min(end, start + len(wanted)))
            now = wanted[rows - start]
            values[index] += float(log_p[rows - begin, now].sum(dtype=np.float64))
            greedy[index] &= bool((best[rows - begin] == now).all())
    if not all(map(math.isfinite, values)):
        raise DymoeError("the model's output is not finite; its weights may be damaged: run dymoe-bundle verify")
    return [LogLikelihood(*result) for result in zip(values, greedy, strict=True)]
