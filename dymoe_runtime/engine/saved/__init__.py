"""The state of a sequence in a file, for another run to continue it."""
