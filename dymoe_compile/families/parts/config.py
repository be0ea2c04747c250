"""A config.json with typed accessors, which knows what nobody has read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from dymoe_runtime.errors import DymoeError

# Keys that change a model's mathematics contain one of these words. A family must read such a key, or the value must be
# one that changes nothing.
MATHEMATICAL = re.compile(
    "rope|rotary|softcap|multiplier|scal(e|ing)|window|chunk|clip|sink|gate|bias|norm|limit|alpha|temperature|layer_types"
    "|act|scor|use_cla|use_mla|pattern|interval|sparse|dense|shared|group|router|routed|topk|top_k|expert|moe|mup|residual"
    "|bidirectional"
)
# Keys with such a word that concern training, other programs or other modalities, or that repeat what others say.
HARMLESS = re.compile(
    "loss|jitter|dropout|initializer|interval_of_logging|output_router_logits|aux|z_coef|vision|^vit_|audio|image|video|_token"
    "|^top_k$|^top_p$|^temperature$|cache|_implementation|load_balanc|model_type|transformers_version|capacity|noise|warmup|dtype|parallel|mtp|nextn"
)
# The decoder computes in float32.
MAX_NUMBER = 1e38
NEUTRAL: tuple[Any, ...] = (None, False, 0, 1, [], {}, "", "none", "default")

_REQUIRED = object()


class Config:
    """A config.json with typed accessors.

    An accessor takes the first of the given names that is present and not null, else `default`. It raises a DymoeError
    that names the key if the value is missing or wrong.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self._read: set[str] = set()

    def get(self, *names: str, default: Any = _REQUIRED) -> Any:
        """Return the value of the first of `names` that is present and not null, else `default`."""
        self._read.update(names)
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        if default is _REQUIRED:
            raise DymoeError(f"config.json: '{names[0]}' is missing; copy config.json from the model's repository")
        return default

    def integer(self, *names: str, default: Any = _REQUIRED, least: int = 1, most: int = 1 << 31) -> int:
        """Return a whole number from `least` to `most`."""
        value = self.get(*names, default=default)
        if not _is_whole(value) or not least <= value <= most:
            self._refuse(names[0], value, f"a whole number from {least} to {most}")
        return int(value)

    def number(self, *names: str, default: Any = _REQUIRED, above: float = 0.0) -> float:
        """Return a number larger than `above`, which float32 can hold."""
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < MAX_NUMBER:
            self._refuse(names[0], value, f"a number above {above:g}, below {MAX_NUMBER:g}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """Return a boolean. Null is refused if `default` is true, because other programs take it as false."""
        value = self.get(name, default=default)
        null = default and name in self.values and self.values[name] is None
        if null or not isinstance(value, bool):
            self._refuse(name, self.values[name], "true or false")
        return bool(value)

    def optional_number(self, name: str) -> float | None:
        """Return a number above 0, or None if the key is missing or null."""
        return None if self.get(name, default=None) is None else self.number(name)

    def fixed(self, name: str, value: Any) -> None:
        """Raise DymoeError unless `name` is missing or null, or is `value`: no other one is supported."""
        given = self.get(name, default=value)
        if given != value:
            raise DymoeError(
                f"config.json: '{name}' is {_shown(given)}, model_type '{self.values.get('model_type')}' is supported "
                f"with {_shown(value)} only"
            )

    def integers(self, name: str, single: bool = False) -> tuple[int, ...]:
        """Return the whole numbers of a list, or with `single` of one number; empty if the key is missing."""
        value = self.get(name, default=[])
        values = [value] if single and _is_whole(value) else value
        if not isinstance(values, list) or not all(_is_whole(item) and 0 <= item < 1 << 31 for item in values):
            self._refuse(name, value, "a list of whole numbers from 0")
        return tuple(values)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """Return the `count` numbers above 0 of a list, each of which float32 can hold."""
        values = self.get(name)
        if not isinstance(values, list) or len(values) != count:
            self._refuse(name, values, f"a list of {count} numbers")
        return tuple(Config({name: value}).number(name) for value in values)

    def string(self, name: str) -> str:
        """Return a string that is not empty."""
        value = self.get(name)
        if not isinstance(value, str) or not value:
            self._refuse(name, value, "a name")
        return str(value)

    def choice(self, *names: str, default: str, known: Iterable[str]) -> str:
        """Return a string that must be one of `known`."""
        value = self.get(*names, default=default)
        if value not in tuple(known):
            self._refuse(names[0], value, f"one of those supported: {', '.join(known)}")
        return str(value)

    def mapping(self, name: str) -> dict[str, Any]:
        """Return a copy of an object; empty if the key is missing."""
        value = self.get(name, default={})
        if not isinstance(value, dict):
            self._refuse(name, value, "an object")
        return dict(value)

    def ignore(self, *names: str) -> None:
        """Count keys as read, because they change nothing in this model."""
        self._read.update(names)

    def view(self, **values: Any) -> Config:
        """Return this configuration with other values. Keys that are read from it count as read here, too."""
        view = Config({**self.values, **values})
        view._read = self._read
        return view

    def unread(self) -> list[str]:
        """Return the keys with a value that nobody has read."""
        return [name for name, value in self.values.items() if name not in self._read and value is not None]

    def check_read(self) -> None:
        """Raise DymoeError for a key that may change the mathematics, but that nobody has read."""
        for name, value in self.values.items():
            neutral = value is not True and value in NEUTRAL
            if name in self._read or neutral or not MATHEMATICAL.search(name) or HARMLESS.search(name):
                continue
            raise DymoeError(
                f"config.json: '{name}' is {str(value)[:60]!r}, which this version does not know for model_type "
                f"'{self.values.get('model_type')}'; it may change the results, so this variant is not supported"
            )

    @staticmethod
    def _refuse(name: str, value: Any, expected: str) -> NoReturn:
        raise DymoeError(f"config.json: '{name}' is {str(value)[:60]!r}, expected {expected}")


def _shown(value: Any) -> str:
    """Return a value as JSON writes it, cut to 60 characters."""
    return json.dumps(value)[:60]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
