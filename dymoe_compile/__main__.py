"""dymoe-compile, also as python -m dymoe_compile."""

import sys


def main() -> None:
    """Load the command, which takes a moment, without a traceback if that is interrupted."""
    try:
        from dymoe_compile.cli import main as command
    except KeyboardInterrupt:
        sys.exit(130)
    command(prog_name="dymoe-compile")


if __name__ == "__main__":
    main()
