"""Guesses of a layer's experts one or two layers early: how often they are right, and a linear predictor.

A guess applies the layer's router to an earlier layer's residual stream. The predictor adds a linear correction to the
logits of that guess. The correction is fitted by ridge regression, so that the sum comes near the logits that the
router gave in the end; the ridge shrinks it towards no correction. A layer keeps its predictor only if its recall on
held-out text is higher.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from dymoe_runtime.model.decoder import Decoder

# Tokens on which predictors are fitted, and on which they are judged.
FIT_TOKENS = 16384
JUDGE_TOKENS = 4096
# Ridge relative to the mean diagonal of the inputs' second moments.
RIDGE = 0.03
# Gain in mean recall over the first top_k ranks that makes a predictor worth its bytes.
MIN_GAIN = 0.005


@dataclass
class LookAheadFit:
    """Recall on held-out text by rank, up to twice the experts of a token; [] if there is no earlier layer."""

    router: list[float] = field(default_factory=list)
    linear: list[float] = field(default_factory=list)
    two_ahead: list[float] = field(default_factory=list)  # of the router, applied two layers early
    predictor: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # [experts, H + 1], or empty


class LookAheadProbe:
    """Hidden states of a sample of tokens, followed through the layers to judge guesses."""

    def __init__(self, decoder: Decoder, train: int, total: int, seed: int) -> None:
        """Sample tokens before `train` to fit predictors, and take tokens from `train` to `total` to judge them."""
        generator = torch.Generator().manual_seed(seed)
        fit = torch.randperm(train, generator=generator)[:FIT_TOKENS].sort().values
        judge = torch.arange(train, total)[:JUDGE_TOKENS]
        self._decoder = decoder
        self._sample = torch.cat([fit, judge]).numpy()
        self._fit = len(fit)
        self.past: list[np.ndarray] = []  # residual streams of the sample, latest MoE layer first

    def judge(self, layer: int, experts: np.ndarray, residual: np.ndarray) -> LookAheadFit:
        """Judge the guesses of `layer` by the experts [T, k] that its router chose for the residual stream [T, H]."""
        top_k = experts.shape[1]
        fit = LookAheadFit()
        chosen = torch.from_numpy(experts[self._sample][self._fit :])
        if self.past:
            early = self._normed(layer, self.past[0])
            asked = self._logits(layer, early)
            fit.router = recall(asked[self._fit :], chosen)
            late = self._logits(layer, self._normed(layer, residual[self._sample[: self._fit]]))
            predictor = ridge(torch.from_numpy(early[: self._fit]), late - asked[: self._fit])
            corrected = asked[self._fit :] + _apply(predictor, torch.from_numpy(early[self._fit :]))
            fit.linear = recall(corrected, chosen)
            if sum(fit.linear[:top_k]) > sum(fit.router[:top_k]) + MIN_GAIN * top_k:
                fit.predictor = predictor.numpy()
        if len(self.past) > 1:
            earlier = self._normed(layer, self.past[1][self._fit :])
            fit.two_ahead = recall(self._logits(layer, earlier), chosen)
        return fit

    def remember(self, residual: np.ndarray) -> None:
        """Remember the residual stream [T, H] after the mixer of a layer, from which later layers are guessed."""
        self.past = [residual[self._sample], *self.past[:1]]

    def resume(self, past: list[np.ndarray]) -> None:
        """Continue from the `past` of another probe."""
        self.past = past

    def forget(self) -> None:
        """Drop the remembered residual streams, because a dense layer came between."""
        self.past = []

    def _normed(self, layer: int, residual: np.ndarray) -> np.ndarray:
        return self._decoder.routers.router_input(layer, residual)

    def _logits(self, layer: int, h: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self._decoder.routers.logits(layer, h))


def recall(logits: torch.Tensor, chosen: torch.Tensor) -> list[float]:
    """Return the recall by rank: the share of tokens that chose the expert guessed at that rank.

    The guesses of a token are its highest logits [T, experts], up to 2 k of them. chosen is [T, k].
    """
    ranks = min(2 * chosen.shape[1], logits.shape[1])
    guess = logits.topk(ranks, dim=-1).indices
    found = (guess[:, :, None] == chosen[:, None, :]).any(-1)
    return [round(value, 6) for value in found.float().mean(0).tolist()]


def ridge(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the ridge regression of y [T, outputs] on x [T, inputs]: weights, then bias, [outputs, inputs + 1].

    The bias is not shrunk.
    """
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    moments = centred.T @ centred
    moments.diagonal().add_(RIDGE * moments.diagonal().mean().clamp_min(1e-20))
    weight = torch.linalg.solve(moments, centred.T @ (y - mean_y)).T
    return torch.cat([weight, (mean_y - weight @ mean_x)[:, None]], dim=1)


def _apply(predictor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x @ predictor[:, :-1].T + predictor[:, -1]
