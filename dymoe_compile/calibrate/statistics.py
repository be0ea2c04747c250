"""Statistics of a layer's router on the calibration tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dymoe_runtime.model.routing import PromptRouting

# Tokens per layer whose routing weights are kept, to fit thresholds.
WEIGHT_SAMPLE = 4096


@dataclass
class LayerStatistics:
    """Statistics of one layer's router on the calibration tokens, and the errors of its quantized experts."""

    frequency: list[float]  # [experts], share of tokens
    weight_mass: list[float]  # [experts], mean share of tokens
    weights: np.ndarray  # [sample, k], routing weights of single tokens
    chunk_importance: np.ndarray  # [windows, experts], the importance that decides a prompt's tiers
    chunk_energy: np.ndarray  # [windows, experts], sum of squared routing weights
    look_ahead: dict[str, list[float]]  # kind of guess (router, linear, two_ahead) -> recall by rank
    predictor: np.ndarray  # [experts, H + 1], corrects the router's logits one layer early; or empty
    weight_energy: list[float]  # [experts], share of all squared routing weights
    expert_error: dict[str, list[float]]  # tier -> [experts], squared error relative to the squared output
    data_free: list[int]  # experts with too few tokens to calibrate


def layer_statistics(routing: PromptRouting, num_experts: int, seed: int) -> LayerStatistics:
    """Return the statistics of one layer from the routing of all training tokens, whose windows are its chunks.

    The fields about guesses and quantized experts are left empty.
    """
    experts, weights, windows = routing.experts, routing.weights, len(routing.chunks)
    tokens = len(experts)
    chosen = experts.reshape(-1)
    counts = np.bincount(chosen, minlength=num_experts)
    mass = np.bincount(chosen, routing.shares.reshape(-1), num_experts)
    energy = np.bincount(chosen, np.square(weights.reshape(-1)), num_experts)
    importance = routing.shares * routing.token_weights[:, None]
    sample = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:WEIGHT_SAMPLE].numpy()
    return LayerStatistics(
        frequency=_rounded(counts / tokens),
        weight_mass=_rounded(mass / mass.sum()),
        weights=weights[sample],
        chunk_importance=_per_window(experts, np.maximum(importance, 1e-12), windows, num_experts),
        chunk_energy=_per_window(experts, np.square(weights), windows, num_experts),
        look_ahead={},
        predictor=np.zeros(0, np.float32),
        weight_energy=_rounded(energy / energy.sum()),
        expert_error={},
        data_free=[],
    )


def _per_window(experts: np.ndarray, values: np.ndarray, windows: int, size: int) -> np.ndarray:
    """Return the sum of `values` [T, k] by expert within each window, float32 [windows, size]."""
    where = np.arange(windows).repeat(experts.size // windows) * size + experts.reshape(-1)
    return np.bincount(where, values.reshape(-1), windows * size).astype(np.float32).reshape(windows, size)


def significant(value: float, digits: int = 4) -> float:
    """Round `value` to `digits` significant digits."""
    return float(f"{value:.{digits}g}")


def _rounded(values: np.ndarray) -> list[float]:
    return [round(value, 6) for value in values.tolist()]
