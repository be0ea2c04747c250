"""Reasoning: what a model thinks before it answers, told apart from the answer by the marks of its template."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

# Marks around reasoning, as templates and models write them.
TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),  # Gemma 4, whose first mark is a special token and a word
    ("<think:opensource>", "</think:opensource>"),
)
# Harmony, the format of gpt-oss: <|channel|>NAME<|message|>TEXT<|end|>; the answer is in the channel "final". A message
# to a function has "to=functions.NAME" in its header.
CHANNEL, MESSAGE, END, START, CALL = "<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>"
FINAL = "final"
# Variables by which chat templates switch reasoning on and off.
SWITCHES = ("enable_thinking", "thinking")
_RECIPIENT = re.compile(r"\bto=([\w.-]+)")
# Solar Open: <|begin|>assistant<|think|>TEXT<|end|><|begin|>assistant<|content|>TEXT<|end|>.
BEGIN, THINK, CONTENT, CALLS = "<|begin|>", "<|think|>", "<|content|>", "<|tool_calls|>"
# A template of Hy3 puts this into each of its marks.
_SUFFIX = re.compile(r"= '(:\w+)'")


class Part(NamedTuple):
    """Text of the answer, and text of reasoning."""

    answer: str = ""
    reasoning: str = ""


class Splitter:
    """A filter that divides a stream of text into the answer and the reasoning; this one finds no reasoning.

    `marks` are special tokens that it spells out, because they tell calls of tools from text.
    """

    # Key of a message with the reasoning, as the model's template calls it.
    key = "reasoning_content"

    def __init__(self, marks: Collection[str] = ()) -> None:
        self.marks = frozenset(marks)

    def push(self, text: str, special: str | None = None) -> Part:
        """Return the parts that are certain now. `special` is the text of a special token that follows `text`."""
        return Part(text + self._spelled(special))

    def flush(self) -> Part:
        """Return what was held back; call it at the end of the stream."""
        return Part()

    @property
    def stage(self) -> str:
        """Return what the text that comes next is: "answer", "reasoning", or at the "start" one of both."""
        return "answer"

    def _spelled(self, special: str | None) -> str:
        return special if special is not None and special in self.marks else ""


class TagSplitter(Splitter):
    """A filter for reasoning between two marks at the beginning of an answer.

    A mark that is written later belongs to the answer. With `inside`, the prompt ends with the first mark.
    """

    def __init__(self, begin: str, end: str, inside: bool, marks: Collection[str] = ()) -> None:
        super().__init__(marks)
        self.begin = begin
        self._end = end
        self._state = "reasoning" if inside else "start"
        self._held = ""
        self._trims = inside  # drop line breaks before the next text

    def push(self, text: str, special: str | None = None) -> Part:
        marks = special is not None and (special == self._end or self.begin.startswith(special))
        self._held += text + (special or "" if marks else self._spelled(special))
        if self._state == "start":
            self._look_for_begin()
        reasoning = self._take_reasoning() if self._state == "reasoning" else ""
        return Part(self._trimmed(self._take()), reasoning) if self._state == "answer" else Part("", reasoning)

    def flush(self) -> Part:
        text = self._trimmed(self._take())
        return Part("", text) if self._state == "reasoning" else Part(text)

    @property
    def stage(self) -> str:
        return self._state

    @property
    def held(self) -> str:
        """Return the text that is held back."""
        return self._held

    def _look_for_begin(self) -> None:
        text = self._held.lstrip()
        if text.startswith(self.begin):
            self._state, self._held, self._trims = "reasoning", text[len(self.begin) :], True
        elif not self.begin.startswith(text):
            self._state = "answer"

    def _take_reasoning(self) -> str:
        text, mark, rest = self._held.partition(self._end)
        if mark:
            text = self._trimmed(text).rstrip("\n")
            self._state, self._held, self._trims = "answer", rest, True
            return text
        # Line breaks before the mark, and what could be a part of it, wait for what follows.
        certain = len(self._held)
        for length in range(min(len(self._end) - 1, certain), 0, -1):
            if self._end.startswith(self._held[-length:]):
                certain -= length
                break
        certain = len(self._held[:certain].rstrip("\n"))
        text, self._held = self._held[:certain], self._held[certain:]
        return self._trimmed(text)

    def _take(self) -> str:
        text, self._held = self._held, ""
        return text

    def _trimmed(self, text: str) -> str:
        if self._trims:
            text = text.lstrip("\n")
            self._trims = not text
        return text


class ChannelSplitter(Splitter):
    """A filter for Harmony, whose channels other than the final one hold reasoning.

    A message to a function belongs to the answer, as `<|channel|>commentary to=NAME<|message|>TEXT<|call|>`.
    """

    key = "thinking"

    def __init__(self) -> None:
        super().__init__()
        self._channel = FINAL  # of the text that comes, if it is no header
        self._header: str | None = ""  # text of a header so far; None within a message
        self._recipient = ""  # whom the header names
        self._calls = False  # the text that comes is for a function
        self._plain = True  # no mark has been seen

    def push(self, text: str, special: str | None = None) -> Part:
        answer = ""
        if special in (CHANNEL, START, END, CALL):
            answer, self._calls = CALL if self._calls else "", False
            self._recipient = self._named() if special == CHANNEL else ""
            self._header, self._plain = "", False
        elif special == MESSAGE and self._header is not None:
            recipient = self._named()
            self._channel, self._calls = (self._header.split() or [FINAL])[0], bool(recipient)
            self._header, self._recipient = None, ""
            answer = f"{CHANNEL}commentary to={recipient}{MESSAGE}" if recipient else ""
        if self._header is not None:
            self._header += text
            return Part(answer)
        if self._calls or self._channel == FINAL:
            return Part(answer + text)
        return Part(answer, text)

    def flush(self) -> Part:
        header, self._header = self._header or "", None
        return Part(header.lstrip()) if self._plain else Part()  # an answer without any channel

    @property
    def stage(self) -> str:
        return "answer" if self._header is None and self._channel == FINAL and not self._calls else "reasoning"

    def _named(self) -> str:
        """Return the recipient in the header so far, if it is a function."""
        found = _RECIPIENT.search(self._header or "")
        recipient = found[1] if found else self._recipient
        return "" if recipient in ("assistant", "user") else recipient


class TurnSplitter(Splitter):
    """A filter for Solar Open, which thinks in a turn of its own."""

    key = "reasoning"

    def __init__(self, marks: Collection[str] = ()) -> None:
        super().__init__(marks)
        self._thinks = self._in_header = False
        self._begun = False  # a mark of what the turn is has been seen

    def push(self, text: str, special: str | None = None) -> Part:
        if special in (BEGIN, END):
            self._in_header = True
        elif special in (THINK, CONTENT, CALLS):
            self._thinks, self._in_header, self._begun = special == THINK, False, True
        if self._in_header:
            return Part()
        spelled = text + self._spelled(special)
        return Part("", spelled) if self._thinks else Part(spelled)

    @property
    def stage(self) -> str:
        return "reasoning" if self._thinks or self._in_header or not self._begun else "answer"


def make_splitter(template: str, prompt: str, special: Collection[str], marks: Collection[str] = ()) -> Splitter:
    """Return the splitter of answers to a rendered `prompt`.

    The marks of reasoning are those in the chat template, or those that are special tokens. `marks` are special tokens
    of calls, which stay in the answer.
    """
    if CHANNEL in special and MESSAGE in special:
        return ChannelSplitter()
    if THINK in special and CONTENT in special:
        return TurnSplitter(marks)
    suffix = _SUFFIX.search(template)
    template = template.replace("{}", suffix[1]) if suffix else template
    for begin, end in TAGS:
        if end in template or (end in special and any(begin.startswith(mark) for mark in special)):
            return TagSplitter(begin, end, prompt.rstrip().endswith(begin), marks)
    return Splitter(marks)
