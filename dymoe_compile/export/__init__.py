"""Exports: what other runtimes execute, made from a bundle."""
