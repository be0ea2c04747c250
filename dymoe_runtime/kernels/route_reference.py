"""The choice of experts in NumPy, the reference for the compiled kernels."""

from __future__ import annotations

import numpy as np

from dymoe_runtime.spec import RouterSpec


def choose_experts(
    logits: np.ndarray, router: RouterSpec, select: np.ndarray | None, scale: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (experts, weights), int64 and float32 [T, k], as `Kernels.route` does."""
    if logits.shape[-1] != router.experts or not 1 <= router.top_k <= router.experts:
        raise ValueError(f"logits: expected {router.experts} columns, of which 1 or more are chosen")
    if router.softcap:
        logits = np.tanh(logits / np.float32(router.softcap)) * np.float32(router.softcap)
    with np.errstate(over="ignore", invalid="ignore"):
        scores = _scores(logits, router.score)
        # Without anything to add, logits choose: sigmoids of large logits would be equal.
        plain = select is None and router.groups == 1
        wanted = logits if plain and router.score == "sigmoid" else scores if select is None else scores + select
        if router.groups > 1:
            wanted = _of_best_groups(wanted, router)
        experts = np.argsort(-wanted, axis=-1, kind="stable")[:, : router.top_k].astype(np.int64)
        weights = np.take_along_axis(scores, experts, axis=-1)
        if router.score == "softmax_of_chosen":
            weights = softmax(weights)
        if router.score == "sparsemixer":
            weights = _masked_shares(logits, experts, np.float32(router.threshold))
        if router.normalize:
            total = weights.sum(axis=-1, keepdims=True) + np.float32(router.eps)
            weights = weights / np.maximum(total, np.float32(router.least_sum))
        if router.scale != 1:
            weights = weights * np.float32(router.scale)
        if scale is not None:
            weights = weights * scale[experts]
    order = np.argsort(-weights, axis=-1, kind="stable")
    experts, weights = np.take_along_axis(experts, order, -1), np.take_along_axis(weights, order, -1)
    broken = ~np.isfinite(logits).all(axis=-1)
    experts[broken], weights[broken] = np.arange(router.top_k), np.nan
    return experts, weights


def softmax(x: np.ndarray) -> np.ndarray:
    """Return the softmax over the last dimension."""
    shifted = np.exp(x - x.max(axis=-1, keepdims=True))
    shares: np.ndarray = shifted / shifted.sum(axis=-1, keepdims=True)
    return shares


def _scores(logits: np.ndarray, score: str) -> np.ndarray:
    if score == "softmax":
        return softmax(logits)
    if score == "sigmoid":
        y: np.ndarray = 1 / (1 + np.exp(-logits))
        return y
    return logits


def _masked_shares(logits: np.ndarray, experts: np.ndarray, threshold: np.floating) -> np.ndarray:
    """Return the weights [T, k] of sparsemixer for logits [T, experts] and the experts chosen, [T, k]."""
    left = logits.copy()  # -inf for the experts that were chosen before
    weights = np.empty(experts.shape, np.float32)
    for rank in range(experts.shape[1]):
        chosen = experts[:, rank : rank + 1]
        most = np.take_along_axis(logits, chosen, axis=-1)
        far = (most - logits) / np.maximum(np.abs(logits), most) > threshold
        weights[:, rank] = 1 / np.where(far, 0, np.exp(left - most)).sum(axis=-1)
        np.put_along_axis(left, chosen, -np.inf, axis=-1)
    return weights


def _of_best_groups(wanted: np.ndarray, router: RouterSpec) -> np.ndarray:
    """Return `wanted` [T, experts] with -inf outside the `top_groups` best groups."""
    groups = wanted.reshape(len(wanted), router.groups, -1)
    counted = 1 if router.group_score == "max" else 2
    rank = np.sort(groups, axis=-1)[..., -counted:].sum(axis=-1)
    best = np.argsort(-rank, axis=-1, kind="stable")[:, : router.top_groups]
    kept = np.zeros(rank.shape, bool)
    np.put_along_axis(kept, best, True, axis=-1)
    return np.where(kept[..., None], groups, -np.inf).reshape(wanted.shape)
