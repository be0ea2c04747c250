"""A type for each matrix of a model, so that llama.cpp's quantizers lose the least for a size.

The bundle says how much KL each layer adds with its experts at the lowest tier, and with what error of the experts. So
it says what KL a squared error in the residual stream of that layer makes. A pass of text says what error each matrix
adds there if it is rounded (`observed.py`), and `types.py` by what factor that of each type differs. So each matrix has
a cost in KL for each type, and bytes go where they lower the cost most (`policy/allocate.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dymoe_compile.export.gguf.architectures import Architecture
from dymoe_compile.export.gguf.observed import Observed
from dymoe_compile.export.gguf.tensors import NAMES, expert_name, gguf_name
from dymoe_compile.export.gguf.types import WeightType, types_for
from dymoe_compile.policy.allocate import Choice, lower_hull, solve
from dymoe_runtime.bundle.bundle import Bundle, dense_kind
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ModelSpec
from dymoe_runtime.units import format_size

# The weight of a layer's own sensitivity; the rest is that of the mean of all layers. See `candidates.tempered`.
TEMPER = 0.5


@dataclass(frozen=True)
class Matrix:
    """A matrix to choose a type for: its name in GGUF, its weights, the types that it may have, and the KL of each."""

    name: str
    weights: int
    costs: Mapping[WeightType, float]

    def nbytes(self, of_type: WeightType) -> int:
        """Return the bytes of the matrix in a type."""
        return round(self.weights * of_type.bits / 8)


@dataclass(frozen=True)
class Recipe:
    """A type for each matrix, and the KL that the costs add up to."""

    types: Mapping[str, WeightType]
    kl: float

    def to_text(self) -> str:
        """Return the content of a file for `llama-quantize --tensor-type-file`."""
        lines = (f"^{name.replace('.', chr(92) + '.')}$={of_type.name}" for name, of_type in self.types.items())
        return "\n".join(lines) + "\n"


def matrices_of(bundle: Bundle, observed: Observed, architecture: Architecture) -> Iterator[Matrix]:
    """Yield the matrices that llama-quantize quantizes, with the cost of each type."""
    spec = bundle.spec
    worth = worth_of_error(bundle, observed)
    for name, shape in spec.each_tensor():
        if dense_kind(name, shape) is None:
            continue
        types = types_for(shape[1], name in observed.inputs)
        costs = _costs(_dense_cost(name, spec, observed, worth), types, observed.noise[_noise_key(name, spec)])
        yield Matrix(gguf_name(name, architecture), math.prod(shape), costs)
    if spec.tie_embeddings and architecture.own_head:
        types = types_for(spec.hidden_size, has_importance=False)
        costs = _costs(observed.errors["head"], types, observed.noise["head"])
        yield Matrix(NAMES["lm_head"], spec.vocab_size * spec.hidden_size, costs)
    for layer in spec.moe_layers:
        for matrix, (rows, cols) in spec.expert_shapes.items():
            key = f"{layer}.{matrix}"
            costs = _costs(observed.errors[key] * worth[layer], types_for(cols), observed.noise[key])
            yield Matrix(expert_name(layer, matrix), spec.num_experts * rows * cols, costs)


def solve_recipe(matrices: Sequence[Matrix], nbytes: int) -> Recipe:
    """Return the types of least cost that take at most `nbytes`; raise DymoeError if none do."""
    hulls = [
        lower_hull([Choice((at,), matrix.nbytes(of), cost) for at, (of, cost) in enumerate(matrix.costs.items())])
        for matrix in matrices
    ]
    least = sum(hull[0].bits for hull in hulls)
    if least > nbytes:
        raise DymoeError(
            f"the matrices take at least {format_size(math.ceil(least))}, and {format_size(max(nbytes, 0))} are left "
            "for them; give more --size or --bits"
        )
    solved = solve(hulls, nbytes / len(hulls))
    chosen = {
        matrix.name: list(matrix.costs)[int(choice.thresholds[0])]
        for matrix, choice in zip(matrices, solved, strict=True)
    }
    return Recipe(chosen, sum(choice.cost for choice in solved))


def worth_of_error(bundle: Bundle, observed: Observed) -> dict[int, float]:
    """Return layer -> KL of a squared error of 1 in its residual stream, for each token.

    It is the KL that the layer adds with its experts at the lowest tier, over the error that this makes.
    """
    ladder = bundle.manifest.ladder
    low, top = str(ladder[0]), str(ladder[-1])
    found: dict[int, float] = {}
    for policy in bundle.policy.layers:
        if not policy.sensitivity:
            continue
        energy = observed.energy[policy.layer]
        kl = policy.sensitivity[low] - policy.sensitivity[top]
        error = float(np.dot(energy, np.subtract(policy.expert_error[low], policy.expert_error[top])))
        if len(ladder) == 1:
            kl, error = policy.sensitivity[low], float(np.dot(energy, policy.expert_error[low]))
        if kl > 0 and error > 0:
            found[policy.layer] = kl / error
    if not found:
        raise DymoeError(
            f"{bundle.path}: no layer has a measured sensitivity; compile it with more --calibration-tokens"
        )
    mean = math.exp(sum(map(math.log, found.values())) / len(found))
    worths = {layer: value**TEMPER * mean ** (1 - TEMPER) for layer, value in found.items()}
    nearest = {n: min(worths, key=lambda known: abs(known - n)) for n in range(bundle.spec.num_layers)}
    return {layer: worths[near] for layer, near in nearest.items()}


def _dense_cost(name: str, spec: ModelSpec, observed: Observed, worth: Mapping[int, float]) -> float:
    """Return the KL of the measured rounding of a dense matrix."""
    if name == "lm_head":
        return observed.errors["head"]
    if name == "embed":
        return observed.errors["embed"] * worth[0] + (observed.errors["head"] if spec.tie_embeddings else 0.0)
    return observed.errors[name] * worth[int(name.split(".")[1])]


def _noise_key(name: str, spec: ModelSpec) -> str:
    return "head" if name == spec.head else name


def _costs(cost: float, types: Sequence[WeightType], noise: float) -> dict[WeightType, float]:
    """Return type -> KL, from the KL of a rounding whose relative squared error is `noise`."""
    return {each: cost * each.error / max(noise, 1e-30) for each in types}
