"""What the compiler found about a bundle, as its compile.json keeps it."""

from __future__ import annotations

import json

from dymoe_runtime.bundle.bundle import FINDINGS, Bundle
from dymoe_runtime.tools.intervals import Interval


def kl_intervals(bundle: Bundle) -> dict[str, Interval]:
    """Return the 95% interval of the KL of each operating point, by name, where it is known.

    Bundles have none that were compiled before intervals were kept, or by `slim`.
    """
    points = json.loads(bundle.read(FINDINGS) or b"{}").get("points", ())
    return {point["name"]: tuple(point["kl_interval"]) for point in points if point.get("kl_interval")}
