"""What a template may use up: steps, characters that it makes, and characters of output."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

# What a rendering may use whatever its messages are. A step takes less than a microsecond on a computer of 2020. A
# character takes at most 4 bytes.
STEPS, CHARACTERS, OUTPUT = 1_000_000, 3_000_000, 100_000
# Lists within lists, and so on. JSON schemas of tools nest about 20 deep.
MAX_DEPTH = 100
# How often all that the messages and tools say may be copied, at most.
MAX_COPIES = 200
# Characters that are read or copied in the time of one step.
PER_STEP = 64
# What a value takes beside its text, and what a list takes for each entry, in characters of 4 bytes.
VALUE, ENTRY = 16, 4
# What a mapping's keys(), values() and items() are.
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
CONTAINERS = (dict, list, tuple, set, frozenset, *VIEWS)


class LimitError(Exception):
    """A template asks for more than it may use; the message says which limit."""


@dataclass(frozen=True)
class Limits:
    """How much a rendering may use."""

    steps: int = STEPS
    characters: int = CHARACTERS
    output: int = OUTPUT

    @classmethod
    def of(cls, variables: Mapping[str, Any]) -> Limits:
        """Return limits that grow with the messages and the other variables of a template.

        A template may look at every character, and at every message for every message. Some add one tool after another
        to a text, which copies it as often as there are tools. Raises LimitError if a variable is nested too deeply.
        """
        size = Meter().measure(variables)
        longest = max((len(value) for value in variables.values() if isinstance(value, (list, tuple))), default=0)
        weight = size.characters + VALUE * size.values
        return cls(
            steps=STEPS + 1000 * size.values + 64 * weight + 50 * longest**2,
            characters=CHARACTERS + (32 + min(longest, MAX_COPIES)) * weight,
            output=OUTPUT + 16 * weight,
        )


class Size(NamedTuple):
    """How large a value is; what it holds twice counts twice."""

    characters: int
    values: int
    depth: int


class Meter:
    """Counts what a rendering uses, before it uses it."""

    def __init__(self, limits: Limits | None = None) -> None:
        """Begin to count against `limits`; without any, count nothing but depth."""
        self._limits = limits or Limits()
        unlimited = limits is None
        self._steps = float("inf") if unlimited else float(self._limits.steps)
        self._characters = float("inf") if unlimited else float(self._limits.characters)

    def step(self, count: int = 1) -> None:
        """Take steps; raise LimitError if there are none left."""
        self._steps -= count
        if self._steps < 0:
            raise LimitError(f"it takes more than {self._limits.steps:,} steps")

    def read(self, characters: int) -> None:
        """Take the steps for reading so many characters."""
        self.step(characters // PER_STEP)

    def make(self, characters: int) -> None:
        """Take the room for a value that is made next, and the time; raise LimitError if either is used up."""
        self._characters -= characters
        if self._characters < 0:
            raise LimitError(f"it makes values of more than {self._limits.characters:,} characters in all")
        self.step(1 + characters // PER_STEP)

    def give_back(self, characters: int) -> None:
        """Return room that `make` took and the value does not need."""
        self._characters += max(characters, 0)

    def measure(self, value: Any) -> Size:
        """Return the size of all that a value holds.

        A list that holds another twice looks twice as large, and so do its text, its JSON and its comparison. Raises
        LimitError if that takes too many steps, or if it is nested too deeply.
        """
        characters = values = deepest = 0
        open_values: list[Iterator[Any]] = [iter((value,))]
        while open_values:
            for item in open_values[-1]:
                values += 1
                self.step()
                if isinstance(item, str):
                    characters += len(item)
                elif isinstance(item, CONTAINERS):
                    open_values.append(_held(item))
                    break
                elif isinstance(item, range):
                    values += len(item)
                    self.step(len(item))
                else:
                    characters += _digits(item)
            else:
                open_values.pop()
            deepest = max(deepest, len(open_values))
            if deepest > MAX_DEPTH:
                raise LimitError(f"it nests values more than {MAX_DEPTH} deep")
        return Size(characters, values, deepest)


def _held(container: Any) -> Iterator[Any]:
    """Return what a container holds: of a mapping its keys, then its values."""
    return itertools.chain(container, container.values()) if isinstance(container, dict) else iter(container)


def _digits(value: Any) -> int:
    return value.bit_length() // 3 if isinstance(value, int) else 16
