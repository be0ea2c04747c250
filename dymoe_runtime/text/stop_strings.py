"""Stop strings: text before which an answer ends."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """A filter that cuts a stream of text before the stop string that is complete first.

    If two are complete at the same character, the longer one counts. Text that could still begin a stop string is held
    back, so the result does not depend on how the stream is divided.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Return the text that may be shown now; empty once a stop string was found."""
        if self.found or not text:
            return ""
        text = self._held + text
        self.found, shown = self._search(text)
        self._held = "" if self.found else text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """Return the text held back; call it at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _search(self, text: str) -> tuple[bool, int]:
        """Return whether a stop string is in `text`, and the number of characters that may be shown."""
        starts = [(start + len(s), start) for s in self._strings if (start := text.find(s)) >= 0]
        if starts:
            return True, min(starts)[1]
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(s.startswith(text[start:]) for s in self._strings):
                return False, start
        return False, len(text)
