"""dymoe-lm-eval: lm-eval's command, which then knows the model `dymoe`."""

from __future__ import annotations

from typing import NoReturn

import click

from dymoe_runtime.console import noticing_lost_output, one_sentence, start
from dymoe_runtime.errors import needing_extra


# lm-eval reads the arguments, --help too, from the command line itself.
@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.version_option(package_name="dymoe")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@one_sentence
def lm_eval_command(arguments: tuple[str, ...]) -> None:
    """Run lm-eval's command with the arguments of this process."""
    with needing_extra("eval", "scoring tasks"):
        import lm_eval.__main__

        import dymoe_runtime.tools.lm_eval_model  # noqa: F401, registers the model
    with noticing_lost_output():
        lm_eval.__main__.cli_evaluate()


def main(prog_name: str = "dymoe-lm-eval") -> NoReturn:
    """Run dymoe-lm-eval."""
    start(lm_eval_command, prog_name)
