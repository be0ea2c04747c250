"""The environment of chat templates: that of transformers' `apply_chat_template`, with a meter on all that it does."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Mapping
from datetime import datetime
from types import GeneratorType
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.tests
import jinja2.utils
import markupsafe

from dymoe_runtime.text.chat_template import costs, rewrite
from dymoe_runtime.text.chat_template.meter import ENTRY, VALUE, LimitError, Meter

# Most characters of a format of dates; the C library pads with as many as the format says.
MAX_DATE = 256
COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
    "in": lambda value, values: value in values,
    "notin": lambda value, values: value not in values,
}
# Objects of Jinja's whose calls run code of the template, which counts for itself.
_OWN = (jinja2.runtime.Macro, jinja2.runtime.LoopContext, jinja2.runtime.BlockReference, jinja2.runtime.Undefined)


class GenerationTag(jinja2.ext.Extension):
    """The tag `{% generation %}`: it marks what a trainer learns from, and only opens a scope for rendering."""

    tags = {"generation"}  # noqa: RUF012, jinja2 declares it mutable

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class Namespace(jinja2.utils.Namespace):
    """A namespace that refuses underscored names, with which a template could reach behind the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named self: namespace(self=...) is legal
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:  # what it holds may be too large to print
        return "<Namespace>"


def _refuse_underscore(name: str) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


class MeteredEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox whose templates, changed by `rewrite.counted`, tell a meter what they do before they do it."""

    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)

    def __init__(self, meter: Meter) -> None:
        """Count with `meter`."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while a template is compiled, where nothing counts
            extensions=[GenerationTag, jinja2.ext.loopcontrols],
        )
        self._meter = meter
        functions = {**jinja2.filters.FILTERS, "tojson": to_json}
        self.filters = {name: _counting(meter, functions[name], cost) for name, cost in costs.FILTERS.items()}
        self.filters |= _hidden(meter)
        self.tests = {
            name: self._test(name, cast(Callable[..., Any], test)) for name, test in jinja2.tests.TESTS.items()
        }
        del self.globals["lipsum"]  # makes as much text as it is told
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = Namespace

    def _test(self, name: str, test: Callable[..., Any]) -> Callable[..., Any]:
        comparison = _COMPARING.get(name)
        if comparison is not None:
            return functools.partial(_compare, self._meter, comparison)
        return _counting(self._meter, test, costs.TESTS[name]) if name in costs.TESTS else test

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a filter whose name is a value, as `map` does."""
        if name in rewrite.COUNTED:
            raise jinja2.TemplateRuntimeError(f"No filter named {name!r}.")
        return super().call_filter(name, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Return the result of an operation that is not too large."""
        self._meter.make(costs.arithmetic(self._meter, operator, left, right))
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an entry, or an attribute."""
        if type(argument) is str:
            self._meter.read(len(argument))
        elif type(argument) is not int:
            self._meter.measure(argument)  # it is hashed, or written in a message
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may read an attribute: of Python's own types only what has a cost."""
        known = costs.attributes_of(obj)
        return (known is None or attr in known) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return the method `format` of a text with a meter on each field."""
        if super().wrap_str_format(value) is None:
            return None
        text, by_mapping = value.__self__, value.__name__ == "format_map"
        formatter: jinja2.sandbox.SandboxedFormatter = (
            _EscapingFormatter(self, self._meter, escape=text.escape)
            if isinstance(text, markupsafe.Markup)
            else _Formatter(self, self._meter)
        )

        def formatted(*args: Any, **kwargs: Any) -> str:
            self._meter.make(len(text))
            whole = formatter.vformat(text, () if by_mapping else args, args[0] if by_mapping else kwargs)
            return cast(str, type(text)(whole))

        return formatted

    def call(
        __self,  # a template may pass arguments of any name
        __context: jinja2.runtime.Context,
        __callee: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Call a function or method once it is known not to make too much."""
        if isinstance(__callee, _OWN):
            __self._meter.step()
            return super().call(__context, __callee, *args, **kwargs)
        meter = __self._meter
        for name in ("_loop_vars", "_block_vars"):  # Jinja's own, for functions that read the context
            kwargs.pop(name, None)
        args = tuple(costs.opened(meter, argument) for argument in args)
        bound = costs.WORD + __self._bound(__callee, args, kwargs)
        meter.make(bound)
        return _settled(meter, bound, super().call(__context, __callee, *args, **kwargs))

    def _bound(self, callee: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        owner = getattr(callee, "__self__", None)
        known = costs.attributes_of(owner) if owner is not None else None
        if known is None:
            size = self._meter.measure((args, kwargs))
            return size.characters + ENTRY * size.values
        cost = known.get(getattr(callee, "__name__", ""))
        if cost is None:
            raise jinja2.exceptions.SecurityError(f"{type(owner).__name__} has no such method for templates")
        return cost(self._meter, owner, *args, **kwargs)


_COMPARING = {name: test for name, test in jinja2.tests.TESTS.items() if test in set(COMPARISONS.values())} | {
    "in": COMPARISONS["in"]
}


class _Formatter(jinja2.sandbox.SandboxedFormatter):
    """Formats the fields of a text, each of which may be padded."""

    def __init__(self, environment: jinja2.Environment, meter: Meter, **options: Any) -> None:
        super().__init__(environment, **options)
        self._meter = meter

    def format_field(self, value: Any, format_spec: str) -> Any:
        self._meter.step(VALUE)
        width = costs.widths_in(format_spec)
        self._meter.make(costs.ENTITY * (width + costs.FLOAT + costs.length_of(self._meter, value)))
        return super().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion is not None:
            self._meter.make(costs.LITERAL * costs.length_of(self._meter, value))
        return super().convert_field(value, conversion)


class _EscapingFormatter(_Formatter, jinja2.sandbox.SandboxedEscapeFormatter):
    """Formats the fields of Markup."""


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without HTML escapes, which Jinja's own `tojson` would put into a prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > MAX_DATE:
        raise LimitError(f"it formats a date by more than {MAX_DATE} characters")
    return datetime.now().strftime(form)


def _counting(meter: Meter, function: Callable[..., Any], cost: costs.Cost) -> Callable[..., Any]:
    """Return a filter or test that takes what it costs first, and that returns no generator."""
    passed = int(hasattr(function, "jinja_pass_arg"))  # the context or environment comes first
    lazy = cost is costs.free

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        own, values = args[:passed], args[passed:]
        if values and not lazy:
            values = (costs.opened(meter, values[0]), *values[1:])
        bound = VALUE + cost(meter, *values, **kwargs)
        meter.make(bound)
        return _settled(meter, bound, function(*own, *values, **kwargs))

    return counted


def _settled(meter: Meter, bound: int, result: Any) -> Any:
    """Return a result, and what it has not used of `bound`; a generator becomes an iterator over what it made."""
    if isinstance(result, GeneratorType):  # true in conditions, and read once, as a generator is
        return iter(list(result))
    if isinstance(result, str):
        meter.give_back(bound - len(result) - VALUE)
    return result


def _compare(meter: Meter, comparison: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    """Return what a comparison says; one of lists takes the steps for reading both."""
    if comparison is COMPARISONS["in"] or comparison is COMPARISONS["notin"]:
        right = costs.opened(meter, right)
        _look_for(meter, left, right)
    elif isinstance(left, (str, int, float)) or isinstance(right, (str, int, float)):
        meter.read(min(len(left), len(right)) if isinstance(left, str) and isinstance(right, str) else 0)
    else:
        meter.measure((left, right))
    return comparison(left, right)


def _look_for(meter: Meter, value: Any, values: Any) -> None:
    if isinstance(values, str):
        costs.searched(meter, values, value)
    elif not isinstance(value, (str, int, float)):
        meter.measure((value, values))
    elif not isinstance(values, dict):
        meter.step(operator.length_hint(values, 0))


def _hidden(meter: Meter) -> dict[str, Callable[..., Any]]:
    """Return the filters that `rewrite.counted` writes into templates.

    They take the context so that Jinja computes none of them while it compiles.
    """

    def step(_: Any, units: int) -> bool:
        meter.step(units)
        return True

    def emit(context: jinja2.runtime.Context, value: Any) -> Any:
        length = len(value) if isinstance(value, str) else costs.length_of(meter, value)
        meter.make(ENTRY + (costs.ENTITY * length if context.eval_ctx.autoescape else length))
        return value

    def concat(context: jinja2.runtime.Context, *values: Any) -> str:
        escaped = context.eval_ctx.autoescape
        bound = VALUE + (costs.ENTITY if escaped else 1) * sum(costs.length_of(meter, v) for v in values)
        meter.make(bound)
        joined = jinja2.runtime.markup_join(values) if escaped else jinja2.runtime.str_join(values)
        return cast(str, _settled(meter, bound, joined))

    def compare(_: Any, left: Any, name: str, right: Any) -> Any:
        return _compare(meter, COMPARISONS[name], left, right)

    def sliced(_: Any, value: Any, start: Any, stop: Any, step: Any) -> Any:
        part = slice(start, stop, step)
        if hasattr(type(value), "__len__"):
            entries = len(range(*part.indices(len(value))))
            meter.make(VALUE + entries * (1 if isinstance(value, str) else ENTRY))
        return value[part]

    def literal(_: Any, value: Any) -> Any:
        each = costs.WORD if isinstance(value, (dict, str, range)) else ENTRY
        meter.make(costs.WORD + each * operator.length_hint(value, 0))
        return value

    def measure(_: Any, value: Any) -> Any:
        value = costs.opened(meter, value)
        if isinstance(value, str):
            meter.read(len(value))
        else:
            meter.measure(value)
        return value

    functions: tuple[Callable[..., Any], ...] = (step, emit, concat, compare, sliced, literal, measure)
    return {name: jinja2.pass_context(f) for name, f in zip(rewrite.COUNTED, functions, strict=True)}
