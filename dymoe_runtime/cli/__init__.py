"""The command line: dymoe-run and dymoe-bundle."""
