"""What dymoe-run answers, and how: prompts, conversations, sampling, statistics."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundle_kit import forge
from helpers import PROMPT, answer, assert_one_sentence, bundle_cli, compile_cli, run_cli, save_tiny

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.memory_plan import plan_budget
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.model.score import log_softmax
from dymoe_runtime.store.arena import min_arena_bytes

BENCH_KEYS = {
    "ttft_s",
    "tpot_s",
    "prompt_tokens_per_s",
    "tokens_per_s",
    "read_bytes",
    "read_bytes_per_token",
    "hit_rate",
    "bits_mean",
    "peak_rss_bytes",
}


def test_a_prompt_comes_as_a_flag_a_file_or_stdin(shipped_path: Path, tmp_path: Path) -> None:
    expected = answer(shipped_path)["text"]
    (tmp_path / "prompt.txt").write_text(PROMPT)
    tail = ("--max-tokens", 24, "--ignore-eos", "--json")
    assert run_cli(shipped_path, "--prompt-file", tmp_path / "prompt.txt", *tail).json["text"] == expected
    assert run_cli(shipped_path, *tail, stdin=PROMPT).json["text"] == expected
    assert run_cli(shipped_path, "--prompt-file", "-", *tail, stdin=PROMPT).json["text"] == expected
    assert run_cli(shipped_path, *tail, stdin=f"\ufeff{PROMPT}").json["text"] == expected


SAME_TEXTS = [
    b"one\r\ntwo\rthree\n",
    b"\xef\xbb\xbfone\r\ntwo",
    b"\xef\xbb\xbf\xef\xbb\xbfone \xef\xbb\xbf",
    b"\r\n one\r\r\n",
]


@pytest.mark.parametrize("data", SAME_TEXTS)
def test_bytes_are_one_prompt_in_a_file_and_on_stdin(data: bytes, shipped_path: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(data)
    args = (shipped_path, "--max-tokens", 4, "--ignore-eos", "--greedy", "--json")
    text = data.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    expected = run_cli(*args, "--prompt", text).json
    for outcome in (run_cli(*args, "--prompt-file", tmp_path / "prompt.txt"), run_cli(*args, stdin=data.decode())):
        assert {key: outcome.json[key] for key in ("prompt_tokens", "text")} == {
            key: expected[key] for key in ("prompt_tokens", "text")
        }


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b" \r\n", b"\xff\xfeo\x00", b"one \xe9"])
def test_bytes_that_are_no_prompt_are_refused_alike(data: bytes, shipped_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(data)
    file = run_cli(shipped_path, "--prompt-file", path).err.replace(str(path), "stdin")
    outcome = run_cli(shipped_path, stdin=data)
    assert_one_sentence(outcome, "stdin: ")
    assert outcome.err.partition(";")[0] == file.partition(";")[0]


def test_a_chat_on_stdin_reads_lines_like_a_file(shipped_path: Path) -> None:
    """A byte order mark is one at the beginning of the first line only; lines without text are none."""
    args = (shipped_path, "--chat", "--max-tokens", 1, "--json")
    for begin, end in (("\ufeff", "\r\n"), ("", "\n"), ("\ufeff\r\n", "\r\n"), ("\ufeff\u3000\n", "\n")):
        said = run_cli(*args, stdin=f"{begin}Hello{end}{end}\ufeffGo on{end}").json["messages"]
        assert [message["content"] for message in said[::2]] == ["Hello", "\ufeffGo on"]


def test_a_turn_that_fails_loses_nothing_that_was_said(shipped_path: Path) -> None:
    question = "And again " * 60
    args = (shipped_path, "--chat", "--context", 32, "--max-tokens", 4, "--json")
    outcome = run_cli(*args, stdin=f"Hello\n{question}\n")
    assert outcome.code == 1 and "the context holds 32" in outcome.err
    assert [message["role"] for message in outcome.json["messages"]] == ["user", "assistant"]
    assert outcome.json["unanswered"] == question
    outcome = run_cli(*args, "--context-policy", "stop", stdin="Hello\n" * 3)
    assert_one_sentence(outcome, "the context holds 32", "--context-policy stop")
    assert len(outcome.json["messages"]) == 2 * len(outcome.json["turns"]) and outcome.json["unanswered"] == "Hello"


@pytest.fixture(scope="module")
def sampled_path(shipped_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped bundle with a generation_config.json that asks to sample. Read only."""
    path = tmp_path_factory.mktemp("sampled") / "sampled.dymoe"
    shutil.copytree(shipped_path, path)
    asked = json.dumps({"eos_token_id": 0, "do_sample": True, "temperature": 0.8, "top_p": 0.95})
    forge(path, lambda directory, manifest: (directory / "generation_config.json").write_text(asked))
    return path


def test_a_conversation_outlasts_its_context(sampled_path: Path) -> None:
    """Fifty turns of any length, sampled as the model's file says."""
    turns = "".join(f"Tell me about {word}\n" for word in ["the sea", "a king and his ships", "7", "ice"] * 13)
    args = (sampled_path, "--chat", "--context", 512)
    outcome = run_cli(*args, "--max-tokens", 60, "--json", stdin=turns)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("its oldest turns leave it") == 1 and outcome.err.count("\n") == 1
    said = outcome.json
    assert [message["content"] for message in said["messages"][::2]] == turns.splitlines()
    assert all(message["content"] for message in said["messages"][1::2])
    assert len(said["turns"]) == 52 and {turn["finish"] for turn in said["turns"]} <= {"stop", "length"}
    assert all(turn["new_tokens"] + turn["reused_tokens"] == turn["prompt_tokens"] <= 512 for turn in said["turns"])
    sampling = {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0}
    sampling |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": []}
    assert said["sampling"] == sampling
    cut = run_cli(*args, "--stats", stdin=turns[:20] + "\n").err
    assert "(the context of 512 tokens is full)" in cut or "length" not in said["turns"][0]["finish"]
    assert "temperature 0.8, top-p 0.95, seed 0" in cut and "new tokens of" in cut


def test_a_cut_is_said(shipped_path: Path) -> None:
    for mode in ((), ("--chat",)):
        outcome = run_cli(shipped_path, *mode, "--prompt", PROMPT, "--max-tokens", 7, "--ignore-eos")
        assert outcome.err == "note: cut at 7 tokens (--max-tokens)\n"
        outcome = run_cli(shipped_path, *mode, "--prompt", PROMPT, "--context", 40, "--ignore-eos")
        assert re.fullmatch(r"note: cut at \d+ tokens \(the context of 40 tokens is full\)\n", outcome.err)


def test_flags_change_what_the_model_asks_for(sampled_path: Path, tiny_path: Path) -> None:
    asked = answer(sampled_path, tokens=2)["sampling"]
    assert asked["temperature"] == 0.8
    assert answer(sampled_path, "--top-k", 9, tokens=2)["sampling"] == asked | {"top_k": 9}
    greedy = answer(sampled_path, "--greedy", "--repetition-penalty", 1.1, tokens=2)["sampling"]
    assert greedy == answer(tiny_path, tokens=2)["sampling"] | {"repetition_penalty": 1.1}
    assert greedy["temperature"] == 0
    penalties = answer(tiny_path, "--presence-penalty", 1, "--frequency-penalty", 0.5, tokens=2)["sampling"]
    assert (penalties["presence_penalty"], penalties["frequency_penalty"]) == (1, 0.5)
    texts = {answer(sampled_path, *args)["text"] for args in ((), ("--seed", 1), ("--greedy",), ("--temperature", 0.3))}
    assert len(texts) == 4
    assert run_cli(sampled_path, "--prompt", "a", "--greedy", "--temperature", 1).code == 2


THINKS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if not (enable_thinking is defined and not enable_thinking) %}<think>{% else %}<think></think>{% endif %}"
    "{{ note }}"
)


def test_the_template_takes_its_variables_from_flags(tmp_path: Path, calibration_text: Path) -> None:
    model, bundle = save_tiny(tmp_path / "model", "qwen3_moe"), tmp_path / "thinks.dymoe"
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": THINKS}))
    assert compile_cli(model, "-o", bundle, "--calibration", calibration_text).code == 0
    args = (bundle, "--chat", "--prompt", "a", "--max-tokens", 9, "--ignore-eos", "--json")
    default = run_cli(*args).json
    assert default["text"] == "" and default["reasoning"] and default["prompt_tokens"] == len("user: a\n<think>")
    off = run_cli(*args, "--no-thinking").json
    assert off["prompt_tokens"] == len("user: a\n<think></think>") and "reasoning" not in off
    assert run_cli(*args, "--thinking").json["text"] == ""
    assert run_cli(*args, "--template-var", "note=xyz").json["prompt_tokens"] == default["prompt_tokens"] + 3
    for value in ("false", "False"):
        by_name = run_cli(*args, "--template-var", f"enable_thinking={value}").json
        assert by_name["prompt_tokens"] == off["prompt_tokens"]
    assert_one_sentence(run_cli(*args, "--template-var", "notes=1"), "no variable 'notes'", "enable_thinking, note")
    assert run_cli(*args, "--template-var", f"note={'[' * 20000}").code == 1  # a text, longer than the context
    assert run_cli(*args, "--template-var", "note").code == 2
    shown = run_cli(*args[:-1])
    assert shown.out == "\n" and shown.err.startswith(default["reasoning"])
    hidden = run_cli(*args[:-1], "--reasoning", "hide")
    assert hidden.out == "\n" and hidden.err == "note: cut at 9 tokens (--max-tokens)\n"


def test_a_switch_that_the_template_lacks_is_refused(shipped_path: Path) -> None:
    for flag in ("--thinking", "--no-thinking"):
        assert_one_sentence(run_cli(shipped_path, "--chat", "--prompt", "a", flag), flag, "no switch for reasoning")
    assert run_cli(shipped_path, "--prompt", "a", "--no-thinking").code == 2


def test_bench_gives_the_keys_of_the_contract(tiny_path: Path) -> None:
    outcome = run_cli(tiny_path, "--bench", "--prompt-tokens", 9, "--new-tokens", 5, "--json")
    assert set(outcome.json) >= BENCH_KEYS
    assert outcome.json["prompt_tokens"] == 9 and outcome.json["new_tokens"] == 5
    assert "bits per active expert" in run_cli(tiny_path, "--bench", "--prompt-tokens", 9, "--new-tokens", 5).out
    warm = run_cli(tiny_path, "--bench", "--prompt-tokens", 9, "--new-tokens", 5, "--warm-up", "--json").json
    assert warm["prompt_tokens"] == 9 and warm["read_bytes"] < outcome.json["read_bytes"]
    assert run_cli(tiny_path, "--prompt", PROMPT, "--warm-up").code == 2


def test_sampling_is_reproducible_by_its_seed(shipped_path: Path) -> None:
    texts = [answer(shipped_path, "--temperature", 1, "--top-p", 0.9, "--seed", seed)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_string_ends_the_text_before_it(shipped_path: Path) -> None:
    whole = answer(shipped_path)["text"]
    stop = whole[10:14]
    result = answer(shipped_path, "--stop", stop)
    assert result["text"] == whole[: whole.index(stop)] and result["finish"] == "stop"


def test_max_tokens_and_a_full_context_end_with_length(tmp_path: Path, tiny_path: Path) -> None:
    assert answer(tiny_path, tokens=3)["finish"] == "length"
    result = answer(tiny_path, "--context", 40, tokens=100)
    assert result["finish"] == "length" and result["prompt_tokens"] + result["new_tokens"] <= 40


def test_the_cache_takes_the_bits_that_it_is_given(shipped: Bundle) -> None:
    """About the same probabilities, and the fewer bits the less memory."""
    ids = np.random.default_rng(0).integers(shipped.spec.vocab_size, size=60).tolist()
    found = []
    for bits in (32, 16, 8):
        with load_model(shipped, RunOptions(context=256, kv_bits=bits)) as model:
            logits = np.stack([model.prefill(ids[:8]), *(model.decode(token) for token in ids[8:])])
            found.append((log_softmax(logits), model.budget.state_bytes))
    (whole, most), *others = found
    for logits, _ in others:
        assert 0 < (np.exp(whole) * (whole - logits)).sum(-1).mean() < 0.003
    assert most > others[0][1] > others[1][1]
    assert run_cli(shipped.path, "--prompt", PROMPT, "--kv-bits", 4).code == 2


def test_chat_answers_by_the_template(shipped_path: Path) -> None:
    outcome = run_cli(shipped_path, "--chat", "--prompt", "Hello", "--max-tokens", 5, "--json")
    assert outcome.code == 0 and outcome.json["prompt_tokens"] >= 5
    outcome = run_cli(shipped_path, "--chat", "--max-tokens", 5, "--json", stdin="Hello\nAnd again\n")
    assert outcome.code == 0, outcome.err
    roles = [message["role"] for message in outcome.json["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"]


def test_a_second_turn_goes_on_as_if_it_were_one_prompt(shipped_path: Path) -> None:
    """What the KV cache keeps of the first turn changes nothing."""
    args = ("--chat", "--max-tokens", 6, "--tiers", 4, "--greedy", "--json")
    turns = run_cli(shipped_path, *args, stdin="Tell me\nAnd more\n").json["messages"]
    template = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in turns[:3])
    prompt = template + "<|im_start|>assistant\n"
    again = run_cli(shipped_path, "--prompt", prompt, *args[1:]).json["text"]
    assert again == turns[3]["content"]


def test_statistics_name_each_mechanism(shipped_path: Path) -> None:
    outcome = run_cli(shipped_path, "--prompt", PROMPT, "--max-tokens", 4, "--stats")
    for word in ("bits per active expert", "read", "hit rate", "prefetch", "tokens/s", "peak", "least that works"):
        assert word in outcome.err


def test_a_text_that_the_output_cannot_take_is_no_error(shipped_path: Path) -> None:
    """A model may answer with any character, wherever it is asked."""
    script = """
import dymoe_runtime.cli.answer as answer
from dymoe_runtime.text.generate import Token
answer.generate = lambda *args, **options: iter([Token(1, "caf\\u00e9 \\u2014", "length")])
from dymoe_runtime.cli.__main__ import run
run()
"""
    command = [sys.executable, "-c", script, str(shipped_path), "--prompt", "a"]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"caf\xe9 ?\n"), done.stderr


@pytest.mark.parametrize("experts", [2, 3])
def test_a_model_of_a_few_experts_runs(experts: int, tmp_path: Path, calibration_text: Path) -> None:
    model = save_tiny(tmp_path / "model", "qwen3_moe", num_hidden_layers=2, mlp_only_layers=[0], num_experts=experts)
    outcome = compile_cli(model, "-o", tmp_path / "bundle", "--calibration", calibration_text)
    assert outcome.code == 0, outcome.err
    bundle = Bundle.open(tmp_path / "bundle")
    assert plan_budget(bundle, load_kernels(), 64).full_arena_bytes <= min_arena_bytes(bundle.layout)
    for memory in ((), ("--memory", plan_budget(bundle, load_kernels(), 64).floor_bytes + (16 << 20))):
        args = ("--max-tokens", 8, "--ignore-eos", "--context", 64, *memory)
        assert run_cli(bundle.path, "--prompt", "abc", *args).code == 0


def test_a_conversation_that_is_not_utf_8_is_refused(shipped_path: Path) -> None:
    command = [sys.executable, "-m", "dymoe_runtime", str(shipped_path), "--chat", "--max-tokens", "2"]
    done = subprocess.run(command, input=b"hello\n\xff\n", capture_output=True, timeout=60)
    assert done.returncode == 1 and b"UTF-8" in done.stderr and b"Traceback" not in done.stderr


def test_inspect_tells_sizes_bits_and_points(shipped: Bundle) -> None:
    described = bundle_cli("inspect", shipped.path, "--json").json
    assert described["expert_weights"] == 18_874_368
    on_disk = sum(path.stat().st_size for path in shipped.path.iterdir())
    assert described["total_bytes"] == on_disk
    bits = {tier["tier"]: tier["effective_bits"] for tier in described["tiers"]}
    assert bits[2] <= 2.2 and bits[3] <= 3.25 and bits[4] <= 4.3
    text = bundle_cli("inspect", shipped.path).out
    assert all(point.name in text for point in shipped.policy.points)


def test_verify_says_that_a_sound_bundle_is_sound(tiny_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_path, tmp_path / "moved elsewhere.dymoe"))
    outcome = bundle_cli("verify", copy)
    assert outcome.code == 0 and "sound" in outcome.out


def test_an_answer_follows_a_schema_or_a_grammar(tiny_path: Path, tmp_path: Path) -> None:
    schema = '{"enum": ["yes", "no"]}'
    (tmp_path / "schema.json").write_text(schema)
    (tmp_path / "answer.gbnf").write_text('root ::= "yes" | "no"\n')
    begin = (tiny_path, "--prompt", "a", "--json")
    for given in (schema, tmp_path / "schema.json"):
        said = run_cli(*begin, "--json-schema", given).json
        assert said["text"] in ('"yes"', '"no"') and said["finish"] == "stop"
    said = run_cli(*begin, "--grammar", tmp_path / "answer.gbnf", "--temperature", 2).json
    assert said["text"] in ("yes", "no") and said["finish"] == "stop"
    cut = run_cli(*begin, "--json-schema", schema, "--max-tokens", 2).json
    assert cut["text"] in ('"y', '"n') and cut["finish"] == "length"


def test_a_schema_that_cannot_be_used_is_one_sentence(tiny_path: Path, tmp_path: Path) -> None:
    for given, words in (
        ('{"not": {}}', "--json-schema: 'not' is not supported; leave it out"),
        ('{"a"', "--json-schema: not valid JSON"),
        (tmp_path / "none.json", "none.json: no such file; give a JSON schema"),
    ):
        outcome = run_cli(tiny_path, "--prompt", "a", "--json-schema", given)
        assert outcome.code == 1 and words in outcome.err and outcome.err.count("\n") == 1 and not outcome.out
    (tmp_path / "loop.lark").write_text('start: "a" start')
    outcome = run_cli(tiny_path, "--prompt", "a", "--grammar", tmp_path / "loop.lark")
    assert outcome.code == 1 and "loop.lark: no text can end" in outcome.err
    assert run_cli(tiny_path, "--prompt", "a", "--json-schema", "{}", "--ignore-eos").code == 2
    assert run_cli(tiny_path, "--bench", "--json-schema", "{}").code == 2
