"""Counters of an expert store."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StoreStats:
    """Counters since the start or the last reset."""

    requests: int = 0  # requests for experts
    hits: int = 0  # requests that needed no read of their own
    read_bytes: int = 0  # of all reads that have begun
    prefetch_reads: int = 0
    prefetch_bytes: int = 0
    prefetch_hits: int = 0  # prefetches that were used
    prefetch_evicted: int = 0  # prefetches that were evicted unused
    background_bytes: int = 0  # preloads and promotions
    evictions: int = 0
    wait_s: float = 0.0  # seconds spent waiting for the reads of requested experts

    def requested(self, hits: int, count: int = 1) -> None:
        """Count `count` requests, of which `hits` needed no read of their own."""
        self.requests += count
        self.hits += hits

    def began(self, nbytes: int, prefetch: bool, background: bool) -> None:
        """Count a read that a thread has begun."""
        self.read_bytes += nbytes
        self.prefetch_reads += prefetch
        self.prefetch_bytes += nbytes * prefetch
        self.background_bytes += nbytes * background

    def used_prefetches(self, count: int) -> None:
        """Count prefetches that were used."""
        self.prefetch_hits += count

    def evicted(self, segments: int, prefetches: int) -> None:
        """Count evicted segments, and the unused prefetches among them."""
        self.evictions += segments
        self.prefetch_evicted += prefetches

    def waited(self, seconds: float) -> None:
        """Count seconds spent waiting for reads."""
        self.wait_s += seconds
