"""The engine: loading a bundle within a memory budget, the model, prefetching, run-time control and traces."""
