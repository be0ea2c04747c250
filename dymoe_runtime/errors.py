"""Errors that the user can fix: one sentence with the remedy, and an exit code."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

# What to do about errors of the system; other ones have to do with the path.
REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or have a larger quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or use another file system",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs, which have too many files open",
    errno.EIO: "check the disk, or use another one",
    errno.EROFS: "choose a place that can be written to",
    errno.ENAMETOOLONG: "give a shorter name",
}


class DymoeError(Exception):
    """Bad input or a failure that the user can fix; the message says what, where and how."""

    exit_code = 1


class TemplateFailed(DymoeError):
    """The chat template refused the messages, or asked for more than a template may use; `why` says which."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}the chat template failed: {why}; change the messages or use --prompt")
        self.why = why


class QualityError(DymoeError):
    """No operating point of the bundle reaches the quality that was asked for."""

    exit_code = 3


class BudgetError(DymoeError):
    """The device of the profile cannot run the bundle."""

    exit_code = 4


def remedy_of(error: OSError, otherwise: str) -> str:
    """Return what to do about an error of the system: what REMEDIES says, or `otherwise`."""
    return REMEDIES.get(error.errno or 0, otherwise)


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
