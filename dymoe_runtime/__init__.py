"""The runtime: opens a DyMoE bundle inside a memory budget and generates text.

>>> from dymoe_runtime import RunOptions, SamplingParams, Tokenizer, generate, load_model
>>> with load_model("build/demo.dymoe", RunOptions(memory_bytes=1 << 30)) as model:
...     greedy = SamplingParams()
...     tokens = list(generate(model, Tokenizer.of(model), "Once upon a time", greedy, max_tokens=6))
>>> "".join(token.text for token in tokens)
' of time, the time of'
"""

import importlib
import os
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "Bundle",
    "DymoeError",
    "Kernels",
    "LogLikelihood",
    "Model",
    "RunOptions",
    "SamplingParams",
    "Scorer",
    "Session",
    "Token",
    "Tokenizer",
    "__version__",
    "generate",
    "generate_async",
    "load_kernels",
    "load_model",
    "load_scorer",
    "log_likelihoods",
    "rolling_log_likelihood",
]

# Read when torch's OpenMP library is loaded, hence here: idle threads that spin instead of
# sleeping take the processor from the kernels' own pool, up to thirty times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The module of each public name. A name is imported when it is first used, because a command needs only some of them.
# __init__.pyi declares the same names for type checkers.
_HOMES = {
    "Bundle": "dymoe_runtime.bundle.bundle",
    "DymoeError": "dymoe_runtime.errors",
    "Kernels": "dymoe_runtime.kernels.interface",
    "LogLikelihood": "dymoe_runtime.tools.likelihood",
    "Model": "dymoe_runtime.engine.model",
    "RunOptions": "dymoe_runtime.engine.options",
    "SamplingParams": "dymoe_runtime.text.sampling",
    "Scorer": "dymoe_runtime.engine.model",
    "Session": "dymoe_runtime.text.session",
    "Token": "dymoe_runtime.text.generate",
    "Tokenizer": "dymoe_runtime.text.tokenizer",
    "generate": "dymoe_runtime.text.generate",
    "generate_async": "dymoe_runtime.text.generate",
    "load_kernels": "dymoe_runtime.kernels",
    "load_model": "dymoe_runtime.engine.load",
    "load_scorer": "dymoe_runtime.engine.load",
    "log_likelihoods": "dymoe_runtime.tools.likelihood",
    "rolling_log_likelihood": "dymoe_runtime.tools.likelihood",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
