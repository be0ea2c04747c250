"""dymoe-run: its subcommands, and the short form that does what its flags say."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import click

from dymoe_runtime.cli.flags import EXIT_CODES, FlagsCommand, format_examples, format_groups, options_of, with_flags
from dymoe_runtime.cli.run_flags import (
    BENCHMARK,
    CHAT,
    COMPARISON,
    EVALUATION,
    INPUT,
    INTEGRITY,
    MEMORY,
    MODE,
    OUTPUT,
    PRECISION,
    PROFILE,
    SAMPLING,
    SERVING,
    SPEED,
    TRACING,
    RunFlags,
    check_flags,
    unfit_for,
)
from dymoe_runtime.console import Commands, one_sentence, sparing_imports
from dymoe_runtime.errors import importing

# The short form has no name on the command line.
SHORT_FORM = "run"
EXAMPLES = (
    'dymoe-run my.dymoe --prompt "Once upon a time" --stats',
    "dymoe-run my.dymoe --chat --memory 6GiB --point auto",
    "dymoe-run bench my.dymoe --memory 4GiB --json",
    "dymoe-run eval my.dymoe text.txt --reference path/to/checkpoint",
)


class Subcommand(NamedTuple):
    """What a subcommand does, and the groups of its options."""

    help: str  # its first clause is the short help
    groups: tuple[str, ...]
    examples: tuple[str, ...]
    mode: str | None  # field of RunFlags that says what the subcommand does; the short form has none
    also: tuple[str, ...] = ()  # fields of RunFlags of other groups


SUBCOMMANDS = {
    SHORT_FORM: Subcommand(
        "Do with BUNDLE what the options say; by default continue a prompt.",
        (
            *(MODE, INPUT, CHAT, SAMPLING, MEMORY, PRECISION, SPEED, OUTPUT),
            *(SERVING, EVALUATION, BENCHMARK, PROFILE, TRACING, COMPARISON),
        ),
        EXAMPLES,
        None,
    ),
    "chat": Subcommand(
        "Converse with BUNDLE: by the model's chat template, a line a turn; with a prompt, answer once.",
        (INPUT, CHAT, SAMPLING, MEMORY, PRECISION, SPEED, OUTPUT, TRACING, COMPARISON),
        ("dymoe-run chat my.dymoe --memory 6GiB", 'dymoe-run chat my.dymoe --prompt "Why is the sky blue?"'),
        "chat",
    ),
    "serve": Subcommand(
        "Serve BUNDLE: to clients of OpenAI's, Anthropic's and Ollama's APIs, until it is told to end.",
        (SERVING, SAMPLING, MEMORY, PRECISION, SPEED, COMPARISON),
        ("dymoe-run serve my.dymoe --memory 6GiB", "dymoe-run serve my.dymoe --port 11434 --api-key-file keys.txt"),
        "serve",
        ("thinking", "template_var"),
    ),
    "eval": Subcommand(
        "Score texts with BUNDLE, teacher-forced: likelihood, and KL to a reference.",
        (EVALUATION, MEMORY, PRECISION, SPEED, OUTPUT, COMPARISON),
        ("dymoe-run eval my.dymoe a.txt b.txt --reference path/to/checkpoint --json",),
        "eval_files",
    ),
    "bench": Subcommand(
        "Time random tokens through BUNDLE: a prompt, then decoding.",
        (BENCHMARK, MEMORY, PRECISION, SPEED, OUTPUT, TRACING, COMPARISON),
        ("dymoe-run bench my.dymoe --memory 2GiB --prompt-tokens 512 --new-tokens 128 --json",),
        "bench",
        ("seed",),
    ),
    "probe": Subcommand(
        "Measure this machine with BUNDLE: its kernels, its disk, and what each operating point should take.",
        (PROFILE, MEMORY, SPEED, OUTPUT, COMPARISON),
        ("dymoe-run probe my.dymoe", "dymoe-run probe my.dymoe --write this-machine.toml"),
        "probe",
    ),
}


class _UnnamedContext(click.Context):
    """The context of the short form, whose name nobody types."""

    @property
    def command_path(self) -> str:
        return self.parent.command_path if self.parent is not None else super().command_path


class ShortForm(FlagsCommand):
    """What dymoe-run does without a subcommand."""

    context_class = _UnnamedContext


class RunGroup(Commands):
    """The subcommands of dymoe-run; arguments that do not begin with a subcommand are the short form."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        alone = args in ([], ["--help"], ["--version"])
        if not alone and args[0] not in self.list_commands(ctx):
            args = [SHORT_FORM, *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in SUBCOMMANDS if name != SHORT_FORM]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return make_command(name) if name in SUBCOMMANDS else None

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "BUNDLE [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND BUNDLE [OPTIONS]", prefix="   or: ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        format_groups([*make_command(SHORT_FORM).params, *self.get_params(ctx)], ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        format_examples(formatter, EXAMPLES)
        with formatter.section("Exit codes"):
            formatter.write_dl(EXIT_CODES)


@click.group(cls=RunGroup)
@click.version_option(package_name="dymoe")
def run() -> None:
    """Run a DyMoE bundle inside a memory budget: generate, converse, score or measure.

    A bundle whose name is that of a command is written as ./NAME.
    """


def make_command(name: str) -> click.Command:
    """Return the subcommand of that name, with the options of its groups that go with its mode."""
    subcommand = SUBCOMMANDS[name]
    mode = subcommand.mode
    reads_files = mode == "eval_files"

    @one_sentence
    @with_flags(RunFlags, {} if mode is None or reads_files else {mode: True})
    def command(flags: RunFlags, bundle: Path) -> None:
        check_flags(flags)
        execute(bundle, flags)

    parameters: list[click.Parameter] = [click.Argument(["bundle"], type=click.Path(path_type=Path))]
    if reads_files:
        parameters.append(click.Argument(["eval_files"], nargs=-1, required=True, metavar="FILE..."))
    parameters += options_of(
        RunFlags, (*subcommand.groups, INTEGRITY), () if mode is None else unfit_for(mode), subcommand.also
    )
    short_help = f"{subcommand.help.partition(':')[0]}."
    command_class = ShortForm if name == SHORT_FORM else FlagsCommand
    made = command_class(
        name,
        params=parameters,
        callback=command,
        help=subcommand.help,
        short_help=short_help,
        examples=subcommand.examples,
    )
    return click.version_option(package_name="dymoe")(made) if name == SHORT_FORM else made


def execute(path: Path, flags: RunFlags) -> None:
    """Do what the flags ask for; the modules that do the work are imported here, so that --help is fast."""
    with importing(), sparing_imports():
        from dymoe_runtime.bundle.bundle import Bundle
        from dymoe_runtime.kernels import load_kernels
    bundle = Bundle.open(path)
    if flags.expect is not None:
        from dymoe_runtime.bundle.records import check_digest

        check_digest(bundle, flags.expect)
    kernels = load_kernels(threads=flags.threads)
    if kernels.notice is not None:
        click.echo(f"note: {kernels.notice}", err=True)
    if flags.eval_files or flags.bench or flags.probe:
        with importing(), sparing_imports():  # not needed for an answer
            from dymoe_runtime.cli import measure
        measure.measure(bundle, kernels, flags)
    elif flags.serve:
        with importing(), sparing_imports():
            from dymoe_runtime.cli import serve
        serve.serve(bundle, kernels, flags)
    else:
        with importing(), sparing_imports():
            from dymoe_runtime.cli import answer
        answer.respond(bundle, kernels, flags)
