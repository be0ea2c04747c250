"""What the compiler found about a bundle, as its compile.json keeps it."""

from __future__ import annotations

from dymoe_runtime.bundle.bundle import DAMAGED, FINDINGS, Bundle
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import parse_json
from dymoe_runtime.tools.intervals import Interval


def kl_intervals(bundle: Bundle) -> dict[str, Interval]:
    """Return the 95% interval of the KL of each operating point, by name, where it is known.

    Bundles have none that were compiled before intervals were kept, or by `slim`. Raises DymoeError if compile.json is
    malformed.
    """
    data, where = bundle.read(FINDINGS), str(bundle.path / FINDINGS)
    if data is None:
        return {}
    intervals = {}
    try:
        for point in parse_json(data, where, DAMAGED)["points"]:
            if (found := point.get("kl_interval")) is not None:
                low, high = map(float, found)
                intervals[str(point["name"])] = (low, high)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DymoeError(f"{where}: 'points' is not a list of operating points; {DAMAGED}") from error
    return intervals
