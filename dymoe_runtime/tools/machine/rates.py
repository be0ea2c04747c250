"""The rates of a machine, and how fast a model of a certain shape runs with them.

Every product of a token streams its weights from memory once. So a token takes the bytes of its weights at the
bandwidth of memory or, where arithmetic is slower than that, their number at the rate of the threads, which depends on
the bits of the weights; a fixed time for each layer and each expert; and the time to wait for experts that are not in
memory. A prompt multiplies each weight with many tokens, at a rate of its own, and reads each expert that one of its
tokens uses; each of its tokens takes a fixed time for each layer and each expert, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dymoe_runtime.bundle.bundle import Bundle, stored_as
from dymoe_runtime.bundle.contents import stored_bytes
from dymoe_runtime.bundle.tiers import RecordLayout
from dymoe_runtime.engine.budget import CHUNK
from dymoe_runtime.spec import ModelSpec

# Share of its experts that a token has in common with an unrelated one. It is 1 / experts * top_k where all experts
# are used alike.
OVERLAP = 0.43
# Largest share of tokens that use the same expert.
MOST_POPULAR = 0.9


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second; `threads` compute, and disk reads are of whole experts at random."""

    threads: int
    memory_bytes_per_s: float  # of weights that products stream, all threads together
    decode_weights_per_s: Mapping[int, float]  # of one thread, each weight with one token; by the bits of the weights
    prompt_weights_per_s: Mapping[int, float]  # of one thread, likewise with each of many tokens
    layer_s: float  # of a decoded token in a layer, beside the products
    disk_bytes_per_s: float
    disk_latency_s: float  # of a read, beside its bytes; with as many in flight as a run has
    expert_s: float = 0.0  # of a decoded token in an expert, beside the products
    prompt_layer_s: float = 0.0  # of each token of a prompt in a layer, beside the products
    prompt_expert_s: float = 0.0  # of each token of a prompt in an expert, beside the products

    def products_s(self, nbytes: float, weights: float, bits: float | None = None) -> float:
        """Return the seconds in which one token is multiplied with `weights` that take `nbytes`.

        `bits` is the mean tier of an expert's weights. None is for dense weights, which are not built up of tiers: they
        take the time of the lowest one.
        """
        by_bits = self.decode_weights_per_s
        weight_s = _weight_s(by_bits, min(by_bits) if bits is None else bits)
        return max(nbytes / self.memory_bytes_per_s, weights * weight_s / self.threads)

    def prompt_s(self, nbytes: float, products: Mapping[float, float]) -> float:
        """Return the seconds of products of a weight and a token, given by bits, with weights that take `nbytes`."""
        compute_s = sum(count * _weight_s(self.prompt_weights_per_s, bits) for bits, count in products.items())
        return max(nbytes / self.memory_bytes_per_s, compute_s / self.threads)

    def read_s(self, nbytes: float, reads: float) -> float:
        """Return the seconds in which so many reads bring `nbytes` from the disk."""
        return nbytes / self.disk_bytes_per_s + reads * self.disk_latency_s


def _weight_s(rates: Mapping[int, float], bits: float) -> float:
    """Return the seconds of a thread for a weight of `bits`; between known rates, seconds are interpolated."""
    known = sorted(rates)
    return float(np.interp(bits, known, [1 / rates[each] for each in known]))


@dataclass(frozen=True)
class Prediction:
    """How fast a model should run at some mean bits of its experts."""

    token_s: float
    first_token_s: float  # of a prompt, with no expert in memory at first
    resident_share: float  # of the uses of experts, that find them in memory


@dataclass(frozen=True)
class Work:
    """What a bundle's tokens take, but for the machine: bytes and numbers of weights outside the routed experts.

    Every weight of `token` meets each decoded token, every weight of `prompt` each token of a prompt.
    """

    spec: ModelSpec
    layout: RecordLayout
    token: tuple[int, int]  # bytes, weights
    prompt: tuple[int, int]
    popular: Sequence[float]  # share of tokens that use each expert of a layer, falling

    @staticmethod
    def of(bundle: Bundle) -> Work:
        """Return the work of a bundle, planned or made, with the usual popularity of experts."""
        spec, token, prompt = bundle.spec, (0, 0), (0, 0)
        for name, shape in spec.each_tensor():
            if name == "embed" and not spec.tie_embeddings:
                continue  # one row of it is used
            nbytes, weights = stored_bytes(stored_as(name, shape, bundle.manifest.dense_bits)), math.prod(shape)
            token = token[0] + nbytes, token[1] + weights
            if name.startswith("layers.") and len(shape) == 2:
                prompt = prompt[0] + nbytes, prompt[1] + weights
        return Work(spec, bundle.layout, token, prompt, popularity(spec.num_experts, spec.top_k))

    def predict(self, rates: Rates, bits: float, arena_bytes: int, prompt_tokens: int) -> Prediction:
        """Return the prediction for experts with `bits` in the mean, and `arena_bytes` of memory for them."""
        size = mean_bytes(self.layout, bits)
        resident = resident_share(self.popular, arena_bytes / size / len(self.spec.moe_layers))
        rest_s = rates.products_s(*self.token) + self.spec.num_layers * rates.layer_s
        token_s = rest_s + self._experts_s(rates, bits, resident)
        return Prediction(token_s, rest_s + self._prompt_s(rates, bits, prompt_tokens), resident)

    def _experts_s(self, rates: Rates, bits: float, resident: float) -> float:
        """Return the seconds of a decoded token in its experts, of `bits` each."""
        size = mean_bytes(self.layout, bits)
        compute_s = rates.products_s(size, self.layout.weights, bits) + rates.expert_s
        wait_s = waiting_seconds(self.spec.top_k, 1 - resident, rates.read_s(size, 1), compute_s)
        return len(self.spec.moe_layers) * (self.spec.top_k * compute_s + wait_s)

    def _prompt_s(self, rates: Rates, bits: float, tokens: int) -> float:
        """Return the seconds of a prompt in its layers; reading the experts that it uses overlaps with computing."""
        moe, size = len(self.spec.moe_layers), mean_bytes(self.layout, bits)
        beside_s = tokens * (
            self.spec.num_layers * rates.prompt_layer_s + moe * self.spec.top_k * rates.prompt_expert_s
        )
        used = moe * sum(1 - (1 - share) ** tokens for share in self.popular)
        products = {8 * self.prompt[0] / self.prompt[1]: float(tokens * self.prompt[1])}
        products[bits] = products.get(bits, 0.0) + tokens * moe * self.spec.top_k * self.layout.weights
        compute_s = rates.prompt_s(-(-tokens // CHUNK) * (self.prompt[0] + used * size), products)
        return max(beside_s + compute_s, rates.read_s(used * size, used))


def mean_bytes(layout: RecordLayout, bits: float) -> float:
    """Return the mean bytes of a record's prefix where experts get `bits` in the mean, from the tiers around it."""
    return float(np.interp(bits, layout.ladder, [layout.prefix_bytes(tier) for tier in layout.ladder]))


def waiting_seconds(experts: int, missed: float, read_s: float, compute_s: float) -> float:
    """Return the expected seconds that a layer waits for missing experts while the others are computed.

    Each of the `experts` of a token is missing with probability `missed`. One expert takes `read_s` to read and
    `compute_s` to compute.
    """
    return sum(
        math.comb(experts, n)
        * missed**n
        * (1 - missed) ** (experts - n)
        * max(0.0, n * read_s - (experts - n) * compute_s)
        for n in range(1, experts + 1)
    )


def resident_share(popular: Sequence[float], kept: float) -> float:
    """Return the share of uses that find their expert in memory if the `kept` experts used most of a layer are there.

    `popular` are the shares of tokens that use each expert of a layer, falling. `kept` need not be whole.
    """
    summed = np.concatenate([[0.0], np.cumsum(popular)])
    return float(np.interp(kept, np.arange(len(summed)), summed) / summed[-1])


def popularity(experts: int, top_k: int, overlap: float = OVERLAP) -> list[float]:
    """Return the assumed shares of tokens that use each expert of a layer, falling.

    The shares are min(MOST_POPULAR, c r**-s) of rank r and sum up to `top_k`. Two unrelated tokens have `overlap` of
    their experts in common, or the least that is possible.
    """
    ranks, most = np.arange(1, experts + 1, dtype=np.float64), max(MOST_POPULAR, top_k / experts)

    def shares(slope: float) -> np.ndarray:
        low, high = 0.0, float(top_k) * experts**slope
        for _ in range(60):
            scale = (low + high) / 2
            found = np.minimum(most, scale * ranks**-slope)
            low, high = (scale, high) if found.sum() < top_k else (low, scale)
        return np.asarray(found * (top_k / found.sum()))

    low, high = 0.0, 3.0
    for _ in range(40):
        slope = (low + high) / 2
        low, high = (slope, high) if (shares(slope) ** 2).sum() / top_k < overlap else (low, slope)
    return [float(share) for share in shares((low + high) / 2)]
