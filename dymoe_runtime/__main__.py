"""python -m dymoe_runtime: the command dymoe-run."""

import runpy

if __name__ == "__main__":
    runpy.run_module("dymoe_runtime.cli", run_name="__main__", alter_sys=True)
