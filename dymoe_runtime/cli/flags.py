"""Typed flags: a frozen dataclass whose fields are a command's options, and help that shows them in groups."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field, fields
from typing import Any, TypeVar

import click

from dymoe_runtime.console import ManyValues

F = TypeVar("F")

EXIT_CODES = (
    ("0", "done"),
    ("1", "bad input or a failure; one sentence on stderr says what to do"),
    ("2", "wrong usage"),
    ("130", "interrupted"),
    ("143", "terminated"),
)


def flag(*names: str, group: str, default: Any = None, **attributes: Any) -> Any:
    """Return a field of a flags dataclass that is a click option with these names and attributes."""
    attributes.setdefault("is_flag", default is False)
    if isinstance(attributes.get("type"), (click.IntRange, click.FloatRange)) or attributes.get("type") is float:
        attributes.setdefault("metavar", "N" if isinstance(attributes["type"], click.IntRange) else "X")
    return field(default=default, metadata={"names": names, "group": group, "attributes": attributes})


def names_of(flags: type[Any]) -> dict[str, str]:
    """Return field -> the first name of its option."""
    return {f.name: f.metadata["names"][0].partition("/")[0] for f in fields(flags)}


def options_of(
    flags: type[Any], groups: Sequence[str] | None = None, without: Collection[str] = (), also: Collection[str] = ()
) -> list[GroupedOption]:
    """Return the options of a flags dataclass, of all groups or of `groups`.

    Leaves out the fields in `without`, and adds those in `also`.
    """
    options = []
    for f in fields(flags):
        group, attributes = f.metadata["group"], dict(f.metadata["attributes"])
        if (groups is None or group in groups or f.name in also) and f.name not in without:
            if not attributes.get("required"):  # click would take a default of None as a value
                attributes["default"] = f.default
            options.append(GroupedOption([*f.metadata["names"], f.name], group=group, **attributes))
    return options


class GroupedOption(click.Option):
    """An option that `--help` shows under the heading of its group."""

    def __init__(self, *args: Any, group: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.group = group


class FlagsCommand(ManyValues):
    """A command whose help shows options in groups, then examples and exit codes."""

    def __init__(
        self, *args: Any, examples: Sequence[str] = (), exit_codes: Sequence[tuple[str, str]] = EXIT_CODES, **rest: Any
    ) -> None:
        super().__init__(*args, **rest)
        self.examples, self.exit_codes = examples, exit_codes

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        format_groups(self.get_params(ctx), ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        format_examples(formatter, self.examples)
        with formatter.section("Exit codes"):
            formatter.write_dl(self.exit_codes)


def format_groups(parameters: Sequence[click.Parameter], ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write options in groups, in the order in which groups first occur; options without a group come last."""
    rest = "Other" if any(isinstance(parameter, GroupedOption) for parameter in parameters) else "Options"
    groups: dict[str, list[tuple[str, str]]] = {}
    options = [parameter for parameter in parameters if isinstance(parameter, click.Option)]
    for option in sorted(options, key=lambda option: not isinstance(option, GroupedOption)):
        record = option.get_help_record(ctx)
        if record is not None:
            group = option.group if isinstance(option, GroupedOption) else rest
            groups.setdefault(group, []).append(record)
    for group, records in groups.items():
        with formatter.section(group):
            formatter.write_dl(records)


def format_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    """Write command lines as they are."""
    if examples:
        with formatter.section("Examples"):
            for example in examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")


def with_flags(flags: type[F], fixed: Mapping[str, Any] | None = None) -> Callable[..., Callable[..., None]]:
    """Return a decorator that gathers a command's options into `flags`; `fixed` maps other fields to their values."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        known = {f.name for f in fields(flags)}  # type: ignore[arg-type]

        @functools.wraps(command)
        def gathered(**values: Any) -> None:
            given = {name: value for name, value in values.items() if name in known}
            rest = {name: value for name, value in values.items() if name not in known}
            command(flags=flags(**{**given, **(fixed or {})}), **rest)

        return gathered

    return decorate
