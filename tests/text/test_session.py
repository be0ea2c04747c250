"""A conversation runs only the tokens that are new, and the model has always seen exactly the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from text_kit import CONFIG, byte_level_backend, make_tokenizer

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.sampling import SamplingParams
from dymoe_runtime.text.session import Session
from dymoe_runtime.text.tokenizer import Tokenizer

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAST_ALONE = "{{ messages[-1].content }}"
WITHOUT_THOUGHTS = (
    "{% for m in messages %}{{ m.role + ': ' + (m.content if loop.last else m.content.split('=')[-1]) + '\n' }}"
    "{% endfor %}"
)
EOS = 1


class Speaker:
    """A model that gives its answers one after the other, and remembers what it has seen as a KV cache does."""

    def __init__(self, tokenizer: Tokenizer, answers: Sequence[str], max_context: int = 1000, rewinds: bool = True):
        self.max_context, self.seen = max_context, list[int]()
        self.prompts: list[list[int]] = []  # all that it had seen after each prompt
        self.run: list[int] = []  # tokens of each prompt that ran
        self._tokenizer, self._answers, self._rewinds = tokenizer, list(answers), rewinds
        self._saying: list[int] = []

    @property
    def position(self) -> int:
        return len(self.seen)

    @property
    def tokens(self) -> list[int]:
        return self.seen

    def reset(self, position: int) -> int:
        if self._rewinds or position >= len(self.seen):
            del self.seen[position:]
        else:
            self.seen.clear()
        return len(self.seen)

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        self.seen += ids
        self.prompts.append(list(self.seen))
        self.run.append(len(ids))
        self._saying = [*self._tokenizer.encode(self._answers.pop(0), add_special_tokens=False), EOS]
        return self._next()

    def decode(self, token_id: int) -> np.ndarray:
        self.seen.append(token_id)
        return self._next()

    def _next(self) -> np.ndarray:
        logits = np.ones(self._tokenizer.vocab_size, np.float32)
        logits[self._saying.pop(0)] = 9.0
        return logits


def make_chat(template: str = CHAT) -> Tokenizer:
    return Tokenizer(byte_level_backend(), CONFIG, {"default": template})


def prompt_of(tokenizer: Tokenizer, *contents: str, system: str | None = None) -> list[int]:
    """The ids of a conversation whose user and assistant say these in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return tokenizer.encode(tokenizer.chat(messages), add_special_tokens=False)


def say(session: Session, text: str) -> str:
    return "".join(token.text for token in session.reply(text))


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_turn_runs_what_the_turns_before_have_not(system: str | None) -> None:
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["the fox", "a dog", "ok"])
    session = Session(model, tokenizer, system)
    assert [say(session, text) for text in ("who?", "and then?", "good")] == ["the fox", "a dog", "ok"]
    said = ["who?", "the fox", "and then?", "a dog", "good"]
    prompts = [prompt_of(tokenizer, *said[:count], system=system) for count in (1, 3, 5)]
    assert model.prompts == prompts
    answers = [len(tokenizer.encode(text, add_special_tokens=False)) for text in ("the fox", "a dog")]
    known = [0, len(prompts[0]) + answers[0], len(prompts[1]) + answers[1]]
    assert model.run == [len(prompt) - seen for prompt, seen in zip(prompts, known, strict=True)]
    roles = ["system"] * (system is not None) + ["user", "assistant"] * 3
    assert [message["role"] for message in session.messages] == roles
    assert [message["content"] for message in session.messages][-6:] == [*said, "ok"]


def test_a_model_that_cannot_go_back_runs_the_whole_prompt() -> None:
    tokenizer = make_chat(WITHOUT_THOUGHTS)
    model = Speaker(tokenizer, ["1 + 1 = 2", "done"], rewinds=False)
    session = Session(model, tokenizer)
    say(session, "x = 1 + 1")
    say(session, "z")
    assert model.prompts[1] == prompt_of(tokenizer, "x = 1 + 1", "1 + 1 = 2", "z")
    assert model.run[1] == len(model.prompts[1])


def test_a_penalty_counts_the_turns_before() -> None:
    """The model would say the same again, but for a penalty that is larger than its preference."""
    tokenizer = make_chat(LAST_ALONE)
    model = Speaker(tokenizer, ["x", "x"])
    session = Session(model, tokenizer)
    assert say(session, "x a") == "x"
    said = next(session.reply("x a", SamplingParams(repetition_penalty=100.0)))
    assert model.run[1] == 1 and said.text != "x"


def test_a_model_that_others_use_in_between_runs_what_it_has_lost() -> None:
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["the fox", "else", "a dog"])
    session = Session(model, tokenizer)
    say(session, "who?")
    model.reset(3)
    model.prefill(tokenizer.encode("something else entirely, and longer than all of it"))
    say(session, "and then?")
    assert model.prompts[2] == prompt_of(tokenizer, "who?", "the fox", "and then?")


def test_a_template_that_changes_earlier_turns_has_them_run_again() -> None:
    tokenizer = make_chat(WITHOUT_THOUGHTS)
    model = Speaker(tokenizer, ["1 + 1 = 2", "2 + 1 = 3", "done"])
    session = Session(model, tokenizer)
    for text in ("x = 1 + 1", "y = 2 + 1", "z"):
        say(session, text)
    said = ["x = 1 + 1", "1 + 1 = 2", "y = 2 + 1", "2 + 1 = 3", "z"]
    assert model.prompts == [prompt_of(tokenizer, *said[:count]) for count in (1, 3, 5)]
    assert model.run[1] < len(model.prompts[1])


def test_a_prompt_that_is_known_entirely_runs_its_last_token() -> None:
    tokenizer = make_chat(LAST_ALONE)
    model = Speaker(tokenizer, ["one", "two"])
    session = Session(model, tokenizer)
    assert [say(session, "again"), say(session, "again")] == ["one", "two"]
    assert model.prompts == [tokenizer.encode("again")] * 2
    assert model.run == [len(tokenizer.encode("again")), 1]


def test_an_answer_that_is_not_read_to_its_end_leaves_the_next_turn_right() -> None:
    """Though the turn before it shares more with the next than the one that was left."""
    tokenizer = make_chat(LAST_ALONE)
    model = Speaker(tokenizer, ["one", "the other", "three"])
    session = Session(model, tokenizer)
    say(session, "a b c d")
    left = session.reply("a b x y")
    next(iter(left))
    del left
    say(session, "a b c d e f")
    assert model.prompts[2] == tokenizer.encode("a b c d e f")


def test_a_conversation_that_no_longer_fits_is_an_error_before_the_model_runs() -> None:
    tokenizer = make_chat(LAST_ALONE)
    model = Speaker(tokenizer, ["one", "two"], max_context=12)
    session = Session(model, tokenizer)
    say(session, "a b c")
    with pytest.raises(DymoeError, match="the context holds 12"):
        say(session, "a b x y z " * 9)
    say(session, "a b c d")
    assert model.prompts[1] == tokenizer.encode("a b c d")


def test_an_answer_ends_as_generation_does() -> None:
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["the fox jumps", "a b c d e f"])
    session = Session(model, tokenizer)
    tokens = list(session.reply("who?", stop=["jumps"]))
    assert tokens[-1].finish == "stop" and session.messages[-1] == {"role": "assistant", "content": "the fox "}
    tokens = list(session.reply("go on", max_tokens=3))
    assert tokens[-1].finish == "length" and len(tokens) == 3
    assert session.messages[-1]["content"] == "".join(token.text for token in tokens)


def test_a_session_that_its_template_refuses_is_an_error_at_once() -> None:
    model = Speaker(make_tokenizer(), [])
    with pytest.raises(DymoeError, match="no chat template"):
        Session(model, make_tokenizer())
    no_system = make_chat("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}.")
    Session(model, no_system)
    with pytest.raises(DymoeError, match="no system"):
        Session(model, no_system, "Be brief.")
    assert model.prompts == []
