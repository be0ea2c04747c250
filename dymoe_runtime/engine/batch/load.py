"""Construction of a model whose sequences run together."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.batch.model import BatchModel
from dymoe_runtime.engine.load import Loader
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.kernels.interface import Kernels


def load_batch(
    bundle: Bundle | str | os.PathLike[str],
    sequences: int,
    options: RunOptions | None = None,
    kernels: Kernels | None = None,
) -> BatchModel:
    """Load a bundle, or the bundle at a path, for so many `sequences` that run together.

    Each has room for `options.context` tokens. Use the model as a context manager, or close it. Raises DymoeError as
    `load_model` does.

    >>> with load_batch("build/demo.dymoe", 2, RunOptions(tier=4, context=64)) as model, model.running():
    ...     one, other = model.sequences
    ...     logits = model.decode([one, other], [1, 2])  # float32 [2, vocab]
    ...     one.length, other.length, logits.shape == (2, model.spec.vocab_size)
    (1, 1, True)
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    loader = Loader(opened, options or RunOptions(), kernels, sequences=sequences)
    with ExitStack() as stack:  # the model takes over the resources on it
        return BatchModel(loader.parts(stack))
