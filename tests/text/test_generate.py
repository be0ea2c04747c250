"""Generation: what is shown, when it ends, and what the model was asked to compute."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tokenizers
from text_kit import CONFIG, SPECIAL, byte_level_backend, byte_spelling, fallback_backend, make_tokenizer

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.generate import Token, generate
from dymoe_runtime.text.sampling import SamplingParams
from dymoe_runtime.text.stop_strings import StopStrings
from dymoe_runtime.text.tokenizer import Tokenizer

GREEDY = SamplingParams()
BYTE_LEVEL = make_tokenizer()
EOS = 1


class Script:
    """A model that says `ids` one after the other, and notes what it is asked."""

    def __init__(self, ids: Sequence[int], vocabulary: int, max_context: int = 1000) -> None:
        self.ids, self.vocabulary, self.max_context = list(ids), vocabulary, max_context
        self.position = self.changes = 0
        self.prefilled: list[int] = []
        self.decoded: list[int] = []

    def _next(self) -> np.ndarray:
        logits = np.zeros(self.vocabulary, np.float32)
        logits[self.ids[len(self.decoded) % len(self.ids)]] = 20.0
        return logits

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        self.prefilled += ids
        self.position += len(ids)
        self.changes += 1
        return self._next()

    def decode(self, token_id: int) -> np.ndarray:
        assert self.position < self.max_context, "decoding beyond the context"
        self.decoded.append(token_id)
        self.position += 1
        self.changes += 1
        return self._next()


def script(text: str, *then: int, tokenizer: Tokenizer = BYTE_LEVEL, max_context: int = 1000) -> Script:
    """A model that says `text` and then the ids `then`."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return Script([*ids, *then], tokenizer.vocab_size, max_context)


def run(
    model: Script,
    max_tokens: int = 200,
    stop: Sequence[str] = (),
    tokenizer: Tokenizer = BYTE_LEVEL,
    prompt: Sequence[int] = (5, 6, 7),
    **options: Any,
) -> list[Token]:
    tokens = list(generate(model, tokenizer, prompt, GREEDY, max_tokens, stop, **options))
    assert all(token.finish is None for token in tokens[:-1])
    assert tokens[-1].finish in ("stop", "length")
    assert model.decoded == [token.id for token in tokens[:-1]]
    return tokens


def shown(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


def test_ends_at_eos_without_showing_it() -> None:
    model = script("Hello 世界 👍🏽!", EOS)
    tokens = run(model)
    assert shown(tokens) == "Hello 世界 👍🏽!"
    assert tokens[-1] == Token(EOS, "", "stop")
    assert [token.id for token in tokens] == model.ids
    assert model.prefilled == [5, 6, 7]


def test_any_of_the_tokenizers_eos_ids_ends_the_text() -> None:
    word = BYTE_LEVEL.encode("x")[0]
    tokenizer = Tokenizer(byte_level_backend(), CONFIG, {}, eos_ids={word})
    tokens = run(script("ab", word, 9), tokenizer=tokenizer)
    assert (shown(tokens), tokens[-1]) == ("ab", Token(word, "", "stop"))
    assert shown(run(script("ab", EOS), tokenizer=tokenizer)) == "ab"


def test_ignore_eos_goes_on_to_the_length() -> None:
    tokenizer = Tokenizer(byte_level_backend(), CONFIG, {}, eos_ids={9})
    tokens = run(script("ab", EOS), max_tokens=20, ignore_eos=True, tokenizer=tokenizer)
    assert len(tokens) == 20
    assert tokens[-1].finish == "length"
    assert set(shown(tokens)) == {"a", "b"}


def test_a_prompt_may_be_a_text_and_the_rest_has_defaults() -> None:
    """It goes on until the context is full, and is greedy where the model's files say nothing else."""
    model = script("a b c d e f g h i j " * 20, max_context=250)
    tokens = list(generate(model, BYTE_LEVEL, "The fox"))
    prompt = BYTE_LEVEL.encode("The fox")
    assert model.prefilled == prompt
    assert len(tokens) == 250 - len(prompt) + 1 and tokens[-1].finish == "length"
    said = itertools.cycle(model.ids)
    assert [token.id for token in tokens] == [next(said) for _ in tokens]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_ends_at_max_tokens(count: int) -> None:
    model = script("a b c d e f g h i j")
    tokens = run(model, max_tokens=count)
    assert len(tokens) == count
    assert tokens[-1].finish == "length"
    assert shown(tokens) == BYTE_LEVEL.decode(model.ids[:count])


@pytest.mark.parametrize(("max_context", "count"), [(3, 1), (4, 2), (10, 8)])
def test_ends_when_the_context_is_full(max_context: int, count: int) -> None:
    tokens = run(script("a b c d e f g h i j", max_context=max_context))
    assert len(tokens) == count
    assert tokens[-1].finish == "length"


def test_eos_as_the_last_allowed_token_is_a_stop() -> None:
    assert run(Script([EOS], BYTE_LEVEL.vocab_size), max_tokens=1) == [Token(EOS, "", "stop")]


def test_the_end_releases_what_was_held_back() -> None:
    smiley = byte_spelling(BYTE_LEVEL)[0xF0]
    for then, finish in (([smiley, EOS], "stop"), ([smiley], "length")):
        model = script("say STO", *then)
        tokens = run(model, max_tokens=len(model.ids), stop=["STO\N{REPLACEMENT CHARACTER}P"])
        assert shown(tokens) == "say STO\N{REPLACEMENT CHARACTER}"
        assert tokens[-1].finish == finish


def test_stops_before_a_stop_string_across_tokens() -> None:
    model = script("The answer is 42.\n\nUser: and then?")
    tokens = run(model, stop=["\nUser:", "Assistant:"])
    assert shown(tokens) == "The answer is 42.\n"
    assert tokens[-1].finish == "stop"
    assert BYTE_LEVEL.decode([token.id for token in tokens]).endswith("\nUser:")


def test_holds_back_only_what_could_begin_a_stop_string() -> None:
    ids = [byte_spelling(BYTE_LEVEL)[byte] for byte in b"abXXYcXXZd"]
    tokens = run(Script([*ids, EOS], BYTE_LEVEL.vocab_size), stop=["XXZ"])
    assert [token.text for token in tokens] == ["a", "b", "", "", "XXY", "c", "", "", ""]
    assert tokens[-1].finish == "stop"


def test_a_stop_string_may_complete_in_the_flush() -> None:
    """Fallback bytes are certain only at the end of their run, here the end of the text."""
    tokenizer = make_tokenizer(fallback_backend)
    spelling = byte_spelling(tokenizer)
    ids = [tokenizer.encode("a")[-1], *(spelling[byte] for byte in "é!".encode())]
    tokens = run(Script(ids, tokenizer.vocab_size), max_tokens=4, stop=["é"], tokenizer=tokenizer)
    assert (shown(tokens), tokens[-1].finish) == ("a", "stop")


def test_a_special_token_can_be_a_stop_string() -> None:
    model = script("hello", SPECIAL.index("<|im_end|>"), 9, 9)
    for ignore_eos in (False, True):
        tokens = run(model, stop=["<|im_end|>"], ignore_eos=ignore_eos)
        assert (shown(tokens), tokens[-1].finish) == ("hello", "stop")
        model.decoded.clear()


def first_stop(text: str, stop: Sequence[str]) -> str:
    """Character by character, with nothing clever."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


def test_random_stop_strings_cut_exactly_however_the_text_is_divided() -> None:
    dice = random.Random(0)
    stopped = 0
    for _ in range(3000):
        text = "".join(dice.choices("ab你", k=dice.randrange(1, 30)))
        stop = ["".join(dice.choices("ab你", k=dice.randrange(1, 6))) for _ in range(dice.randrange(4))]
        strings = StopStrings(stop)
        rest, parts = text, []
        while rest:
            size = dice.randrange(0, 5)
            parts.append(strings.push(rest[:size]))
            rest = rest[size:]
            assert first_stop(text, stop).startswith("".join(parts))
        assert "".join(parts) + strings.flush() == first_stop(text, stop)
        assert strings.found == (first_stop(text, stop) != text)
        stopped += strings.found
    assert 500 < stopped < 2500


@pytest.mark.parametrize("build", [byte_level_backend, fallback_backend])
def test_random_texts_with_stop_strings_and_characters_across_tokens(
    build: Callable[[], tokenizers.Tokenizer],
) -> None:
    tokenizer, dice = make_tokenizer(build), random.Random(1)
    for _ in range(300):
        text = "".join(dice.choices("a é你👍 好", k=dice.randrange(1, 25)))
        stop = ["".join(dice.choices("a é你👍 好", k=dice.randrange(1, 4)))]
        eos = tokenizer.special_ids["</s>"]
        tokens = run(script(text, eos, tokenizer=tokenizer), stop=stop, tokenizer=tokenizer)
        assert shown(tokens) == first_stop(text, stop)


@pytest.mark.parametrize(("prompt", "options", "message"), [
    ([], {}, "the prompt is empty; give it"),
    (range(11), {}, "the prompt has 11 tokens, but the context holds 10; shorten the prompt$"),
    ([5], {"max_tokens": 0}, "--max-tokens 0: must be at least 1"),
    ([5], {"max_tokens": -3}, "--max-tokens -3: must be at least 1"),
    ([5], {"max_tokens": 2.5}, "--max-tokens 2.5: must be at least 1, and a whole number"),
    ([5], {"stop": ["a", ""]}, "a stop string is empty; give it"),
])  # fmt: skip
def test_bad_arguments_are_errors_before_the_model_runs(
    prompt: Sequence[int], options: dict[str, Any], message: str
) -> None:
    model = Script([9], 100, max_context=10)
    with pytest.raises(DymoeError, match=f"^{message}"):
        generate(model, BYTE_LEVEL, list(prompt), GREEDY, **{"max_tokens": 5, **options})
    assert model.position == 0


def test_a_prompt_that_fills_the_context_gives_one_token() -> None:
    model = script("abc", max_context=10)
    assert len(run(model, prompt=list(range(10)))) == 1


def test_a_conversation_counts_what_the_cache_holds() -> None:
    model = script("abc", EOS, max_context=10)
    model.position = 8
    with pytest.raises(DymoeError, match="3 tokens after 8 of the conversation, but the context holds 10"):
        run(model)
    assert len(run(model, prompt=[5, 6])) == 1


def test_the_penalty_counts_the_prompt_and_the_generated() -> None:
    class Flat(Script):
        def _next(self) -> np.ndarray:
            return np.arange(10, 0, -1, np.float32)

    params = SamplingParams(repetition_penalty=100.0)
    tokens = generate(Flat([9], 10), BYTE_LEVEL, [2, 5, 7], params, 7, ignore_eos=True)
    assert [token.id for token in tokens] == [0, 1, 3, 4, 6, 8, 9]


def test_equal_seeds_generate_equal_tokens() -> None:
    class Flat(Script):
        def _next(self) -> np.ndarray:
            return np.zeros(self.vocabulary, np.float32)

    def ids(seed: int) -> list[int]:
        params = SamplingParams(temperature=1.0, top_p=0.9, seed=seed)
        model = Flat([9], BYTE_LEVEL.vocab_size)
        return [t.id for t in generate(model, BYTE_LEVEL, [5], params, 30, ignore_eos=True)]

    assert ids(1) == ids(1) != ids(2)


def test_nan_logits_end_with_an_error() -> None:
    class Broken(Script):
        def _next(self) -> np.ndarray:
            return np.full(self.vocabulary, math.nan, np.float32)

    with pytest.raises(DymoeError, match="NaN logits"):
        run(Broken([9], 10))


def test_the_model_waits_until_the_next_token_is_asked_for() -> None:
    model = script("abcdefgh")
    tokens = generate(model, BYTE_LEVEL, [5], GREEDY, 5)
    assert model.prefilled == []
    first = next(tokens)
    assert model.decoded == []
    next(tokens)
    assert model.decoded == [first.id]
    tokens.close()
    assert (model.decoded, model.position) == ([first.id], 2)


def test_an_interrupt_leaves_the_cache_consistent() -> None:
    class Interrupted(Script):
        def decode(self, token_id: int) -> np.ndarray:
            if len(self.decoded) == 2:
                raise KeyboardInterrupt
            return super().decode(token_id)

    model = Interrupted(BYTE_LEVEL.encode("a b c d e"), BYTE_LEVEL.vocab_size)
    tokens = generate(model, BYTE_LEVEL, [5], GREEDY, 50)
    seen = [next(tokens).id for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        next(tokens)
    assert list(tokens) == []
    assert (model.decoded, model.position) == (seen[:2], 3)
