"""Weights outside the experts: at which bits they are kept, and their place in the bundle.

Where the whole bundle fits the device at 8 bits, dense weights have 8. Where it does not, each
kind of them competes with the experts for memory: a byte taken from it costs the KL that was
measured, and gives what a byte is worth to the experts at the bits that fit the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
import torch

from dymoe_compile.calibration import significant
from dymoe_compile.checkpoint import DTYPES, Checkpoint
from dymoe_compile.progress import Progress
from dymoe_compile.quantize import quantize_matrix
from dymoe_compile.sensitivity import Decoding, Measurer, Original
from dymoe_compile.writer import BundleWriter
from dymoe_runtime.budget import Budget
from dymoe_runtime.bundle import Bundle, dense_kind, dense_kinds, dense_layout, quantized_bits
from dymoe_runtime.dense import BundleDense
from dymoe_runtime.device import AUTO
from dymoe_runtime.policy import TierRule
from dymoe_runtime.spec import ModelSpec
from dymoe_runtime.tiers import RecordLayout, pack_record

MOST_BITS = 8
# Bits tried where memory is short, beside MOST_BITS.
FEWER_BITS = (6, 4)
# Factor between prices of a byte that are tried until the bundle's floor fits the device.
PRICE_STEP = 4.0
PRICES = 32
LEAST_PRICE = 1e-18
STATE = "dense_bits"


@dataclass(frozen=True)
class DenseChoice:
    """Bits of each kind of dense weights, and the KL that was measured for it; nothing where memory decided."""

    bits: Mapping[str, int]
    added_kl: Mapping[str, Mapping[str, float]]  # kind -> bits -> KL above that of MOST_BITS

    @staticmethod
    def alike(spec: ModelSpec, bits: int) -> DenseChoice:
        return DenseChoice(dict.fromkeys(dense_kinds(spec), bits), {})


def known_choice(spec: ModelSpec, bits: int | str, writer: BundleWriter) -> DenseChoice | None:
    """What was asked for, or chosen by an interrupted run; None where it is still to be measured."""
    if bits != AUTO:
        return DenseChoice.alike(spec, int(bits))
    done = writer.load_state(STATE)
    return DenseChoice(**done[1]) if done is not None else None


def keep_choice(choice: DenseChoice, writer: BundleWriter) -> None:
    """Let later runs know what this one chose."""
    writer.save_state(STATE, {}, asdict(choice))


def choose_dense_bits(
    bundle: Bundle,
    checkpoint: Checkpoint,
    held_out: np.ndarray,
    original: Original,
    budget: Budget,
    progress: Progress,
) -> DenseChoice:
    """The bits for a device of `budget`, where `bundle` has MOST_BITS and its experts; windows [n, W]."""
    if budget.arena >= budget.full_arena:
        return DenseChoice.alike(bundle.spec, MOST_BITS)
    spec, ladder = bundle.spec, bundle.manifest.ladder
    kinds = dense_kinds(spec)
    dense = BundleDense(bundle)
    uniform = [Decoding(TierRule.uniform(tier, ladder, spec.num_layers)) for tier in ladder]
    added: dict[str, dict[int, float]] = {}
    with progress("dense bits", spec.num_layers * (1 + len(kinds) * len(FEWER_BITS))) as advance:
        measured = Measurer(bundle, held_out, original, dense).measure(uniform, advance)
        if not math.isfinite(measured[-1].kl):
            # Which layer is at fault is found when each is measured.
            return DenseChoice.alike(spec, MOST_BITS)
        for kind in kinds:
            added[kind] = {MOST_BITS: 0.0}
            for bits in FEWER_BITS:
                coarser = dense.replaced(records_of(checkpoint, kind, bits))
                (result,) = Measurer(bundle, held_out, original, coarser).measure(uniform[-1:], advance)
                added[kind][bits] = max(result.kl - measured[-1].kl, 0.0) if math.isfinite(result.kl) else math.inf
    price = worth_of_a_byte(bundle, [result.kl for result in measured], budget)
    # The floor is in whole MiB.
    chosen = cheapest(added, kind_bytes(spec), price, budget.floor - (budget.memory >> 20 << 20))
    return DenseChoice(chosen, {kind: _shown(row) for kind, row in added.items()})


def worth_of_a_byte(bundle: Bundle, kls: list[float], budget: Budget) -> float:
    """KL that one more byte for experts saves, at the uniform bits that fit the device.

    `kls` of the uniform tiers; between them the logarithm of KL is linear in bits.
    """
    bits = [bundle.layout.bits_per_weight(tier) for tier in bundle.manifest.ladder]
    fitting = min(max(8 * budget.arena / bundle.spec.expert_weights, bits[0]), bits[-1])
    for (b0, k0), (b1, k1) in pairwise(zip(bits, kls, strict=True)):
        if fitting <= b1 and 0 < k1 < k0:
            rate = math.log(k0 / k1) / (b1 - b0)
            return k0 * math.exp(-rate * (fitting - b0)) * rate * 8 / bundle.spec.expert_weights
    return 0.0


def cheapest(
    added: Mapping[str, Mapping[int, float]], nbytes: Mapping[str, Mapping[int, int]], price: float, excess: int
) -> dict[str, int]:
    """Bits of each kind with the least KL + price * bytes; the price rises until `excess` bytes are saved.

    Where no price saves as much, the last one decides.
    """
    chosen: dict[str, int] = {}
    for step in range(PRICES):
        at = max(price, LEAST_PRICE if step else 0.0) * PRICE_STEP**step
        chosen = {kind: _cheapest(row, nbytes[kind], at) for kind, row in added.items()}
        if sum(nbytes[kind][MOST_BITS] - nbytes[kind][bits] for kind, bits in chosen.items()) >= excess:
            break
    return chosen


def _cheapest(added: Mapping[int, float], nbytes: Mapping[int, int], price: float) -> int:
    return min(added, key=lambda bits: (added[bits] + price * nbytes[bits], -bits))


def _shown(added: Mapping[int, float]) -> dict[str, float]:
    """Four digits of what is finite, for JSON; without MOST_BITS, which adds nothing."""
    return {str(bits): significant(kl) for bits, kl in added.items() if bits != MOST_BITS and math.isfinite(kl)}


def kind_bytes(spec: ModelSpec) -> dict[str, dict[int, int]]:
    """Kind -> bits -> bytes of all its matrices."""
    total = {kind: dict.fromkeys((MOST_BITS, *FEWER_BITS), 0) for kind in dense_kinds(spec)}
    for name, shape in spec.each_tensor():
        if kind := dense_kind(name, shape):
            for bits in total[kind]:
                total[kind][bits] += dense_layout(shape, bits).record_bytes
    return total


def records_of(checkpoint: Checkpoint, kind: str, bits: int) -> dict[str, tuple[RecordLayout, np.ndarray]]:
    """Every dense matrix of `kind` at `bits`: name -> (its layout, its record)."""
    shapes = {name: shape for name, shape in checkpoint.spec.each_tensor() if dense_kind(name, shape) == kind}
    return {
        name: (dense_layout(shape, bits), _record(checkpoint.tensor(name), shape, bits))
        for name, shape in shapes.items()
    }


def write_dense(
    checkpoint: Checkpoint, bits: Mapping[str, int], writer: BundleWriter, progress: Progress
) -> dict[str, int]:
    """Quantize and write what is outside the experts, at `bits` of each kind; the checksum of each tensor."""
    done = writer.load_state("dense")
    if done is not None and done[1]["bits"] == bits and writer.dense_is_whole(done[1]["crc32"]):
        return dict(done[1]["crc32"])
    shapes = checkpoint.spec.tensor_shapes()
    stored = {name: _storage(name, shape, bits) for name, shape in shapes.items()}
    with progress("dense weights", len(shapes)) as advance:

        def tensors() -> Iterator[np.ndarray]:
            for name, shape in shapes.items():
                yield _stored(checkpoint.tensor(name), name, shape, bits)
                advance()

        checksums = writer.write_dense(stored, tensors())
    writer.save_state("dense", {}, {"bits": dict(bits), "crc32": checksums})
    return checksums


def _storage(name: str, shape: tuple[int, ...], bits: Mapping[str, int]) -> tuple[str, tuple[int, ...]]:
    if mine := quantized_bits(name, shape, bits):
        return "U8", (dense_layout(shape, mine).record_bytes,)
    return ("BF16" if dense_kind(name, shape) else "F32"), shape


def _stored(tensor: torch.Tensor, name: str, shape: tuple[int, ...], bits: Mapping[str, int]) -> np.ndarray:
    """The bytes of a tensor as it is stored."""
    if mine := quantized_bits(name, shape, bits):
        return _record(tensor, shape, mine)
    dtype = DTYPES[_storage(name, shape, bits)[0]]
    return tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy()


def _record(tensor: torch.Tensor, shape: tuple[int, ...], bits: int) -> np.ndarray:
    return pack_record(dense_layout(shape, bits), {"weight": quantize_matrix(tensor, (bits,))})
