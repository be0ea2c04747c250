"""Bundles on their way to other machines: packed into one file, copied, made smaller, compared."""
