"""What the tests of reports share: findings of imagined models."""

from __future__ import annotations

import math
import random
from typing import Any

KINDS = ("mixed", "uniform", "static", "cosine", "flat")


def point(rng: random.Random, name: str, kind: str) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "bits_mean": round(rng.uniform(2, 4), 4),
        "effective_bits": round(rng.uniform(2, 4.3), 4),
        "bytes_per_token": rng.randrange(10**6, 10**9),
        "kl": float(f"{math.exp(rng.uniform(-8, 0)):.4g}"),
        "nll": round(rng.uniform(1, 3), 5),
        "top1_agreement": round(rng.uniform(0.5, 1), 4),
        "prefill_kl": rng.choice([None, 0.0123]),
        "kl_interval": rng.choice([None, [0.0012, 0.0123]]),
    }


def example(context: str, points: list[str], differs: bool) -> dict[str, Any]:
    """An example whose first point takes another token than the original if it `differs`."""
    right = {"token": " right", "probability": 0.625, "of_original": 0.625, "same": True}
    wrong = {"token": "\n", "probability": 0.5, "of_original": 0.25, "same": False}
    return {
        "differs": differs,
        "context": context,
        "follows": " text",
        "original": right,
        "points": {name: wrong if differs and i == 0 else right for i, name in enumerate(points)},
    }


def layer(rng: random.Random, index: int, experts: int, ladder: list[int], dense: bool) -> dict[str, Any]:
    if dense:
        empty = {"sensitivity": {}, "router_overlap": {}, "expert_error": {}, "pinned": [], "data_free": []}
        guesses = {"router": [], "linear": [], "two_ahead": [], "used": "none"}
        return {"layer": index, "dense": True, "frequency": [], "gate_mass": [], **empty, "look_ahead": guesses}
    mass = [rng.random() ** 3 for _ in range(experts)]
    return {
        "layer": index,
        "dense": False,
        "frequency": [rng.random() for _ in range(experts)],
        "gate_mass": [value / sum(mass) for value in mass],
        "sensitivity": {str(t): 0.02 * 4.0 ** (2 - t) * rng.uniform(0.5, 2) for t in ladder},
        "router_overlap": {str(t): 1 - 0.1 * 4.0 ** (2 - t) * rng.random() for t in ladder},
        "expert_error": {str(t): [2.0 ** (1 - t) * rng.uniform(0.5, 1) for _ in range(experts)] for t in ladder},
        "pinned": [0] if index % 2 else [],
        "data_free": [experts - 1],
        "look_ahead": {
            "router": [0.9, 0.8],
            "linear": [0.95, 0.9],
            "two_ahead": [0.7, 0.5],
            "used": "linear",
        },
    }


def findings(layers: int = 6, experts: int = 8, dense: tuple[int, ...] = (0,), seed: int = 0) -> dict[str, Any]:
    rng, ladder = random.Random(seed), [2, 3, 4]
    emitted = [point(rng, f"uniform-{t}", "uniform") for t in ladder] + [point(rng, "2.75", "mixed")]
    for p, nbytes in zip(emitted, sorted(p["bytes_per_token"] for p in emitted), strict=True):
        p["bytes_per_token"] = nbytes  # as the compiler writes them
    return {
        "version": 2,
        "model": {
            "name": "small",
            "family": "olmoe",
            "num_layers": layers,
            "num_experts": experts,
            "top_k": min(2, experts),
            "hidden_size": 64,
            "expert_width": 32,
        },
        "ladder": ladder,
        "storage": {
            "bits_per_weight": {"2": 2.13, "3": 3.19, "4": 4.25},
            "expert_bytes": 123456789,
            "dense_bytes": 2345678901,
            "dense_bytes_per_token": 1345678901,
            "bundle_bytes": 2469135690,
            "original_bytes": 6469135690,
            "dense_bits": {"attn": 8, "embed": 16, "lm_head": 8},
            "dense_kl": {"attn": {"6": 0.00123, "4": 0.0456}},
        },
        "memory": {
            "context": 512,
            "floor_bytes": 2500 << 20,
            "arena_bytes_at_floor": 8 << 20,
            "full_arena_bytes": 120 << 20,
        },
        "quantizer": {"method": "coordinate descent", "block": 64, "steps": "ratio 3", "sweeps": 4, "nested": True},
        "layers": [layer(rng, i, experts, ladder, i in dense) for i in range(layers)],
        "points": emitted,
        "default_point": "2.75",
        "compared": [emitted[-1], *(point(rng, f"{kind} {i}", kind) for kind in KINDS for i in range(3))],
        "peers": [{"name": "llama.cpp Q2_K", "effective_bits": 2.9, "kl": 0.04}],
        "notes": ["importance is flat"],
        "provenance": {"tokens": 4096, "source": {"sha256": "ab" * 32, "revision": None}, "texts": ["a", "b"]},
        "reference_nll": 1.23456,
        "measured_tokens": 4096,
        "examples": {
            "places": 64,
            "agreed": {p["name"]: 50 + i for i, p in enumerate(emitted)},
            "shown": [example(f"context {i}", [p["name"] for p in emitted], i > 1) for i in range(4)],
        },
    }


def tortured(value: Any, rng: random.Random) -> Any:
    """The same structure with some of its texts, fractions and lists spoilt; counts and ids are kept."""
    if isinstance(value, dict):
        return {key: tortured(item, rng) for key, item in value.items()}
    if not isinstance(value, int) and rng.random() < 0.15:
        return None if not isinstance(value, list) else []
    if isinstance(value, list):
        return [tortured(item, rng) for item in value if item is not None]
    if isinstance(value, float) and rng.random() < 0.5:
        return rng.choice([math.nan, math.inf, -math.inf, 0.0, -1.0, 5e-324, 1e308, 1.0, 1 + 1e-15])
    return value


def strings_replaced(value: Any, text: str) -> Any:
    if isinstance(value, dict):
        return {key: strings_replaced(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [strings_replaced(item, text) for item in value]
    return text if isinstance(value, str) else value
