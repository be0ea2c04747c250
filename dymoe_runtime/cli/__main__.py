"""Entry points of dymoe-run and dymoe-bundle; python -m dymoe_runtime is dymoe-run too."""

from __future__ import annotations

import sys


def run() -> None:
    """Run dymoe-run; an interrupt while it loads exits with 130, without a traceback."""
    try:
        from dymoe_runtime.cli.run import run as command
        from dymoe_runtime.console import start
    except KeyboardInterrupt:
        sys.exit(130)
    start(command, "dymoe-run")


def bundle() -> None:
    """Run dymoe-bundle; an interrupt while it loads exits with 130, without a traceback."""
    try:
        from dymoe_runtime.cli.bundle import bundle as command
        from dymoe_runtime.console import start
    except KeyboardInterrupt:
        sys.exit(130)
    start(command, "dymoe-bundle")


if __name__ == "__main__":
    run()
