"""python -m dymoe_compile."""

from dymoe_compile.cli import main

main(prog_name="dymoe-compile")
