"""What a saved state belongs to: the bundle, and the options on which its numbers depend."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from dymoe_runtime.engine.options import label_of, options_for
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.model.rope import is_long
from dymoe_runtime.model.tier_rule import TierRule
from dymoe_runtime.spec import AttentionSpec, ModelSpec

OTHERWISE = "or start a new session"
# The longest name of a point that a file may hold.
MAX_NAME = 200


@dataclass(frozen=True)
class Origin:
    """The run that saved a state, or the run that would continue it."""

    bundle: str  # digest of the manifest
    context: int  # tokens that the run has room for
    kv_bits: int
    # Point and digest of its rule for the next token; "" if the run chooses points by its memory or by measured times.
    point: str
    rule: str

    def is_valid(self) -> bool:
        """Return whether the name of the point can be shown."""
        return self.point.isprintable() and len(self.point) <= MAX_NAME

    def check_continues(self, saved: Origin, tokens: int, spec: ModelSpec, where: str) -> None:
        """Raise DymoeError that names `where` if a run like this cannot continue the `tokens` that `saved` has left."""
        if saved.bundle != self.bundle:
            raise DymoeError(
                f"{where}: the session was saved with another bundle, or before this one was compiled again; "
                f"give the bundle it belongs to, {OTHERWISE}"
            )
        if saved.kv_bits != self.kv_bits:
            raise DymoeError(
                f"{where}: the session was saved with --kv-bits {saved.kv_bits}, this run has {self.kv_bits}; "
                f"give --kv-bits {saved.kv_bits}, {OTHERWISE}"
            )
        if "" not in (saved.rule, self.rule) and saved.rule != self.rule:
            raise DymoeError(
                f"{where}: the session was saved at {label_of(saved.point)}, this run is at {label_of(self.point)}; "
                f"give {options_for(saved.point)}, {OTHERWISE}"
            )
        if tokens > self.context:
            raise DymoeError(
                f"{where}: the session has {tokens} tokens, more than the context of {self.context}; "
                f"give --context {saved.context}, {OTHERWISE}"
            )
        if _long_layers(spec, saved.context) != _long_layers(spec, self.context):
            raise DymoeError(
                f"{where}: the session was saved with --context {saved.context}, and this model encodes positions "
                f"otherwise with {self.context}; give --context {saved.context}, {OTHERWISE}"
            )


def digest_of(rule: TierRule) -> str:
    """Return the SHA-256 of a rule's numbers, in hexadecimal digits."""
    numbers = json.dumps([rule.ladder, rule.decode, rule.prefill, rule.pinned])
    return hashlib.sha256(numbers.encode()).hexdigest()


def _long_layers(spec: ModelSpec, context: int) -> list[bool]:
    """Return which layers' keys are encoded with the long factors of LongRoPE in a context of so many tokens."""
    ropes = (layer.mixer.rope if isinstance(layer.mixer, AttentionSpec) else None for layer in spec.layers)
    return [rope is not None and is_long(rope, context) for rope in ropes]
