"""Experts in memory: requests, leases, the arena, eviction, and reads."""

# Decay of uses: the weight of a new use grows by this factor per token. At 1 nothing decays (LFU); at 2 little more
# than the last use counts (LRU).
DECAY = 1.01
# Which segment is evicted: the least used of all layers, the least used of the layer that needs room, or the one that
# costs least to lose.
EVICTIONS = ("global", "per-layer", "by-cost")
