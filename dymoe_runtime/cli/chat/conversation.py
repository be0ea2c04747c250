"""A conversation on a terminal: the session, and what its commands can change about it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe_runtime.cli.run_flags import RunFlags
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.engine.precision import choose_precision
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import parse_json, read_text, replacing
from dymoe_runtime.text.generate import Token
from dymoe_runtime.text.sampling import SamplingParams
from dymoe_runtime.text.session import Session

if TYPE_CHECKING:  # a long chain of imports that a command on a model has behind it anyway
    from dymoe_runtime.engine.model import Model

Message = dict[str, str]
# begin(system, history, params) returns a new session.
Begin = Callable[[str | None, Sequence[Message], SamplingParams], Session]
ROLES = ("system", "user", "assistant")
KEYS = ("role", "content", "reasoning_content", "thinking")
REMEDY = 'give a file that /save wrote: {"messages": [{"role": "user", "content": "..."}]}'


class Conversation:
    """A session that can be begun anew with other messages or another sampling, and the times of its last answer."""

    def __init__(
        self,
        model: Model,
        options: RunOptions,
        flags: RunFlags,
        session: Session,
        begin: Begin,
        describe: Callable[[dict[str, Any]], str],
    ) -> None:
        """Go on with `session` on `model`, which was loaded with `options`.

        `describe` turns statistics into text.
        """
        self.model, self.flags, self.session = model, flags, session
        self._options, self._begin, self._describe = options, begin, describe
        self._times = {"ttft_s": 0.0, "tpot_s": 0.0}

    @property
    def params(self) -> SamplingParams:
        """Return how answers are sampled."""
        return self.session.params

    @property
    def system(self) -> str | None:
        """Return the system message."""
        return next((m["content"] for m in self.session.messages if m["role"] == "system"), None)

    def ask(self, text: str) -> Iterator[Token]:
        """Yield the answer to a message."""
        flags = self.flags
        return self._timed(self.session.reply(text, None, flags.max_tokens, flags.stop, flags.ignore_eos))

    def retry(self) -> Iterator[Token]:
        """Yield another answer to the last question."""
        flags = self.flags
        return self._timed(self.session.retry(None, flags.max_tokens, flags.stop, flags.ignore_eos))

    def sample(self, **changes: Any) -> None:
        """Change the sampling from the next answer on; raise DymoeError for values that are not possible."""
        self.session.params = replace(self.params, **changes)

    def use_point(self, name: str) -> str:
        """Run another operating point from the next pass on.

        Returns a note if it is not exactly the requested one, or "". Raises DymoeError if there is no such point, or if
        the flags leave no choice.
        """
        for field, flag in (("tpot", "--tpot"), ("decisions", "--decisions")):
            if self.flags.given(field):
                raise DymoeError(f"{flag} chooses the point of this run; start without it to choose one here")
        options = replace(self._options, point=name, quality=None, tier=None)
        choice = choose_precision(self.model.bundle, options, self.model.budget.arena_bytes)
        self.model.use(choice.name, choice.rule)
        return choice.note

    def save(self, path: Path, overwrite: bool) -> None:
        """Write all messages to a file; raise DymoeError if it exists, unless `overwrite`, or cannot be written."""
        text = json.dumps({"messages": self.session.messages}, ensure_ascii=False, indent=1) + "\n"
        try:
            if not overwrite and os.path.lexists(path):
                raise DymoeError(f"{path} exists; give another name, or replace it with: /save --replace {path}")
            with replacing(path) as file:
                file.write(text.encode("utf-8", "surrogatepass"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DymoeError(f"{path}: {reason}; check the path and its permissions") from error

    def load(self, path: Path) -> None:
        """Go on with the messages of a file instead; raise DymoeError if it is not one of `save`."""
        try:
            values = parse_json(read_text(path, REMEDY), str(path), REMEDY)
        except ValueError as error:  # a path that no system takes
            raise DymoeError(f"{path}: {error}; {REMEDY}") from error
        system, history = _checked(values.get("messages"), str(path))
        self.session = self._begin(system, history, self.params)

    def statistics(self) -> str:
        """Return the statistics of the run, with the times of the last answer."""
        session = self.session
        return self._describe(
            self.model.statistics() | self._times | {"sampling": session.params.to_json(), "turn": session.last_turn}
        )

    def _timed(self, tokens: Iterator[Token]) -> Iterator[Token]:
        """Pass tokens on, and note the seconds to the first and per further token."""
        started, arrived = time.perf_counter(), list[float]()
        try:
            for token in tokens:
                arrived.append(time.perf_counter())
                yield token
        finally:
            tokens.close()  # type: ignore[attr-defined]
            if arrived:
                steps = max(len(arrived) - 1, 1)
                times = (arrived[0] - started, (arrived[-1] - arrived[0]) / steps)
                self._times = dict(zip(self._times, times, strict=True))


def _checked(messages: Any, where: str) -> tuple[str | None, list[Message]]:
    """Return the system message and the other messages of a file."""
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise DymoeError(f"{where}: not a conversation; {REMEDY}")
    system = [message["content"] for message in messages if message["role"] == "system"]
    if len(system) > 1 or (system and messages[0]["role"] != "system"):
        raise DymoeError(f"{where}: a system message that is not the first message; {REMEDY}")
    return (system[0] if system else None), [message for message in messages if message["role"] != "system"]


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"role", "content"} <= value.keys() <= set(KEYS)
        and all(isinstance(text, str) for text in value.values())
        and value["role"] in ROLES
    )
