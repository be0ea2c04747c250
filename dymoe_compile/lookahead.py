"""Guesses of a layer's experts one or two layers early: how often they are right, and a linear predictor.

A guess asks the layer's router with an earlier layer's residual stream. The predictor is that
router corrected by ridge regression (towards no correction) from the earlier stream to the
logits that the router gave in the end; it is kept where it is right more often on held-out text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from dymoe_runtime.decoder import Decoder, Routing

# Tokens that predictors are fitted on, and judged on.
FIT_TOKENS = 16384
JUDGE_TOKENS = 4096
# Ridge relative to the mean diagonal of the inputs' second moments.
RIDGE = 0.03
# What a predictor must add to the mean recall of the first ranks to be worth its bytes.
LEAST_GAIN = 0.005


@dataclass
class LookAheadFit:
    """Recall by rank, up to twice the experts of a token, on held-out text: [] where there is no earlier layer."""

    router: list[float] = field(default_factory=list)
    linear: list[float] = field(default_factory=list)
    two_ahead: list[float] = field(default_factory=list)  # the router asked two layers early
    predictor: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # [experts, H + 1], or empty


class LookAheadProbe:
    """Follows a sample of tokens through the layers."""

    def __init__(self, decoder: Decoder, train: int, total: int, seed: int) -> None:
        """Tokens before `train` are fitted on, those from there to `total` judge."""
        generator = torch.Generator().manual_seed(seed)
        fit = torch.randperm(train, generator=generator)[:FIT_TOKENS].sort().values
        judge = torch.arange(train, total)[:JUDGE_TOKENS]
        self._decoder = decoder
        self._sample = torch.cat([fit, judge]).numpy()
        self._fit = len(fit)
        self.past: list[np.ndarray] = []  # residual streams of the sample, latest MoE layer first

    def observe(self, layer: int, h: np.ndarray, routing: Routing) -> LookAheadFit:
        """Judge the guesses of `layer` by what its router chose for inputs h [T, H]; remember its residual stream."""
        top_k = routing.experts.shape[1]
        fit = LookAheadFit()
        chosen = torch.from_numpy(routing.experts[self._sample][self._fit :])
        if self.past:
            early = self._normed(layer, self.past[0])
            asked = self._logits(layer, early)
            fit.router = recall(asked[self._fit :], chosen)
            late = self._logits(layer, h[self._sample[: self._fit]])
            predictor = ridge(torch.from_numpy(early[: self._fit]), late - asked[: self._fit])
            corrected = asked[self._fit :] + _apply(predictor, torch.from_numpy(early[self._fit :]))
            fit.linear = recall(corrected, chosen)
            if sum(fit.linear[:top_k]) > sum(fit.router[:top_k]) + LEAST_GAIN * top_k:
                fit.predictor = predictor.numpy()
        if len(self.past) > 1:
            earlier = self._normed(layer, self.past[1][self._fit :])
            fit.two_ahead = recall(self._logits(layer, earlier), chosen)
        self.past = [routing.residual[self._sample], *self.past[:1]]
        return fit

    def forget(self) -> None:
        """A dense layer came between: there is nothing to look ahead from."""
        self.past = []

    def _normed(self, layer: int, residual: np.ndarray) -> np.ndarray:
        return self._decoder.norm(f"layers.{layer}.mlp_norm", residual)

    def _logits(self, layer: int, h: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self._decoder.dense.linear(f"layers.{layer}.router", h))


def recall(logits: torch.Tensor, chosen: torch.Tensor) -> list[float]:
    """Share of tokens whose guess of each rank, by logits [T, experts], is among the chosen [T, k]."""
    ranks = min(2 * chosen.shape[1], logits.shape[1])
    guess = logits.topk(ranks, dim=-1).indices
    found = (guess[:, :, None] == chosen[:, None, :]).any(-1)
    return [round(value, 6) for value in found.float().mean(0).tolist()]


def ridge(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Weights and bias [outputs, inputs + 1] of y [T, outputs] on x [T, inputs]; the bias is not shrunk."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    moments = centred.T @ centred
    moments.diagonal().add_(RIDGE * moments.diagonal().mean().clamp_min(1e-20))
    weight = torch.linalg.solve(moments, centred.T @ (y - mean_y)).T
    return torch.cat([weight, (mean_y - weight @ mean_x)[:, None]], dim=1)


def _apply(predictor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x @ predictor[:, :-1].T + predictor[:, -1]
