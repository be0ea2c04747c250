"""Entry point of dymoe-compile and of python -m dymoe_compile."""

import sys


def main() -> None:
    """Run the command; an interrupt during its imports exits with 130, without a traceback."""
    try:
        from dymoe_compile.cli import main as command
        from dymoe_runtime.console import start
    except KeyboardInterrupt:
        sys.exit(130)
    start(command, "dymoe-compile")


if __name__ == "__main__":
    main()
