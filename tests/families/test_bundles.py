"""Every family compiled to a bundle: close to the original, the same in any memory, and never left to Python."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from families.cases import CASES
from families.harness import PROMPT, STEPS, our_logits, random_model
from helpers import EIGHT_BITS, compile_cli, save_byte_tokenizer
from kernel_kit import ALL, COMPILED, kernels_of

from dymoe_runtime import Bundle, Model, RunOptions, load_model
from dymoe_runtime.model.decode_step import decode_weights
from dymoe_runtime.model.score import log_softmax
from dymoe_runtime.model.weights import BundleDense
from dymoe_runtime.store.arena import min_arena_bytes

# One case of each family: the first.
FIRST = list({case.family: case for case in reversed(CASES)}.values())
# Of the top tier, 8 bits, from the original model, in nats a token. Random routers are often close to a tie, and then
# decide otherwise; a wrong option gives 1 and more.
MOST_KL = 0.2


@pytest.fixture(scope="module")
def few_words(calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text as short as calibration allows: many families are compiled."""
    path = tmp_path_factory.mktemp("few") / "few.txt"
    path.write_text(calibration_text.read_text(encoding="utf-8")[:1200], encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=FIRST, ids=str)
def compiled(
    request: pytest.FixtureRequest, few_words: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Bundle]:
    """A checkpoint and its bundle with tiers of 2 and 8 bits."""
    checkpoint, bundle = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("bundle") / "m.dymoe"
    random_model(request.param, vocab_size=256).save_pretrained(checkpoint)
    save_byte_tokenizer(checkpoint)
    outcome = compile_cli(checkpoint, "-o", bundle, "--calibration", few_words, "--tiers", "2,8", *EIGHT_BITS)
    assert outcome.code == 0, outcome.err
    return checkpoint, Bundle.open(bundle)


IDS = np.random.default_rng(5).integers(1, 256, PROMPT + STEPS)


def logits_of(bundle: Bundle, name: str, options: RunOptions, ids: np.ndarray = IDS) -> np.ndarray:
    """The logits after a prompt of PROMPT tokens, and after each token that follows: [STEPS + 1, vocab]."""
    with load_model(bundle, options, kernels_of(name)) as model:
        return np.stack([model.prefill(ids[:PROMPT].tolist()), *(model.decode(int(i)).copy() for i in ids[PROMPT:])])


def test_the_top_tier_is_close_to_the_original(compiled: tuple[Path, Bundle]) -> None:
    checkpoint, bundle = compiled
    ours = log_softmax(logits_of(bundle, ALL[0], RunOptions(tier=8, kv_bits=32, context=128)))
    theirs = log_softmax(our_logits(checkpoint, IDS, kernels_of(ALL[0]))[PROMPT - 1 :])
    assert (np.exp(theirs) * (theirs - ours)).sum(-1).mean() <= MOST_KL


@pytest.mark.parametrize("name", ALL)
def test_memory_and_threads_change_no_bit(compiled: tuple[Path, Bundle], name: str) -> None:
    _, bundle = compiled
    least = min_arena_bytes(bundle.layout)
    few = IDS[: PROMPT + 4]
    kernels, seen = kernels_of(name), []
    before = kernels.threads()
    for arena, threads in ((None, 1), (least, 2), (least + bundle.expert_bytes() // 2, 2)):
        options = RunOptions(arena_bytes=arena, context=128)
        kernels.set_threads(threads)
        seen.append(logits_of(bundle, name, options, few))
    kernels.set_threads(before)
    assert all(np.array_equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("name", ALL[:1])
def test_a_saved_sequence_goes_on_bit_for_bit(compiled: tuple[Path, Bundle], name: str, tmp_path: Path) -> None:
    """Whatever its layers keep: windows, recurrent states, positions by the context."""
    _, bundle = compiled
    options = RunOptions(context=128, tier=8)
    with load_model(bundle, options, kernels_of(name)) as model:
        model.prefill(IDS[:PROMPT].tolist())
        model.decode(int(IDS[PROMPT]))
        model.save_state(tmp_path / "session", "a note")
        expected = continued(model)
    with load_model(bundle, replace(options, arena_bytes=min_arena_bytes(bundle.layout)), kernels_of(name)) as model:
        assert model.load_state(tmp_path / "session") == "a note"
        assert all(np.array_equal(a, b) for a, b in zip(continued(model), expected, strict=True))


def continued(model: Model) -> list[np.ndarray]:
    """The logits of greedy tokens after a sequence, and of a second prompt."""
    logits = [model.decode(int(IDS[PROMPT + 1]))]
    logits += [model.decode(int(logits[-1].argmax())) for _ in range(12)]
    return [*logits, model.prefill(IDS[:PROMPT].tolist())]


@pytest.mark.parametrize("name", COMPILED[:1])
def test_no_layer_is_left_to_python(compiled: tuple[Path, Bundle], name: str) -> None:
    _, bundle = compiled
    dense = BundleDense(bundle, kernels_of(name))
    assert all(decode_weights(bundle.spec, dense, layer) for layer in range(bundle.spec.num_layers))
