"""What /metrics tells: counts and times of requests, and what the model and its store say of themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:  # long chains of imports, for annotations alone
    from dymoe_runtime.serving.service.request import Service


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The metrics of one server, in Prometheus' text format."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ServiceCollector(service))
        by = self._registry
        self._requests = Counter("dymoe_requests", "Requests by path and status.", ["path", "status"], registry=by)
        self._prompt = Counter("dymoe_prompt_tokens", "Tokens of prompts.", registry=by)
        self._reused = Counter("dymoe_reused_tokens", "Tokens of prompts that were not computed anew.", registry=by)
        self._generated = Counter("dymoe_generated_tokens", "Tokens of answers.", registry=by)
        self._cancelled = Counter("dymoe_cancelled_answers", "Answers whose reader went away.", registry=by)
        self._first = Histogram(
            "dymoe_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=SECONDS,
            registry=by,
        )
        self._per_token = Histogram(
            "dymoe_time_per_output_token_seconds",
            "Mean time of the further tokens of an answer.",
            buckets=SECONDS_PER_TOKEN,
            registry=by,
        )

    def count_request(self, path: str, status: int) -> None:
        """Count a response; `path` is that of its route."""
        self._requests.labels(path, str(status)).inc()

    def count_first(self, prompt_tokens: int, reused_tokens: int, seconds: float) -> None:
        """Count an answer whose first token has come after `seconds`."""
        self._prompt.inc(prompt_tokens)
        self._reused.inc(reused_tokens)
        self._first.observe(seconds)

    def count_tokens(self, tokens: int, seconds: float) -> None:
        """Count the tokens of an answer that has ended, `seconds` after its first one."""
        self._generated.inc(tokens)
        if tokens > 1:
            self._per_token.observe(seconds / (tokens - 1))

    def count_cancelled(self) -> None:
        """Count an answer whose reader went away."""
        self._cancelled.inc()

    def text(self) -> bytes:
        """Return all metrics."""
        return generate_latest(self._registry)


class _ServiceCollector:
    """Asks the service when the metrics are read."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Yield what the service and its model say."""
        state, statistics = self._service.state(), self._service.statistics()
        gauges = (
            ("dymoe_slots", "Requests that can run at once.", state.slots),
            ("dymoe_slots_busy", "Requests that run.", state.busy),
            ("dymoe_queue_length", "Requests that wait.", state.queued),
            ("dymoe_queue_limit", "Most requests that may wait.", state.queue_limit),
            ("dymoe_memory_budget_bytes", "Budget of the process.", state.memory_bytes),
            ("dymoe_process_resident_bytes", "Resident set of the process.", state.resident_bytes),
            ("dymoe_arena_bytes", "Memory for experts.", statistics.get("arena_bytes")),
            ("dymoe_experts_resident_bytes", "Experts in memory.", statistics.get("resident_bytes")),
            ("dymoe_expert_hit_ratio", "Share of experts that were in memory.", statistics.get("hit_rate")),
            ("dymoe_bits_mean", "Mean bits of the experts that ran.", statistics.get("bits_mean")),
            ("dymoe_tokens_per_second", "Decoded tokens per second of computing.", statistics.get("tokens_per_s")),
        )
        for name, text, value in gauges:
            if value is not None:
                yield GaugeMetricFamily(name, text, value=value)
        counters = (
            ("dymoe_expert_read_bytes", "Bytes of experts read from the disk.", statistics.get("read_bytes")),
            ("dymoe_expert_evictions", "Experts that left memory.", statistics.get("evictions")),
            ("dymoe_expert_wait_seconds", "Time spent waiting for reads.", statistics.get("wait_s")),
        )
        for name, text, value in counters:
            if value is not None:
                yield CounterMetricFamily(name, text, value=value)
        shares = GaugeMetricFamily(
            "dymoe_tier_share", "Share of expert uses at a tier of so many bits.", labels=["tier"]
        )
        for tier, share in statistics.get("tier_shares", {}).items():
            shares.add_metric([str(tier)], share)
        yield shares
