"""Experts that compiled code can run a token through without asking Python for them."""

from __future__ import annotations

from dymoe_runtime.experts import StoredExperts
from dymoe_runtime.kernels import _native
from dymoe_runtime.kernels.job import Expert
from dymoe_runtime.policy import TierRule
from dymoe_runtime.spec import ExpertKey, ModelSpec


class AtHand:
    """Keeps what the store of `experts` shows where the compiled step finds it, and their rule beside it.

    A token of which all is at hand takes no time of Python's between its layers. The books of the store are
    kept afterwards, to the same end: meanwhile nobody asks them.
    """

    def __init__(self, spec: ModelSpec, experts: StoredExperts) -> None:
        self._experts = experts
        self._rule: TierRule | None = None  # that the table knows
        self._table = _native.AtHand(spec.num_layers, spec.num_experts, experts.store.layout.ladder)
        self.ran = experts.ran
        experts.store.show(self)

    def put(self, key: ExpertKey, tier: int, prepared: Expert) -> None:
        self._table.put(key.layer, key.expert, tier, prepared.views)

    def remove(self, key: ExpertKey, tier: int) -> None:
        self._table.remove(key.layer, key.expert, tier)

    def ready(self) -> _native.AtHand | None:
        if self._experts.looks_beyond():
            return None
        rule = self._experts.rule
        if rule is not self._rule:
            for layer, thresholds in enumerate(rule.decode):
                self._table.rule(layer, thresholds, rule.pinned[layer] if rule.pinned else ())
            self._rule = rule
        return self._table
