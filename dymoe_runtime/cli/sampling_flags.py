"""What the flags of dymoe-run make of a model's own sampling settings and chat template."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from dymoe_runtime.cli.run_flags import RunFlags
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import read_text
from dymoe_runtime.text.constraints import Grammar, Grammars
from dymoe_runtime.text.reasoning import SWITCHES
from dymoe_runtime.text.sampling import LIMITS, SamplingParams
from dymoe_runtime.text.tokenizer import Tokenizer

# How Python, and so chat templates, write what JSON writes otherwise. As texts they would all be true.
CONSTANTS = {"True": True, "False": False, "None": None}


def sampling(tokenizer: Tokenizer, flags: RunFlags) -> SamplingParams:
    """Return the settings that the model asks for, with those that the flags give; raise DymoeError as these do."""
    given = {name: value for name in LIMITS if (value := getattr(flags, name)) is not None}
    return replace(SamplingParams() if flags.greedy else tokenizer.sampling, **given)


def grammar(tokenizer: Tokenizer, flags: RunFlags) -> Grammar | None:
    """Return the grammar that answers must follow; raise DymoeError if it cannot be used."""
    if flags.grammar is None and flags.json_schema is None:
        return None
    if flags.grammar is not None:
        text = read_text(flags.grammar, "give a grammar in GBNF or Lark")
        return Grammars(tokenizer).grammar(text, f"--grammar {flags.grammar}")
    schema, where = flags.json_schema or "", "--json-schema"
    if not schema.lstrip().startswith("{"):
        where = f"{where} {schema}"
        schema = read_text(Path(schema), "give a JSON schema, or the file that it is in")
    return Grammars(tokenizer).json_schema(schema, where)


def template_variables(tokenizer: Tokenizer, flags: RunFlags) -> dict[str, Any]:
    """Return the variables for the chat template; raise DymoeError if it does not read one of them."""
    values = dict(_variable(entry) for entry in flags.template_var)
    tokenizer.check_variables(values)
    if flags.thinking is not None:
        switches = [name for name in SWITCHES if name in tokenizer.template_variables]
        if not switches:
            flag = "--thinking" if flags.thinking else "--no-thinking"
            raise DymoeError(
                f"{flag}: the model's chat template has no switch for reasoning "
                f"(variables that it reads: {', '.join(sorted(tokenizer.template_variables)) or 'none'}); leave it out"
            )
        if twice := [name for name in switches if name in values]:
            raise click.UsageError(f"--template-var {twice[0]} and --thinking or --no-thinking exclude each other")
        values |= dict.fromkeys(switches, flags.thinking)
    return values


def _variable(entry: str) -> tuple[str, Any]:
    """Return the name and the value of NAME=VALUE; a value that is neither JSON nor a constant is a text."""
    name, mark, value = entry.partition("=")
    if not name or not mark:
        raise click.UsageError(f"--template-var {entry}: expected NAME=VALUE")
    if value in CONSTANTS:
        return name, CONSTANTS[value]
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value
