"""Errors that the user can fix: one sentence with the remedy, and an exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class DymoeError(Exception):
    """Bad input or a failure that the user can fix; the message says what, where and how."""

    exit_code = 1


class QualityError(DymoeError):
    """No operating point of the bundle reaches the quality that was asked for."""

    exit_code = 3


class BudgetError(DymoeError):
    """The device of the profile cannot run the bundle."""

    exit_code = 4


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Raise DymoeError if an import within this context fails."""
    try:
        yield
    except (ImportError, OSError) as error:
        raise DymoeError(f"the installation is incomplete ({error}); repair it with: pip install dymoe") from error


@contextlib.contextmanager
def needing_extra(extra: str, purpose: str) -> Iterator[None]:
    """Raise DymoeError if an import within this context fails; its message names the package's extra to install.

    `purpose` starts the message, such as "reading checkpoints".
    """
    try:
        yield
    except (ImportError, OSError) as error:
        torch = " (PyTorch's CPU build first, unless you want its CUDA packages)" if extra == "compile" else ""
        raise DymoeError(
            f"{purpose} needs the extra '{extra}', which is missing or incomplete ({error}); "
            f"run: pip install 'dymoe[{extra}]'{torch}"
        ) from error
