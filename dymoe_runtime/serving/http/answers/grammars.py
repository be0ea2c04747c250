"""Grammars of requests, compiled once."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dymoe_runtime.text.constraints.constraint import Constraint, Grammar

if TYPE_CHECKING:  # long chains of imports, for annotations alone
    from dymoe_runtime.text.constraints.grammars import Grammars
    from dymoe_runtime.text.tokenizer import Tokenizer
    from dymoe_runtime.text.tool_calls.parser import Format

# Compiled grammars that are kept for further requests.
KEPT = 16


class CompiledGrammars:
    """The grammars of late requests for one tokenizer. One thread may use it at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Import nothing yet: many servers never need a grammar."""
        self._tokenizer = tokenizer
        self._grammars: Grammars | None = None
        self._kept: OrderedDict[tuple[str, str], Grammar] = OrderedDict()

    def json(self, schema: Mapping[str, Any] | bool | None, where: str) -> Callable[[], Constraint]:
        """Return what makes constraints of a JSON schema, or of any object for True; raise DymoeError for a bad one."""
        if schema is True:
            return self._compiled(("object", ""), lambda grammars: grammars.json_object())
        text = json.dumps(schema)
        return self._compiled(("schema", text), lambda grammars: grammars.json_schema(text, where))

    def grammar(self, text: str, where: str) -> Callable[[], Constraint]:
        """Return what makes constraints of a grammar in GBNF or Lark; raise DymoeError for a bad one."""
        return self._compiled(("grammar", text), lambda grammars: grammars.grammar(text, where))

    def calls(
        self, form: Format, definitions: Sequence[Mapping[str, Any]], many: bool, where: str
    ) -> Callable[[], Constraint]:
        """Return what makes constraints of answers that must call tools; raise DymoeError where that cannot be held."""
        key = ("several" if many else "one", json.dumps(definitions))
        return self._compiled(key, lambda grammars: grammars.calls(form, definitions, many, where))

    def _compiled(self, key: tuple[str, str], compile: Callable[[Grammars], Grammar]) -> Callable[[], Constraint]:
        if self._grammars is None:
            from dymoe_runtime.text.constraints.grammars import Grammars  # takes memory

            self._grammars = Grammars(self._tokenizer)
        made = self._kept.pop(key, None) or compile(self._grammars)
        self._kept[key] = made
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return made.constraint
