"""What filters and methods make: for each, a function that returns how many characters at most, before they are made.

Such a function takes the meter and the arguments of the filter or method. It takes the steps itself where reading costs
more than writing. A filter or method without one is not there for templates.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from dymoe_runtime.text.chat_template.meter import ENTRY, PER_STEP, VALUE, VIEWS, LimitError, Meter

Cost = Callable[..., int]

# Most bits of an integer; Python's own operations on such integers are fast, and so is writing them.
MAX_BITS = 4096
# Most characters of a text that is read as a number, as Python itself limits them.
MAX_DIGITS = 4300
# What a character may become: three by changing its case, six as an HTML entity or in JSON, ten in a Python literal,
# twelve in a URL and in JSON of ASCII.
CASE, ENTITY, LITERAL, ASCII = 3, 6, 10, 12
# A float without exponent, such as '%f' writes it.
FLOAT = 330
# Characters of 4 bytes that a list of words or characters takes for each.
WORD = 24
WHITESPACE = tuple(map(chr, [*range(9, 14), *range(28, 33), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)])) + tuple(
    map(chr, [0x2028, 0x2029, 0x202F, 0x205F, 0x3000])
)


def length_of(meter: Meter, value: Any) -> int:
    """Return how long the text of a value is at most, and take the steps for reading it."""
    if isinstance(value, str):
        meter.read(len(value))
        return len(value)
    size = meter.measure(value)
    return LITERAL * size.characters + VALUE * size.values


def entries_of(value: Any) -> int:
    """Return what a list of the entries of a value takes."""
    return operator.length_hint(value, 0) * (WORD if isinstance(value, (str, range)) else ENTRY)


def free(meter: Meter, *args: Any, **kwargs: Any) -> int:
    """Return 0: nothing is made."""
    return 0


def reads(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> int:
    """Take the steps for reading a text; nothing is made."""
    length_of(meter, value)
    for argument in (*args, *kwargs.values()):
        length_of(meter, argument)
    return 0


def grows(factor: int) -> Cost:
    """Return the cost of a text that becomes longer by at most `factor`."""

    def cost(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> int:
        return factor * length_of(meter, value)

    return cost


def quadratic(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> int:
    """Take the steps for reading a text again and again; it may be cut into words, with an argument between them."""
    length = length_of(meter, value)
    meter.read(length * length)
    return length * (WORD + sum(len(argument) for argument in (*args, *kwargs.values()) if isinstance(argument, str)))


def stripped(meter: Meter, value: Any, chars: Any = None, /) -> int:
    """Return the cost of removing `chars` from the ends: each character is looked for among them."""
    length = length_of(meter, value)
    meter.read(length * length_of(meter, chars or ""))
    return length


def trimmed(meter: Meter, value: Any, chars: Any = None) -> int:
    """Return the cost of the filter `trim`, whose argument has a name."""
    return stripped(meter, value, chars)


def searched(meter: Meter, text: str, part: Any, *bounds: Any) -> int:
    """Take the steps for looking for `part`, which can be slow at every character of the text."""
    part_length = len(part) if isinstance(part, str) else length_of(meter, part)
    meter.read(len(text) * (4 + part_length) // 4)
    return 0


def split(meter: Meter, text: str, sep: Any = None, maxsplit: Any = -1) -> int:
    """Return the cost of cutting a text into parts."""
    if sep:
        searched(meter, text, sep)
    meter.read(len(WHITESPACE) * len(text) // 4)
    parts = text.count(sep) if sep else sum(map(text.count, WHITESPACE))
    return len(text) + WORD * (1 + (min(parts, maxsplit) if maxsplit >= 0 else parts))


def split_lines(meter: Meter, text: str, keepends: Any = False) -> int:
    """Return the cost of cutting a text into lines."""
    return split(meter, text)


def parted(meter: Meter, text: str, sep: Any) -> int:
    """Return the cost of cutting a text into three."""
    return searched(meter, text, sep) + len(text) + 3 * WORD


def replaced(meter: Meter, value: Any, old: Any, new: Any, count: Any = None) -> int:
    """Return the cost of a text with something else in place of a part."""
    text, part = str_of(meter, value), str_of(meter, old)
    searched(meter, text, part)
    found = text.count(part)
    times = found if count is None or count < 0 else min(found, count)
    return ENTITY * (len(text) + times * length_of(meter, new))


def str_of(meter: Meter, value: Any) -> str:
    """Return the text of a value once it is known not to be long."""
    length = length_of(meter, value)
    if isinstance(value, str):
        return value
    meter.make(length)
    return str(value)


def joined(meter: Meter, value: Any, separator: Any = "", attribute: Any = None) -> int:
    """Return the cost of one text of many."""
    return ENTITY * (length_of(meter, _all(value)) + operator.length_hint(value, 0) * length_of(meter, separator))


def _all(value: Any) -> Any:
    """Return the characters of a text as it is, and other values as a list."""
    return [value] if isinstance(value, str) else value


def joined_by(meter: Meter, separator: str, parts: Any) -> int:
    """Return the cost of the method `join`."""
    return joined(meter, parts, separator)


def padded(meter: Meter, value: Any, width: int = 80, fill: Any = " ") -> int:
    """Return the cost of a text that is filled up."""
    return max(length_of(meter, value), width)


def expanded(meter: Meter, text: str, tabsize: int = 8) -> int:
    """Return the cost of a text with spaces in place of tabs."""
    return length_of(meter, text) + text.count("\t") * max(tabsize, 0)


def indented(meter: Meter, value: Any, width: Any = 4, first: Any = False, blank: Any = False) -> int:
    """Return the cost of a text with something before each line."""
    length = length_of(meter, value)
    lines = 2 + sum(map(value.count, WHITESPACE)) if isinstance(value, str) else length
    return length + lines * (WORD + (len(width) if isinstance(width, str) else max(width, 0)))


def truncated(meter: Meter, value: Any, length: Any = 255, killwords: Any = False, end: Any = "...", *_: Any) -> int:
    """Return the cost of the beginning of a text."""
    return length_of(meter, value) + length_of(meter, end)


def as_json(
    meter: Meter,
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> int:
    """Return the cost of JSON."""
    size = meter.measure(value)
    step = len(indent) if isinstance(indent, str) else max(indent or 0, 0)
    between = VALUE + step * (size.depth + 1) + length_of(meter, separators or "")
    return (ASCII if ensure_ascii else ENTITY) * size.characters + size.values * between


def listed(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> int:
    """Return the cost of a list of the entries of a value, with arguments that are looked at for each."""
    for argument in (*args, *kwargs.values()):
        length_of(meter, argument)
    return entries_of(value)


def paired(meter: Meter, value: Any) -> int:
    """Return the cost of the keys and values of a mapping in pairs."""
    return WORD * operator.length_hint(value, 0)


def compared(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> int:
    """Return the cost of an order: each entry is compared with others, in lower case."""
    size = meter.measure(value)
    values = size.values + (len(value) if isinstance(value, str) else 0)
    meter.step(values.bit_length() * (values + size.characters // PER_STEP))
    for argument in (*args, *kwargs.values()):
        length_of(meter, argument)
    return CASE * size.characters + WORD * values


def summed(meter: Meter, value: Any, attribute: Any = None, start: Any = 0) -> int:
    """Return the cost of a sum; one of lists copies them again and again."""
    size, first = meter.measure(value), meter.measure(start)
    if first.values > 1 or not isinstance(start, (int, float)):
        meter.step(size.values * (size.values + first.values))
    return ENTRY * (size.values + first.values)


def batched(meter: Meter, value: Any, linecount: int, fill_with: Any = None) -> int:
    """Return the cost of lists of `linecount` entries."""
    filled = 0 if fill_with is None else max(linecount, 0)
    return WORD * operator.length_hint(value, 0) + entries_of(value) + ENTRY * filled


def sliced(meter: Meter, value: Any, slices: int, fill_with: Any = None) -> int:
    """Return the cost of `slices` lists."""
    return entries_of(value) + WORD * max(slices, 0)


def rounded(meter: Meter, value: Any, precision: Any = 0, method: Any = "common") -> int:
    """Raise LimitError where rounding would make a huge power of ten."""
    if abs(precision) > FLOAT:
        raise LimitError(f"it rounds to more than {FLOAT} digits")
    return VALUE


def number(meter: Meter, value: Any, default: Any = 0, base: Any = 10) -> int:
    """Raise LimitError where a text has too many digits for a number."""
    if isinstance(value, str) and len(value) > MAX_DIGITS:
        raise LimitError(f"it makes a number of more than {MAX_DIGITS:,} digits")
    return VALUE


def percent(meter: Meter, text: Any, *args: Any, **kwargs: Any) -> int:
    """Return the cost of a text with values in the places that % marks."""
    form = str_of(meter, text)
    size = meter.measure((args, kwargs))
    widths = widths_in(form)
    if "*" in form:  # the width is one of the values
        widths += form.count("*") * _largest(args)
    each = LITERAL * size.characters + VALUE * size.values + FLOAT
    return ENTITY * (len(form) + widths + form.count("%") * each)


def widths_in(form: str) -> int:
    """Return the sum of all numbers in a format: more than what it can pad its values with."""
    found = re.findall(r"\d+", form)  # of any script, as str.format reads them
    if any(len(digits) > 9 for digits in found):
        raise LimitError("it formats a value with a width of more than 9 digits")
    return sum(map(int, found))


def _largest(args: Any) -> int:
    values = args[0] if len(args) == 1 and isinstance(args[0], tuple) else args
    return max((abs(value) for value in values if isinstance(value, int)), default=0)


def among(meter: Meter, value: Any, *args: Any) -> int:
    """Take the steps for looking for an entry in a list."""
    meter.step(len(value))
    if not all(isinstance(argument, (str, int, float)) for argument in args):
        meter.measure((value, args))
    return 0


def copied(meter: Meter, value: Any) -> int:
    """Return the cost of a copy of a list or mapping."""
    return WORD * (1 + len(value))


def looked_up(meter: Meter, value: Any, key: Any, default: Any = None) -> int:
    """Take the steps for hashing a key."""
    meter.measure(key)
    return 0


FILTERS: Mapping[str, Cost] = {
    **dict.fromkeys(("abs", "attr", "count", "d", "default", "first", "last", "length"), free),
    **dict.fromkeys(("random", "reverse"), listed),
    **dict.fromkeys(("list", "map", "reject", "rejectattr", "select", "selectattr"), listed),
    **dict.fromkeys(("dictsort", "groupby", "max", "min", "sort", "unique"), compared),
    **dict.fromkeys(("capitalize", "lower", "upper"), grows(CASE)),
    **dict.fromkeys(("e", "escape", "forceescape"), grows(ENTITY)),
    **dict.fromkeys(("safe", "string"), grows(1)),
    **dict.fromkeys(("title", "wordcount"), grows(WORD)),
    **dict.fromkeys(("striptags", "wordwrap"), quadratic),
    "batch": batched,
    "center": padded,
    "filesizeformat": reads,
    "float": reads,
    "format": percent,
    "indent": indented,
    "int": number,
    "items": paired,
    "join": joined,
    "replace": replaced,
    "round": rounded,
    "slice": sliced,
    "sum": summed,
    "tojson": as_json,
    "trim": trimmed,
    "truncate": truncated,
    "urlencode": grows(ASCII),
}

TESTS: Mapping[str, Cost] = dict.fromkeys(("lower", "upper"), reads)

_TEXT: Mapping[str, Cost] = {
    **dict.fromkeys(("capitalize", "casefold", "lower", "swapcase", "title", "upper"), grows(CASE)),
    **dict.fromkeys(("count", "endswith", "find", "index", "rfind", "rindex", "startswith"), searched),
    **dict.fromkeys(("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower"), reads),
    **dict.fromkeys(("isnumeric", "isprintable", "isspace", "istitle", "isupper"), reads),
    **dict.fromkeys(("lstrip", "rstrip", "strip"), stripped),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), padded),
    **dict.fromkeys(("partition", "rpartition"), parted),
    **dict.fromkeys(("removeprefix", "removesuffix"), grows(1)),
    **dict.fromkeys(("rsplit", "split"), split),
    "expandtabs": expanded,
    "join": joined_by,
    "replace": replaced,
    "splitlines": split_lines,
}
_ENTRIES: Mapping[str, Cost] = {"copy": copied, "count": among, "index": among}
_MAPPING: Mapping[str, Cost] = {
    **dict.fromkeys(("items", "keys", "values"), free),
    "copy": copied,
    "get": looked_up,
}
# The attributes of Python's own types that templates may read, and what calling them costs.
ATTRIBUTES: Mapping[type, Mapping[str, Cost]] = {
    str: _TEXT,
    dict: _MAPPING,
    list: _ENTRIES,
    tuple: _ENTRIES,
    **{number: {"is_integer": free} for number in (bool, int, float)},
    **{own: {} for own in (complex, bytes, type(None), range, type, *VIEWS)},
}


def attributes_of(value: Any) -> Mapping[str, Cost] | None:
    """Return the attributes of a value of Python's own types, or None of another value."""
    table = ATTRIBUTES.get(type(value))
    if table is not None:
        return table
    return next((table for own, table in ATTRIBUTES.items() if isinstance(value, own)), None)


def arithmetic(meter: Meter, sign: str, left: Any, right: Any) -> int:
    """Return the cost of a binary operation; raise LimitError where its result would be a huge number."""
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        if isinstance(left, int) and isinstance(right, int):
            _check_integer(sign, left, right)
        return VALUE
    if sign == "*":
        return VALUE + max(_times(meter, left, right), _times(meter, right, left))
    if sign == "%" and isinstance(left, str):
        return percent(meter, left, right)
    if isinstance(left, str) and isinstance(right, str):
        factor = 1 if type(left) is type(right) is str else ENTITY
        return VALUE + factor * (len(left) + len(right))
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return VALUE + ENTRY * (len(left) + len(right))
    meter.measure((left, right))
    return VALUE


def _check_integer(sign: str, left: int, right: int) -> None:
    bits = max(left.bit_length(), right.bit_length())
    if sign == "*":
        bits = left.bit_length() + right.bit_length()
    elif sign == "**":
        bits = left.bit_length() * max(right, 0)
    if bits > MAX_BITS:
        raise LimitError(f"it makes a number of more than {MAX_BITS:,} bits")


def _times(meter: Meter, value: Any, count: Any) -> int:
    """Return the size of a text or list that is repeated, 0 of other values."""
    if not isinstance(count, int) or not isinstance(value, (str, list, tuple)):
        return 0
    return max(count, 0) * len(value) * (1 if isinstance(value, str) else ENTRY)


def opened(meter: Meter, value: Any) -> Any:
    """Return what an iterator has left as a list, which can be measured, and other values as they are."""
    if not hasattr(value, "__next__"):
        return value
    meter.make(entries_of(value))
    return list(value)
