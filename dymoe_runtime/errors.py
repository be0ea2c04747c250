"""What goes wrong for a user: one sentence with the remedy, and an exit code."""

from __future__ import annotations


class DymoeError(Exception):
    """Bad input or a failure that the user can mend; the message says what, where and how."""

    exit_code = 1


class QualityError(DymoeError):
    """A quality gate was not met."""

    exit_code = 3


class BudgetError(DymoeError):
    """The device that was asked for cannot run the result."""

    exit_code = 4
