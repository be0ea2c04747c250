"""What goes wrong for a user: one sentence with the remedy, and an exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class DymoeError(Exception):
    """Bad input or a failure that the user can mend; the message says what, where and how."""

    exit_code = 1


class QualityError(DymoeError):
    """A quality gate was not met."""

    exit_code = 3


class BudgetError(DymoeError):
    """The device that was asked for cannot run the result."""

    exit_code = 4


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For imports where they are needed: DymoeError where a library is missing or cannot be loaded."""
    try:
        yield
    except (ImportError, OSError) as error:
        raise DymoeError(f"the installation is not whole ({error}); install dymoe and what it needs again") from error
