"""The runtime: opens a DyMoE bundle inside a memory budget and generates text."""

__version__ = "0.1.0"
