"""The runtime: opens a DyMoE bundle inside a memory budget and generates text."""

import os

__version__ = "0.1.0"

# Read when torch's OpenMP library is loaded, hence here: idle threads that spin instead of
# sleeping take the processor from the kernels' own pool, up to thirty times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
