"""The gated delta rule in NumPy, the reference for the compiled kernels."""

from __future__ import annotations

import math

import numpy as np

from dymoe_runtime.kernels.prepared import DeltaArrays, DeltaWeights
from dymoe_runtime.spec import GatedDeltaSpec

# Added to the sum of squares of queries and keys.
EPS = np.float32(1e-6)


def gated_delta(
    spec: GatedDeltaSpec, mixed: np.ndarray, rates: np.ndarray, weights: DeltaWeights, state: DeltaArrays
) -> np.ndarray:
    """Return y [T, values] and update `state`, as `Kernels.gated_delta` does, one token after another."""
    tokens, keys = len(mixed), spec.keys
    if mixed.shape[1] != spec.channels or rates.shape != (tokens, 2 * spec.value_heads):
        raise ValueError(f"mixed: expected {spec.channels} columns, and 2 rates for each of {spec.value_heads} heads")
    turned = _convolved(mixed, weights.conv, state.tail)
    q, k = (turned[:, at : at + keys].reshape(tokens, spec.key_heads, spec.key_dim) for at in (0, keys))
    v = turned[:, 2 * keys :].reshape(tokens, spec.value_heads, spec.value_dim)
    share = spec.value_heads // spec.key_heads
    q, k = (_unit(x).repeat(share, axis=1) for x in (q, k))
    q = q * np.float32(1 / math.sqrt(spec.key_dim))
    update, decay = rates[:, : spec.value_heads], rates[:, spec.value_heads :]
    with np.errstate(over="ignore"):
        beta = 1 / (1 + np.exp(-update))
        fading = np.exp(-np.exp(weights.a_log) * np.logaddexp(0, decay + weights.dt_bias).astype(np.float32))
    y = np.empty(v.shape, np.float32)
    memory = state.memory
    for t in range(tokens):
        memory *= fading[t, :, None, None]
        change = beta[t, :, None] * (v[t] - np.einsum("hk,hkv->hv", k[t], memory))
        memory += k[t, :, :, None] * change[:, None, :]
        y[t] = np.einsum("hk,hkv->hv", q[t], memory)
    return y.reshape(tokens, spec.values)


def _convolved(mixed: np.ndarray, conv: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """Return silu of the causal convolution of mixed [T, channels], and keep its last inputs in `tail`."""
    taps, tokens = conv.shape[1], len(mixed)
    seen = np.concatenate([tail, mixed])
    y = np.zeros(mixed.shape, np.float32)
    for tap in range(taps):
        y += seen[tap : tap + tokens] * conv[:, tap]
    tail[:] = seen[len(seen) - len(tail) :]
    with np.errstate(over="ignore"):
        turned: np.ndarray = y / (1 + np.exp(-y))
    return turned


def _unit(x: np.ndarray) -> np.ndarray:
    """Return x [.., n] divided by its length."""
    y: np.ndarray = x / np.sqrt(np.square(x).sum(-1, keepdims=True) + EPS)
    return y
