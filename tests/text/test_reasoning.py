"""Reasoning is told apart from the answer, however the stream is divided."""

from __future__ import annotations

import pytest

from dymoe_runtime.text.reasoning import ChannelSplitter, Splitter, TagSplitter, make_splitter

HARMONY = [
    *("<|channel|>", "analysis", "<|message|>", "1+1", "<|end|>"),
    *("<|start|>", "assistant", "<|channel|>", "final", "<|message|>", "2", "."),
]


def split(splitter: Splitter, parts: list[str], special: tuple[str, ...] = ()) -> tuple[str, str]:
    found = [splitter.push("", part) if part in special else splitter.push(part) for part in parts]
    found.append(splitter.flush())
    return "".join(part.answer for part in found), "".join(part.reasoning for part in found)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>\nhm\n</think>\n\nyes", False, ("yes", "hm")),
        ("\n<think>hm</think>yes\n", False, ("yes\n", "hm")),
        ("hm\n\nok\n</think>\n\nyes", True, ("yes", "hm\n\nok")),
        ("<think>\n\n</think>\n\nyes", False, ("yes", "")),
        ("no thoughts < 3", False, ("no thoughts < 3", "")),
        ("It writes <think>x</think>.", False, ("It writes <think>x</think>.", "")),
        ("</think>", False, ("</think>", "")),
        ("<thi", False, ("<thi", "")),
        ("<think>cut </thi", False, ("", "cut </thi")),
        ("a < b </think>c </think>d", True, ("c </think>d", "a < b ")),
        ("", True, ("", "")),
    ],
)
def test_tags_divide_a_text(size: int, text: str, inside: bool, expected: tuple[str, str]) -> None:
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    assert split(TagSplitter("<think>", "</think>", inside), parts) == expected


def test_tags_may_be_special_tokens() -> None:
    marks = ("[THINK]", "[/THINK]", "</s>")
    parts = ["[THINK]", "hm", "[/THINK]", "yes", "</s>"]
    assert split(TagSplitter("[THINK]", "[/THINK]", False), parts, marks) == ("yes", "hm")


def test_a_mark_may_be_a_special_token_and_a_word() -> None:
    splitter, marks = TagSplitter("<|channel>thought", "<channel|>", False), ("<|channel>", "<channel|>")
    parts = ["<|channel>", "thou", "ght", "\nhm\n", "<channel|>", "yes"]
    assert split(splitter, parts, marks) == ("yes", "hm")
    assert split(TagSplitter("<|channel>thought", "<channel|>", False), ["th", "at"], marks) == ("that", "")


def test_channels_other_than_the_final_one_hold_reasoning() -> None:
    marks = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>")
    assert split(ChannelSplitter(), HARMONY, marks) == ("2.", "1+1")
    assert split(ChannelSplitter(), ["No", " channel."], marks) == ("No channel.", "")
    assert split(ChannelSplitter(), HARMONY[:4], marks) == ("", "1+1")


@pytest.mark.parametrize(
    ("template", "prompt", "special", "kind"),
    [
        ("{{ messages }}", "x", [], Splitter),
        ("{{ '</think>' }}", "x", [], TagSplitter),
        ("{{ messages }}", "x", ["<think>", "</think>"], TagSplitter),
        ("{{ messages }}", "x", ["<|channel>", "<channel|>"], TagSplitter),
        ("{{ messages }}", "x", ["<channel|>"], Splitter),
        ("{{ messages }}", "x", ["<|channel|>", "<|message|>"], ChannelSplitter),
    ],
)
def test_the_marks_are_those_of_the_template(template: str, prompt: str, special: list[str], kind: type) -> None:
    assert type(make_splitter(template, prompt, special)) is kind


def test_a_prompt_that_ends_with_the_mark_begins_reasoning() -> None:
    for prompt, expected in (("assistant\n<think>\n", ("yes", "hm")), ("<think>\n</think>\n", ("hm</think>yes", ""))):
        assert split(make_splitter("</think>", prompt, []), ["hm</think>yes"]) == expected
