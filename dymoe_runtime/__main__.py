"""dymoe-run and dymoe-bundle; the former also as python -m dymoe_runtime."""

import sys


def run() -> None:
    """Load the command, which takes a moment, without a traceback if that is interrupted."""
    try:
        from dymoe_runtime.cli import run as command
    except KeyboardInterrupt:
        sys.exit(130)
    command(prog_name="dymoe-run")


def bundle() -> None:
    """As `run`, for dymoe-bundle."""
    try:
        from dymoe_runtime.bundle_cli import bundle as command
    except KeyboardInterrupt:
        sys.exit(130)
    command(prog_name="dymoe-bundle")


if __name__ == "__main__":
    run()
