"""python -m dymoe_runtime."""

from dymoe_runtime.cli import run

run(prog_name="dymoe-run")
