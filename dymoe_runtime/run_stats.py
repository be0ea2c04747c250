"""What a run has cost: time and tokens, and what the store did for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dymoe_runtime.residency import StoreStats


@dataclass
class PhaseStats:
    """Time and tokens of the prompt or of decoding."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def took(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds


@dataclass
class RunStats:
    prefill: PhaseStats = field(default_factory=PhaseStats)
    decode: PhaseStats = field(default_factory=PhaseStats)

    def to_json(self, store: StoreStats) -> dict[str, Any]:
        """With what the store did meanwhile; the keys are a contract."""
        prefill, decode = self.prefill, self.decode
        tokens = prefill.tokens + decode.tokens
        return {
            "prompt_tokens": prefill.tokens,
            "new_tokens": decode.tokens,
            "prompt_tokens_per_s": prefill.tokens_per_s,
            "tokens_per_s": decode.tokens_per_s,
            "read_bytes": store.read_bytes,
            "read_bytes_per_token": store.read_bytes / tokens if tokens else 0.0,
            "hit_rate": store.hits / store.requests if store.requests else 0.0,
            "look_ahead": {
                "reads": store.look_ahead_reads,
                "bytes": store.look_ahead_bytes,
                "hits": store.look_ahead_hits,
                "waste": store.look_ahead_reads - store.look_ahead_hits,
            },
            "evictions": store.evictions,
            "wait_s": store.wait_s,
        }
