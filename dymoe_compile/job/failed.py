"""What a compilation leaves whose bundle failed a gate: the findings and the report, without the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dymoe_runtime.bundle.bundle import FINDINGS, REPORT
from dymoe_runtime.errors import BudgetError, QualityError
from dymoe_runtime.files import replacing
from dymoe_runtime.place import remove_own


def place_of(output: Path) -> Path:
    """Return the directory for the findings of a compilation to `output` whose gate failed."""
    return output.parent / f"{output.name}.failed"


@contextlib.contextmanager
def leaving_findings(work: Path, output: Path) -> Iterator[None]:
    """Copy the findings and the report in `work` to `place_of(output)` if a gate fails within this context.

    The error, a QualityError or a BudgetError, then names the directory.
    """
    try:
        yield
    except (QualityError, BudgetError) as error:
        place = place_of(output)
        place.mkdir(exist_ok=True)
        for name in (FINDINGS, REPORT):
            with replacing(place / name) as file:
                file.write((work / name).read_bytes())
        raise type(error)(f"{error}; {place} has {REPORT} and {FINDINGS}") from error


def clear_findings(output: Path) -> None:
    """Remove what an earlier compilation to `output` has left whose gate failed, but no file of others."""
    with contextlib.suppress(OSError):
        remove_own(place_of(output), lambda name: name in (FINDINGS, REPORT))
