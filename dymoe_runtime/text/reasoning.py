"""Reasoning: what a model thinks before it answers, told apart from the answer by the marks of its template."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

# Marks around reasoning, as templates and models write them.
TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),  # Gemma 4, whose first mark is a special token and a word
)
# Harmony, the format of gpt-oss: <|channel|>NAME<|message|>TEXT<|end|>; the answer is in the channel "final".
CHANNEL, MESSAGE, END, START = "<|channel|>", "<|message|>", "<|end|>", "<|start|>"
FINAL = "final"
# Variables by which chat templates switch reasoning on and off.
SWITCHES = ("enable_thinking", "thinking")


class Part(NamedTuple):
    """Text of the answer, and text of reasoning."""

    answer: str = ""
    reasoning: str = ""


class Splitter:
    """A filter that divides a stream of text into the answer and the reasoning; this one finds no reasoning."""

    # Key of a message with the reasoning, as the model's template calls it.
    key = "reasoning_content"

    def push(self, text: str, special: str | None = None) -> Part:
        """Return the parts that are certain now. `special` is the text of a special token that was not decoded."""
        return Part(text)

    def flush(self) -> Part:
        """Return what was held back; call it at the end of the stream."""
        return Part()


class TagSplitter(Splitter):
    """A filter for reasoning between two marks at the beginning of an answer.

    A mark that is written later belongs to the answer. With `inside`, the prompt ends with the first mark.
    """

    def __init__(self, begin: str, end: str, inside: bool) -> None:
        self._begin, self._end = begin, end
        self._state = "reasoning" if inside else "start"
        self._held = ""
        self._trims = inside  # drop line breaks before the next text

    def push(self, text: str, special: str | None = None) -> Part:
        marks = special is not None and (special == self._end or self._begin.startswith(special))
        self._held += text + (special or "" if marks else "")
        if self._state == "start":
            self._look_for_begin()
        reasoning = self._take_reasoning() if self._state == "reasoning" else ""
        return Part(self._trimmed(self._take()), reasoning) if self._state == "answer" else Part("", reasoning)

    def flush(self) -> Part:
        text = self._trimmed(self._take())
        return Part("", text) if self._state == "reasoning" else Part(text)

    def _look_for_begin(self) -> None:
        text = self._held.lstrip()
        if text.startswith(self._begin):
            self._state, self._held, self._trims = "reasoning", text[len(self._begin) :], True
        elif not self._begin.startswith(text):
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
    """A filter for Harmony, whose channels other than the final one hold reasoning."""

    key = "thinking"

    def __init__(self) -> None:
        self._channel = FINAL  # of the text that comes, if it is no header
        self._header: str | None = ""  # text of a header so far; None within a message
        self._plain = True  # no mark has been seen

    def push(self, text: str, special: str | None = None) -> Part:
        if special in (CHANNEL, START, END):
            self._header, self._plain = "", False
        elif special == MESSAGE and self._header is not None:
            self._channel, self._header = (self._header.split() or [FINAL])[0], None
        if self._header is not None:
            self._header += text
            return Part()
        return Part(text) if self._channel == FINAL else Part("", text)

    def flush(self) -> Part:
        header, self._header = self._header or "", None
        return Part(header.lstrip()) if self._plain else Part()  # an answer without any channel


def make_splitter(template: str, prompt: str, special: Collection[str]) -> Splitter:
    """Return the splitter of answers to a rendered `prompt`.

    The marks are those in the chat template, or those that are special tokens.
    """
    if CHANNEL in special and MESSAGE in special:
        return ChannelSplitter()
    for begin, end in TAGS:
        if end in template or (end in special and any(begin.startswith(mark) for mark in special)):
            return TagSplitter(begin, end, inside=prompt.rstrip().endswith(begin))
    return Splitter()
