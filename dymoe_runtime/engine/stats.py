"""Statistics of a run: tokens, time, and the work of the store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dymoe_runtime.store.stats import StoreStats


@dataclass
class PhaseStats:
    """Tokens and time of one phase, prefill or decode."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Return tokens per second, 0 before the first token."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Add `tokens` that took `seconds`."""
        self.tokens += tokens
        self.seconds += seconds


@dataclass
class RunStats:
    """Statistics of both phases of a run."""

    prefill: PhaseStats = field(default_factory=PhaseStats)
    decode: PhaseStats = field(default_factory=PhaseStats)

    def to_json(self, store: StoreStats) -> dict[str, Any]:
        """Return the statistics of both phases and of the store. The keys are a contract."""
        prefill, decode = self.prefill, self.decode
        tokens = prefill.tokens + decode.tokens
        return {
            "prompt_tokens": prefill.tokens,
            "new_tokens": decode.tokens,
            "prompt_tokens_per_s": prefill.tokens_per_s,
            "tokens_per_s": decode.tokens_per_s,
            "read_bytes": store.read_bytes,
            "read_bytes_per_token": store.read_bytes / tokens if tokens else 0.0,
            "expert_requests": store.requests,
            "expert_hits": store.hits,
            "hit_rate": store.hits / store.requests if store.requests else 0.0,
            "look_ahead": {
                "reads": store.prefetch_reads,
                "bytes": store.prefetch_bytes,
                "hits": store.prefetch_hits,
                "waste": store.prefetch_reads - store.prefetch_hits,
            },
            "evictions": store.evictions,
            "wait_s": store.wait_s,
        }
