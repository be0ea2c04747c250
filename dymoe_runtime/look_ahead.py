"""Which experts of the next layer to read while this one computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from safetensors.numpy import load

from dymoe_runtime.bundle import DAMAGED, LOOK_AHEAD, Bundle
from dymoe_runtime.decoder import Routing
from dymoe_runtime.delivery import Want
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.policy import TierRule
from dymoe_runtime.spec import ExpertKey

# (layer, residual) -> (experts, gates) that the layer's router would choose.
Guess = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]]
# A rank is worth reading ahead if the guess was right so often.
LEAST_RECALL = 0.5


@dataclass(frozen=True)
class LookAhead:
    """Reads the next layer's likely experts while this one computes.

    `ranks[layer]` is how many guesses per token were worth reading when the policy was measured.
    """

    guess: Guess
    ranks: dict[int, int]
    width: int  # experts per layer, however many tokens there are

    def wants(self, layer: int, routing: Routing, rule: TierRule) -> list[Want]:
        """Experts of `layer` to read ahead, likeliest first."""
        ranks = self.ranks.get(layer, 0)
        if not ranks:
            return []
        experts, gates = self.guess(layer, routing.residual)
        if len(gates) == 1 and routing.token_weights is None:
            chosen, mass = experts[0].tolist(), gates[0].tolist()
            tiers = rule.choose_for_token(layer, chosen, mass)
            likely = list(zip(chosen, tiers, mass, strict=True))[:ranks]
            return [Want(ExpertKey(layer, e), tier) for e, tier, gate in likely if tier and gate > 0]
        guessed = replace(routing, experts=experts, gates=gates, listed=None)
        of_pairs = rule.choose(layer, guessed)[:, :ranks].reshape(-1)
        experts, gates = experts[:, :ranks].reshape(-1), gates[:, :ranks].reshape(-1)
        sums = np.bincount(experts, gates)
        highest = np.zeros(len(sums), np.int64)
        np.maximum.at(highest, experts, of_pairs)
        most = np.argsort(-sums, kind="stable")[: self.width].tolist()
        return [Want(ExpertKey(layer, e), int(highest[e])) for e in most if sums[e] > 0 and highest[e] > 0]


def read_predictors(bundle: Bundle) -> dict[int, np.ndarray]:
    """The look-ahead predictors [experts, H + 1] by layer; opening the bundle has checked the file."""
    shape = bundle.spec.num_experts, bundle.spec.hidden_size + 1
    path = bundle.path / LOOK_AHEAD
    predictors = {int(layer): tensor for layer, tensor in load(path.read_bytes()).items()}
    if any(tensor.shape != shape or tensor.dtype != np.float32 for tensor in predictors.values()):
        raise DymoeError(f"{path}: a predictor does not fit the model; {DAMAGED}")
    return predictors


def ranks_worth_reading(bundle: Bundle) -> dict[int, int]:
    """How many ranks of each layer's guess are worth reading, from the measured recall."""
    return {
        layer.layer: sum(recall >= LEAST_RECALL for recall in layer.look_ahead_recall[: bundle.spec.top_k])
        for layer in bundle.policy.layers
    }
