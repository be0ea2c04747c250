"""Dense weights, that is, the weights outside the routed experts: choosing their bits, and writing them.

Each kind of dense weights competes with the experts for speed, because every token reads both. If the experts do not
all fit the device next to dense weights of 8 bits, it also competes for memory. Fewer bits for a kind cost the KL that
was measured. Each byte that a token need not read is worth the KL that one more byte a token saves the experts, below
the highest tier. Each byte of memory is worth the KL that one more byte saves the experts, at the mean bits that fit
the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
import torch

from dymoe_compile.calibrate.statistics import significant
from dymoe_compile.checkpoint.checkpoint import DTYPES, Checkpoint
from dymoe_compile.checkpoint.window_decoder import window_decoder
from dymoe_compile.job.profile import AUTO
from dymoe_compile.job.progress import Progress
from dymoe_compile.job.writer import BundleWriter
from dymoe_compile.plan.sizes import FEWER_BITS, MAX_BITS, alike
from dymoe_compile.plan.work import active_weights
from dymoe_compile.policy.sensitivity import Decoding, Measurement, Measurer, Original
from dymoe_compile.quantize import load_descent
from dymoe_compile.quantize.descent import DescentKernels
from dymoe_compile.quantize.quantize import quantize_matrix
from dymoe_runtime.bundle.bundle import Bundle, dense_kind, dense_kinds, dense_layout, quantized_bits, stored_as
from dymoe_runtime.bundle.tiers import RecordLayout, pack_record
from dymoe_runtime.engine.budget import Budget
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.mixer import Dense
from dymoe_runtime.model.tier_rule import TierRule
from dymoe_runtime.model.weights import BundleDense
from dymoe_runtime.spec import ModelSpec

# Factor from one price of a byte to the next; prices rise until the bundle's floor fits the device.
PRICE_STEP = 4.0
PRICES = 32
MIN_PRICE = 1e-18
# What a bit between the highest two tiers saves where tiers are chosen for each token, over what it saves where all
# experts have one tier. On the reference model of benchmarks/quality/RESULTS.md: 0.0014 over 0.0051 nats.
CHOSEN_TIERS = 0.27
STATE = "dense_bits"


@dataclass(frozen=True)
class DenseChoice:
    """Bits of each kind of dense weights; `added_kl` is empty unless measured KL decided."""

    bits: Mapping[str, int]
    added_kl: Mapping[str, Mapping[str, float]]  # kind -> bits -> KL above that of MAX_BITS

    @staticmethod
    def alike(spec: ModelSpec, bits: int) -> DenseChoice:
        """Return the choice of `bits` for every kind."""
        return DenseChoice(alike(spec, bits), {})


def known_choice(spec: ModelSpec, bits: int | str, writer: BundleWriter) -> DenseChoice | None:
    """Return the choice given by `bits` or made by an interrupted run, or None if it is still to be measured."""
    if bits != AUTO:
        return DenseChoice.alike(spec, int(bits))
    done = writer.load_state(STATE)
    return DenseChoice(**done[1]) if done is not None else None


def keep_choice(choice: DenseChoice, writer: BundleWriter) -> None:
    """Save the choice for a later run."""
    writer.save_state(STATE, {}, asdict(choice))


def choose_dense_bits(
    bundle: Bundle,
    checkpoint: Checkpoint,
    held_out: np.ndarray,
    original: Original,
    budget: Budget,
    kernels: Kernels,
    progress: Progress,
) -> DenseChoice:
    """Return the bits of each kind of dense weights for a device with `budget`.

    `bundle` has its experts, and dense weights at MAX_BITS. held_out is windows [n, W].
    """
    spec, ladder = bundle.spec, bundle.manifest.ladder
    all_fit = budget.arena_bytes >= budget.full_arena_bytes
    if all_fit and len(ladder) == 1:  # nothing tells what a byte is worth
        return DenseChoice.alike(spec, MAX_BITS)
    kinds, descent = dense_kinds(spec), load_descent(kernels)
    dense = BundleDense(bundle, kernels)
    uniform = [Decoding(TierRule.uniform(tier, ladder, spec.num_layers)) for tier in ladder]
    added: dict[str, dict[int, float]] = {}
    with progress("dense bits", spec.num_layers * (1 + len(kinds) * len(FEWER_BITS))) as advance:

        def measure(weights: Dense, rules: list[Decoding]) -> list[Measurement]:
            decoder = window_decoder(spec, weights, kernels)
            return Measurer(bundle, held_out, original, decoder, kernels).measure(rules, advance)

        measured = measure(dense, uniform)
        if not math.isfinite(measured[-1].kl):
            # The later measurement of sensitivity names the layer at fault.
            return DenseChoice.alike(spec, MAX_BITS)
        for kind in kinds:
            added[kind] = {MAX_BITS: 0.0}
            for bits in FEWER_BITS:
                coarser = ReplacedDense(dense, records_of(checkpoint, kind, bits, descent), kernels)
                (result,) = measure(coarser, uniform[-1:])
                added[kind][bits] = max(result.kl - measured[-1].kl, 0.0) if math.isfinite(result.kl) else math.inf
    kls = [result.kl for result in measured]
    sizes = [bundle.layout.bits_per_weight(tier) for tier in ladder]
    fitting = min(max(8 * budget.arena_bytes / spec.expert_weights, sizes[0]), sizes[-1])
    held = 0.0 if all_fit else kl_per_bit(sizes, kls, fitting) * 8 / spec.expert_weights
    read = CHOSEN_TIERS * kl_of_last_bits(sizes, kls) * 8 / active_weights(spec)
    nbytes = kind_bytes(spec)
    costs = {
        kind: {b: kl + (read * nbytes[kind][b] if is_read(spec, kind) else 0.0) for b, kl in row.items()}
        for kind, row in added.items()
    }
    # The floor is in whole MiB, so round the memory down to whole MiB too.
    chosen = cheapest(costs, nbytes, held, budget.floor_bytes - (budget.memory_bytes >> 20 << 20))
    return DenseChoice(chosen, {kind: _shown(row) for kind, row in added.items()})


def kl_per_bit(bits: Sequence[float], kls: Sequence[float], at: float) -> float:
    """Return the KL that one more bit for each expert weight saves, at mean bits `at`.

    `kls` has the KL for each of `bits`, with all experts at that tier. Between tiers the logarithm of KL is taken as
    linear in bits. Where KL does not fall, the next tiers count; returns 0 if it falls at none.
    """
    for (b0, k0), (b1, k1) in pairwise(zip(bits, kls, strict=True)):
        if at <= b1 and 0 < k1 < k0 < math.inf:
            rate = math.log(k0 / k1) / (b1 - b0)
            return k0 * math.exp(-rate * (at - b0)) * rate
    return 0.0


def kl_of_last_bits(bits: Sequence[float], kls: Sequence[float]) -> float:
    """Return the KL that a bit between the highest two of `bits` saves, or 0 if there is one, or KL does not fall."""
    if len(bits) < 2 or not kls[-1] < kls[-2] < math.inf:
        return 0.0
    return (kls[-2] - kls[-1]) / (bits[-1] - bits[-2])


def cheapest(
    costs: Mapping[str, Mapping[int, float]], nbytes: Mapping[str, Mapping[int, int]], price: float, excess: int
) -> dict[str, int]:
    """Return the bits of each kind with the least cost + price * bytes; a cost is KL, as is the price of a byte.

    The price rises until `excess` bytes are saved. If no price saves that much, the last one decides.
    """
    chosen: dict[str, int] = {}
    for step in range(PRICES):
        at = max(price, MIN_PRICE if step else 0.0) * PRICE_STEP**step
        chosen = {kind: _cheapest(row, nbytes[kind], at) for kind, row in costs.items()}
        if sum(nbytes[kind][MAX_BITS] - nbytes[kind][bits] for kind, bits in chosen.items()) >= excess:
            break
    return chosen


def _cheapest(cost: Mapping[int, float], nbytes: Mapping[int, int], price: float) -> int:
    return min(cost, key=lambda bits: (cost[bits] + price * nbytes[bits], -bits))


def _shown(added: Mapping[int, float]) -> dict[str, float]:
    """Return the finite values in four digits, for JSON, without MAX_BITS, which adds nothing."""
    return {str(bits): significant(kl) for bits, kl in added.items() if bits != MAX_BITS and math.isfinite(kl)}


def kind_bytes(spec: ModelSpec) -> dict[str, dict[int, int]]:
    """Return kind -> bits -> bytes of all matrices of that kind."""
    total = {kind: dict.fromkeys((MAX_BITS, *FEWER_BITS), 0) for kind in dense_kinds(spec)}
    for name, shape in spec.each_tensor():
        if kind := dense_kind(name, shape):
            for bits in total[kind]:
                total[kind][bits] += dense_layout(shape, bits).record_bytes
    return total


def is_read(spec: ModelSpec, kind: str) -> bool:
    """Return whether a token reads all matrices of a kind: not a table of embeddings, unless the head has it too."""
    return kind != "embed" or spec.tie_embeddings


def records_of(
    checkpoint: Checkpoint, kind: str, bits: int, descent: DescentKernels
) -> dict[str, tuple[RecordLayout, np.ndarray]]:
    """Return name -> (layout, record) of every dense matrix of `kind`, quantized to `bits`."""
    shapes = {name: shape for name, shape in checkpoint.spec.each_tensor() if dense_kind(name, shape) == kind}
    return {
        name: (dense_layout(shape, bits), _record(checkpoint.tensor(name), shape, bits, descent))
        for name, shape in shapes.items()
    }


class ReplacedDense:
    """`Dense` weights of a bundle with some matrices replaced: `records` is name -> (layout, record)."""

    pause = None

    def __init__(
        self, dense: BundleDense, records: Mapping[str, tuple[RecordLayout, np.ndarray]], kernels: Kernels
    ) -> None:
        self._dense, self._records, self._kernels = dense, records, kernels
        self.vector = dense.vector

    def embed(self, ids: np.ndarray) -> np.ndarray:
        if "embed" not in self._records:
            return self._dense.embed(ids)
        layout, record = self._records["embed"]
        return self._kernels.embed(layout, layout.ladder[0], [record], ids)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        if name not in self._records:
            return self._dense.linear(name, x)
        layout, record = self._records[name]
        y, bias = self._kernels.linear(layout, layout.ladder[0], [record], x), self._dense.optional(f"{name}_bias")
        return y if bias is None else y + bias


def write_dense(
    checkpoint: Checkpoint, bits: Mapping[str, int], writer: BundleWriter, kernels: Kernels, progress: Progress
) -> dict[str, int]:
    """Quantize and write the dense weights, each kind at its `bits`, unless an earlier run has done so.

    Returns the checksum of each tensor.
    """
    done = writer.load_state("dense")
    if done is not None and done[1]["bits"] == bits and writer.dense_is_whole(done[1]["crc32"]):
        return dict(done[1]["crc32"])
    shapes = checkpoint.spec.tensor_shapes()
    descent = load_descent(kernels)
    stored = {name: stored_as(name, shape, bits) for name, shape in shapes.items()}
    with progress("dense weights", len(shapes)) as advance:

        def tensors() -> Iterator[np.ndarray]:
            for name, shape in shapes.items():
                yield _stored(checkpoint.tensor(name), name, shape, bits, descent)
                advance()

        checksums = writer.write_dense(stored, tensors())
    writer.save_state("dense", {}, {"bits": dict(bits), "crc32": checksums})
    return checksums


def _stored(
    tensor: torch.Tensor, name: str, shape: tuple[int, ...], bits: Mapping[str, int], descent: DescentKernels
) -> np.ndarray:
    """Return the bytes of a tensor as stored."""
    if mine := quantized_bits(name, shape, bits):
        return _record(tensor, shape, mine, descent)
    dtype = DTYPES[stored_as(name, shape, bits)[0]]
    return tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy()


def _record(tensor: torch.Tensor, shape: tuple[int, ...], bits: int, descent: DescentKernels) -> np.ndarray:
    return pack_record(dense_layout(shape, bits), {"weight": quantize_matrix(tensor, (bits,), descent)})
