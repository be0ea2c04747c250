"""dymoe-run and dymoe-bundle; the former also as python -m dymoe_runtime."""

import gc
import sys


def run() -> None:
    """Load the command, which takes a moment, without a traceback if that is interrupted."""
    gc.disable()  # it would go through all that is imported, again and again
    try:
        from dymoe_runtime.cli import run as command
        from dymoe_runtime.console import spare_imports
    except KeyboardInterrupt:
        sys.exit(130)
    spare_imports()
    gc.enable()
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
