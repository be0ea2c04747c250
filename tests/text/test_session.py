"""A conversation runs only the tokens that are new, and the model has always seen exactly the prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import tokenizers
from text_kit import BACKENDS, CONFIG, byte_level_backend, byte_spelling, make_tokenizer

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.generate import Token
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


class Speaker:
    """A model that gives its answers one after the other, and remembers what it has seen as a KV cache does."""

    def __init__(self, tokenizer: Tokenizer, answers: Sequence[str], max_context: int = 1000, rewinds: bool = True):
        self.max_context, self.seen, self.changes = max_context, list[int](), 0
        self.spells = False  # answers byte by byte, as no tokenizer would
        self.prompts: list[list[int]] = []  # all that it had seen after each prompt
        self.run: list[int] = []  # tokens of each prompt that ran
        self._tokenizer, self._answers, self._rewinds = tokenizer, list(answers), rewinds
        self._saying: list[int] = []
        self._said: list[int] = []  # of the current answer

    @property
    def position(self) -> int:
        return len(self.seen)

    @property
    def tokens(self) -> list[int]:
        return self.seen

    def reset(self, position: int) -> int:
        self.changes += 1
        if self._rewinds or position >= len(self.seen):
            del self.seen[position:]
        else:
            self.seen.clear()
        return len(self.seen)

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        self.seen += ids
        self.prompts.append(list(self.seen))
        self.run.append(len(ids))
        if not self._said or self.seen[-len(self._said) :] != self._said:  # else it is asked to go on
            self._saying, self._said = [*self._ids(self._answers.pop(0)), *self._tokenizer.eos_ids], []
        return self._next()

    def _ids(self, answer: str) -> list[int]:
        if not self.spells:
            return self._tokenizer.encode(answer, add_special_tokens=False)
        return [byte_spelling(self._tokenizer)[byte] for byte in answer.encode()]

    def decode(self, token_id: int) -> np.ndarray:
        self.seen.append(token_id)
        return self._next()

    def _next(self) -> np.ndarray:
        self.changes += 1
        logits = np.ones(self._tokenizer.vocab_size, np.float32)
        self._said.append(self._saying.pop(0))
        logits[self._said[-1]] = 30.0
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


def test_an_answer_keeps_the_tokens_that_the_model_wrote() -> None:
    """Though the tokenizer would make others of its text."""
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["the fox né", "a dog"])
    model.spells = True
    session = Session(model, tokenizer)
    say(session, "who?")
    say(session, "and then?")
    written = [byte_spelling(tokenizer)[byte] for byte in "the fox né".encode()]
    first = prompt_of(tokenizer, "who?")
    rest = tokenizer.encode("<|im_end|>\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n")
    assert model.prompts[1] == [*first, *written, *rest] != prompt_of(tokenizer, "who?", "the fox né", "and then?")
    assert session.last_turn is not None and session.last_turn.new_tokens == model.run[1] == len(rest)
    assert session.last_turn.reused_tokens == len(first) + len(written)


# As families write them: where answers begin and end, what is trimmed, and who may speak.
SPOKEN = {
    "chatml": CHAT,
    "trimmed": CHAT.replace("m.content", "m.content | trim"),
    "headers": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>\n\n{{ m.content | trim }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_end|>\n\n{% endif %}",
    "instructions": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "other roles": "{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
    "plain": "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n\n{% endfor %}### assistant: ",
    "generation": "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    "switch": CHAT + "{% if add_generation_prompt and enable_thinking is defined %}<think>{% endif %}",
}


@pytest.mark.parametrize("name", SPOKEN)
@pytest.mark.parametrize("spells", [False, True])
def test_a_turn_computes_exactly_the_new_tokens(name: str, spells: bool) -> None:
    tokenizer = make_chat(SPOKEN[name])
    answers = ["the quick fox né 你好", "a dog 👍🏽", "def f(x):\n    return x"]
    model = Speaker(tokenizer, answers)
    model.spells = spells
    session = Session(model, tokenizer)
    asked: list[dict[str, str]] = []
    known = 0  # characters of the conversation that the model has seen
    for question, answer in zip(("who?", "and  then?", "good"), answers, strict=True):
        asked.append({"role": "user", "content": question})
        prompt = tokenizer.chat(asked)
        say(session, question)
        assert session.last_turn is not None
        assert session.last_turn.new_tokens == model.run[-1] == len(tokenizer.encode(prompt[known:], False))
        known = len(prompt) + len(answer)
        asked.append({"role": "assistant", "content": answer})


@pytest.mark.parametrize("build", BACKENDS)
@pytest.mark.parametrize("template", [CHAT, WITHOUT_THOUGHTS, LAST_ALONE])
def test_every_turn_has_the_text_of_its_prompt(build: Callable[[], tokenizers.Tokenizer], template: str) -> None:
    tokenizer = Tokenizer(build(), CONFIG, {"default": template})
    model = Speaker(tokenizer, ["the fox", " the", "fox\n the"])
    session = Session(model, tokenizer)
    asked: list[dict[str, Any]] = []
    for turn, text in enumerate(("the fox?", " fox ", "the")):
        asked += [{"role": "user", "content": text}]
        expected = tokenizer.encode(tokenizer.chat(asked), add_special_tokens=False)
        say(session, text)
        shown = [tokenizer.decode(ids, skip_special_tokens=False) for ids in (model.prompts[turn], expected)]
        # A tokenizer that begins words with a space has the model's own words begin with one, too.
        assert shown[0].replace(" ", "") == shown[1].replace(" ", "")
        asked += session.messages[-1:]


def test_old_turns_leave_a_full_context_and_stay_in_the_messages() -> None:
    tokenizer = make_chat()
    turns = [f"question {i}" for i in range(12)]
    model = Speaker(tokenizer, [f"answer {i}" for i in range(12)], max_context=150)
    session = Session(model, tokenizer, "Be brief.")
    answers = [say(session, text) for text in turns]
    assert answers == [f"answer {i}" for i in range(12)]
    assert [message["content"] for message in session.messages] == ["Be brief."] + [
        text for pair in zip(turns, answers, strict=True) for text in pair
    ]
    assert 0 < session.dropped_turns < 12
    head = tokenizer.encode("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert all(prompt[: len(head)] == head and len(prompt) <= 150 for prompt in model.prompts)
    last = tokenizer.decode(model.prompts[-1], skip_special_tokens=False)
    assert "question 11" in last and "question 10" in last and "question 0" not in last
    # Many leave at once, and seldom: most turns run only what is new.
    assert sum(turn == whole for turn, whole in zip(model.run, map(len, model.prompts), strict=True)) <= 1
    assert sorted(model.run)[-3] < 60


def test_an_answer_goes_on_while_old_turns_can_leave() -> None:
    tokenizer = make_chat()
    long = "the quick brown fox jumps over the lazy dog " * 3
    model = Speaker(tokenizer, ["a", "b", long], max_context=90)
    session = Session(model, tokenizer)
    for text in ("x", "y"):
        say(session, text)
    assert session.dropped_turns == 0
    tokens = list(session.reply("tell me"))
    assert "".join(token.text for token in tokens) == long and tokens[-1].finish == "stop"
    assert session.dropped_turns == 2
    prompt = prompt_of(tokenizer, "tell me")
    written = [token.id for token in tokens[:-1]]
    assert [*model.prompts[-1], *model.seen[len(model.prompts[-1]) :]] == [*prompt, *written]


def test_an_answer_that_fills_the_context_alone_is_cut() -> None:
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["fox " * 200], max_context=60)
    session = Session(model, tokenizer)
    tokens = list(session.reply("tell me"))
    assert tokens[-1].finish == "length" and model.position == 60
    assert session.messages[-1]["content"] == "".join(token.text for token in tokens)


def test_with_the_policy_stop_a_full_context_is_an_error() -> None:
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["fox"] * 9, max_context=80)
    session = Session(model, tokenizer, context_policy="stop")
    with pytest.raises(DymoeError, match="the context holds 80; start a new"):
        for turn in range(9):
            say(session, f"question {turn}")
    assert session.dropped_turns == 0 and session.unanswered == f"question {len(model.prompts)}"
    assert len(session.messages) == 2 * len(model.prompts)
    with pytest.raises(DymoeError, match="expected one of drop, stop"):
        Session(model, tokenizer, context_policy="shift")


def test_a_question_that_is_too_long_lets_no_turn_leave() -> None:
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["fox", "dog", "ok"], max_context=80)
    session = Session(model, tokenizer)
    say(session, "who?")
    with pytest.raises(DymoeError, match="the context holds 80"):
        say(session, "x y z " * 60)
    assert session.dropped_turns == 0 and len(session.messages) == 2
    say(session, "and then?")
    assert model.prompts[1] == prompt_of(tokenizer, "who?", "fox", "and then?")


def test_an_answer_that_is_left_is_kept_and_can_be_tried_again() -> None:
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["the fox jumps", "a dog", "a cat"])
    session = Session(model, tokenizer)
    answer = session.reply("who?")
    first = next(answer).text + next(answer).text
    answer.close()
    assert session.messages[-1] == {"role": "assistant", "content": first}
    assert session.last_turn is not None and session.last_turn.finish is None
    assert "".join(token.text for token in session.retry()) == "a dog"
    assert [message["content"] for message in session.messages] == ["who?", "a dog"]
    assert "".join(token.text for token in session.retry()) == "a cat"
    session.clear()
    assert session.messages == []
    with pytest.raises(DymoeError, match="nothing has been asked"):
        session.retry()


@pytest.mark.parametrize("error", [KeyboardInterrupt, DymoeError("the disk is gone")])
def test_a_question_without_an_answer_can_be_tried_again(error: Any) -> None:
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["a dog"])
    session = Session(model, tokenizer)
    session.reply("never begun").close()

    def fail(ids: Sequence[int]) -> np.ndarray:
        raise error

    run, model.prefill = model.prefill, fail  # type: ignore[method-assign]
    with pytest.raises((KeyboardInterrupt, DymoeError)):
        say(session, "who?")
    interrupted = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": ""}]
    assert session.messages == (interrupted if error is KeyboardInterrupt else [])
    assert session.unanswered == (None if error is KeyboardInterrupt else "who?")
    model.prefill = run  # type: ignore[method-assign]
    assert "".join(token.text for token in session.retry()) == "a dog"
    assert session.unanswered is None and [m["content"] for m in session.messages] == ["who?", "a dog"]


def test_a_session_goes_on_from_a_history_and_with_another_system_message() -> None:
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["a dog", "a cat"])
    history = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "the fox"}]
    session = Session(model, tokenizer, history=history)
    say(session, "and then?")
    assert model.prompts[0] == prompt_of(tokenizer, "who?", "the fox", "and then?")
    session.set_system("Be brief.")
    say(session, "more")
    said = ["who?", "the fox", "and then?", "a dog", "more"]
    assert model.prompts[1] == prompt_of(tokenizer, *said, system="Be brief.")
    session.set_system(None)
    assert session.messages[0]["role"] == "user"


def test_a_session_that_was_written_goes_on_as_if_it_had_not_ended() -> None:
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["the fox né", "a dog", "a cat"])
    model.spells = True
    session = Session(model, tokenizer, "Be brief.", params=SamplingParams(temperature=0.1, seed=3))
    say(session, "who?")
    written = session.to_json()
    say(session, "and then?")
    model.reset(len(model.prompts[0]) + len(b"the fox n\xc3\xa9"))
    model._answers = ["a dog"]
    again = Session(model, tokenizer, params=SamplingParams(temperature=0.1, seed=3))
    again.restore(written)
    assert again.messages[0] == {"role": "system", "content": "Be brief."}
    say(again, "and then?")
    assert model.prompts[2] == model.prompts[1] and model.run[2] == model.run[1]
    assert again.to_json() == session.to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"messages": 3},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": 3}]},
        {"first": -1},
        {"first": "0"},
        {"pieces": [["a", ["b"]]]},
        {"pieces": 7},
        {"attempts": "1"},
        {"unanswered": 1},
    ],
)
def test_a_damaged_session_is_refused_and_changes_nothing(change: dict[str, Any]) -> None:
    tokenizer = make_chat()
    params = SamplingParams(temperature=1.0)
    session = Session(Speaker(tokenizer, ["the fox"]), tokenizer, params=params)
    say(session, "who?")
    before = session.to_json()
    with pytest.raises(DymoeError):
        session.restore(json.dumps(json.loads(before) | change))
    assert session.to_json() == before
    for text in ("", "[]", before[:-9], "{}"):
        with pytest.raises(DymoeError):
            session.restore(text)


def test_a_variable_goes_to_the_template_that_reads_it() -> None:
    switch = CHAT + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    tokenizer = make_chat(switch)
    model = Speaker(tokenizer, ["ok"])
    session = Session(model, tokenizer, variables={"enable_thinking": False})
    say(session, "who?")
    assert tokenizer.decode(model.prompts[0], skip_special_tokens=False).endswith("</think>\n\n")
    with pytest.raises(DymoeError, match=r"no variable 'think' \(it reads: enable_thinking\)"):
        Session(model, tokenizer, variables={"think": False})


def test_reasoning_is_no_part_of_the_answer() -> None:
    thinks = CHAT.replace("m.content", "m.content.split('</think>')[-1]")
    tokenizer = make_chat(thinks)
    model = Speaker(tokenizer, ["<think>\nhm, 1 + 1\n</think>\n\n2", "3"])
    session = Session(model, tokenizer)
    tokens = list(session.reply("1 + 1?"))
    assert "".join(token.text for token in tokens) == "2"
    assert "".join(token.reasoning for token in tokens) == "hm, 1 + 1"
    assert session.messages[-1] == {"role": "assistant", "content": "2", "reasoning_content": "hm, 1 + 1"}
    say(session, "2 + 1?")
    assert model.prompts[1] == prompt_of(tokenizer, "1 + 1?", "2", "2 + 1?")
    assert model.run[1] == len(model.prompts[1]) - len(model.prompts[0])  # the longest common beginning


@pytest.mark.parametrize("room", range(60, 200, 7))
def test_turns_leave_in_time_where_the_model_spells_otherwise_than_the_tokenizer(room: int) -> None:
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["the quick brown fox jumps"] * 8, max_context=room)
    model.spells = True
    session = Session(model, tokenizer)
    for _ in range(8):
        say(session, "The quick brown fox")
    assert session.dropped_turns and len(session.messages) == 16


def test_a_question_that_is_too_long_costs_nothing_of_what_the_model_knows() -> None:
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["the fox", "a dog"], max_context=100)
    session = Session(model, tokenizer, "Be brief.")
    say(session, "who?")
    known = model.position
    with pytest.raises(DymoeError, match=r"^the question has [0-9]+ tokens with the system message, .* holds 100"):
        say(session, "x " * 100)
    assert model.position == known and session.dropped_turns == 0
    say(session, "and then?")
    assert session.last_turn is not None and session.last_turn.reused_tokens == known


def test_a_retry_that_is_left_before_its_answer_begins_changes_nothing() -> None:
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["the fox", "a dog"])
    session = Session(model, tokenizer)
    say(session, "who?")
    before = list(session.messages)

    def interrupt(ids: Sequence[int]) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(model, "prefill", interrupt)
        list(session.retry())
    assert session.messages == before and session.unanswered is None
    list(session.retry())
    assert [message["content"] for message in session.messages] == ["who?", "a dog"]


def test_each_answer_is_drawn_from_the_seed_and_a_retry_from_another() -> None:
    class Undecided(Speaker):
        def _next(self) -> np.ndarray:
            super()._next()
            return np.zeros(self._tokenizer.vocab_size, np.float32)

    tokenizer = make_chat(LAST_ALONE)
    params = SamplingParams(temperature=1.0, seed=2**63 - 1)
    session = Session(Undecided(tokenizer, ["abcdefg"] * 5), tokenizer, params=params)
    first, second = (say_ids(session.reply(text, max_tokens=5, ignore_eos=True)) for text in ("x", "y"))
    assert first == second
    again = [say_ids(session.retry(max_tokens=5, ignore_eos=True)) for _ in range(2)]
    assert len({tuple(ids) for ids in (first, *again)}) == 3


def say_ids(tokens: Iterator[Token]) -> list[int]:
    return [token.id for token in tokens]


MINE = {"role": "system", "content": "a"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"history": ["x"]}, "message 0 of the history"),
        ({"history": "x"}, "the history is of type str"),
        ({"history": 5}, "the history is of type int"),
        ({"history": [{"role": "user"}]}, "no role and content"),
        ({"history": [{"role": 1, "content": "a"}]}, "no role and content"),
        ({"system": 5}, "system message is of type int"),
        ({"system": "b", "history": [MINE]}, "give one"),
        ({"history": [MINE, MINE]}, "give one"),
        ({"history": [{"role": "user", "content": "a"}, MINE]}, "give one"),
        ({"params": {}}, "expected SamplingParams"),
    ],
)
def test_what_is_no_conversation_is_refused(options: dict[str, Any], words: str) -> None:
    tokenizer = Tokenizer(byte_level_backend(), CONFIG, {"default": CHAT})
    with pytest.raises(DymoeError, match=words):
        Session(Speaker(tokenizer, []), tokenizer, **options)


def test_arguments_of_a_turn_are_checked_and_cost_nothing() -> None:
    tokenizer = Tokenizer(byte_level_backend(), CONFIG, {"default": CHAT})
    session = Session(Speaker(tokenizer, ["yes"]), tokenizer, history=[MINE])
    for options in ({"text": 5}, {"stop": [1]}, {"max_tokens": "3"}, {"params": 1}, {"logprobs": "2"}):
        with pytest.raises(DymoeError):
            list(session.reply(**{"text": "a", **options}))
    with pytest.raises(DymoeError):
        session.set_system(5)  # type: ignore[arg-type]
    assert session.messages == [MINE] and session.unanswered is None
    assert "".join(token.text for token in session.reply("a")) == "yes"


def test_a_session_answers_one_question_at_a_time() -> None:
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["the fox jumps", "a dog"])
    session = Session(model, tokenizer)
    first, second = session.reply("who?"), session.reply("and then?")
    next(first)
    calls: list[Callable[[], object]] = [
        lambda: next(second),
        lambda: next(session.retry()),
        session.clear,
        lambda: session.set_system("Be brief."),
        lambda: session.restore(session.to_json()),
    ]
    for call in calls:
        with pytest.raises(DymoeError, match="an answer of this conversation has not ended"):
            call()
    assert "".join(token.text for token in first)
    assert say(session, "and then?") == "a dog"
    assert [m["content"] for m in session.messages] == ["who?", "the fox jumps", "and then?", "a dog"]


def test_questions_that_wait_for_their_turn_lose_none() -> None:
    """Generators may be made before the answers that they follow."""
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["the fox", "a dog", "a cat"])
    session = Session(model, tokenizer)
    first, second = session.reply("who?"), session.reply("and then?")
    again = [list(first), list(second), list(session.retry())]
    assert all(again) and [m["content"] for m in session.messages] == ["who?", "the fox", "and then?", "a cat"]


def test_a_model_that_others_use_in_mid_answer_is_refused() -> None:
    tokenizer = make_chat()
    model = Speaker(tokenizer, ["the fox jumps", "a dog"])
    answer, other = Session(model, tokenizer).reply("who?"), Session(model, tokenizer).reply("what")
    next(answer)
    assert list(other)
    with pytest.raises(DymoeError, match="changed by another call"):
        next(answer)
