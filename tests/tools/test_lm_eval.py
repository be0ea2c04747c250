"""lm-eval's model interface: the same figures as dymoe-run and transformers give."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import EXAMPLES, MODEL, answer, invoke, run_cli

from dymoe_runtime.cli.lm_eval import lm_eval_command
from dymoe_runtime.errors import DymoeError

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from dymoe_runtime.tools.lm_eval_model import DymoeLM  # noqa: E402

WIKI = (EXAMPLES / "heldout" / "wiki.txt").read_text(encoding="utf-8").strip()
QUESTIONS = [
    {"text": "The river flows through the", "choices": [" town", " of"], "gold": 0},
    {"text": "def __init__(self,", "choices": [" name):", " the river is long"], "gold": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {folder}/data.jsonl
  cache_dir: {folder}/cache
test_split: train
output_type: {kind}
doc_to_text: "{{{{text}}}}"
"""
KINDS = {
    "multiple_choice": "doc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc}]",
    "loglikelihood": 'doc_to_target: "{{choices[gold]}}"\ntarget_delimiter: ""\nmetric_list: [{metric: acc}]',
    "loglikelihood_rolling": 'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: byte_perplexity}]',
    "generate_until": 'doc_to_target: "{{choices[0]}}"\nmetric_list: [{metric: exact_match}]\n'
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 12}',
}
Evaluate = Callable[..., tuple[dict[str, Any], list[Any]]]


def write_task(folder: Path, kind: str, documents: list[dict[str, Any]]) -> str:
    """Write a task of lm-eval and its documents into `folder`; return its name."""
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    lines = [line for line in TASK.splitlines() if kind != "loglikelihood_rolling" or "doc_to_text" not in line]
    text = "\n".join(lines).format(name=f"local_{kind}", folder=folder, kind=kind)
    (folder / "task.yaml").write_text(f"{text}\n{KINDS[kind]}\n")
    return f"local_{kind}"


@pytest.fixture
def evaluate(tmp_path: Path) -> Evaluate:
    """Run lm-eval on a local task; return (metrics, what the model said of each document)."""

    def run(kind: str, documents: list[dict[str, Any]], **args: object) -> tuple[dict[str, Any], list[Any]]:
        name = write_task(tmp_path, kind, documents)
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        given = ",".join(f"{key}={value}" for key, value in args.items())
        results = lm_eval.simple_evaluate(
            model="dymoe", model_args=given, tasks=[name], task_manager=manager, bootstrap_iters=0
        )
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        said = [[response[0] for response in sample["resps"]] for sample in samples]
        return results["results"][name], said

    return run


def likelihood_by_eval(bundle: Path, text: str, path: Path, *args: object) -> float:
    """The log-likelihood of all tokens but the first, by dymoe-run."""
    path.write_text(text)
    outcome = run_cli(bundle, "--eval", path, "--json", *args)
    assert outcome.code == 0, outcome.err
    file = outcome.json["files"][0]
    return float(-file["nll"] * file["tokens"])


def test_log_likelihoods_are_those_of_eval(evaluate: Evaluate, tiny_path: Path, tmp_path: Path) -> None:
    """A byte is a token, so a text is cut after its first one."""
    texts = [WIKI[:200], WIKI[300:420]]
    documents = [{"text": text[0], "choices": [text[1:]], "gold": 0} for text in texts]
    _, said = evaluate("loglikelihood", documents, bundle=tiny_path, point=3)
    for (value, _), text in zip((row[0] for row in said), texts, strict=True):
        assert value == pytest.approx(likelihood_by_eval(tiny_path, text, tmp_path / "t.txt", "--point", 3), rel=1e-6)


def test_rolling_log_likelihoods_are_those_of_eval(evaluate: Evaluate, tiny_path: Path, tmp_path: Path) -> None:
    """Token 0, which ends a text and is written "!", comes before a text that lm-eval scores."""
    metrics, said = evaluate("loglikelihood_rolling", [{"text": WIKI[:200]}], bundle=tiny_path, tiers=4)
    expected = likelihood_by_eval(tiny_path, "!" + WIKI[:200], tmp_path / "t.txt", "--tiers", 4)
    assert said[0][0] == pytest.approx(expected, rel=1e-6)
    assert metrics["byte_perplexity,none"] == pytest.approx(np.exp(-expected / len(WIKI[:200].encode())), rel=1e-5)


def test_the_phase_of_a_prompt_is_that_of_eval(evaluate: Evaluate, shipped_path: Path, tmp_path: Path) -> None:
    """Tiers of a prompt depend on all its tokens, and --eval runs the last one too, which predicts nothing."""
    values = {}
    for phase in ("decode", "prefill"):
        args = {"bundle": shipped_path, "point": 2.25, "eval_phase": phase}
        values[phase] = evaluate("loglikelihood_rolling", [{"text": WIKI[:400]}], **args)[1][0][0]
        flags = ("--point", 2.25, "--eval-phase", phase)
        expected = likelihood_by_eval(shipped_path, "<|endoftext|>" + WIKI[:400], tmp_path / "text.txt", *flags)
        assert values[phase] == pytest.approx(expected, rel=1e-6 if phase == "decode" else 5e-3)
    assert values["decode"] != values["prefill"]


def test_a_checkpoint_gives_the_log_likelihoods_of_transformers(evaluate: Evaluate) -> None:
    """At full precision, also over several windows."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)

    def theirs(ids: list[int], first: int) -> float:
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return float(sum(log_p[at - 1, ids[at]] for at in range(first, len(ids))))

    documents = [{"text": row["text"], "choices": row["choices"], "gold": 0} for row in QUESTIONS]
    metrics, said = evaluate("multiple_choice", documents, checkpoint=MODEL)
    for row, values in zip(QUESTIONS, said, strict=True):
        for choice, (value, _) in zip(row["choices"], values, strict=True):
            context, whole = tokenizer.encode(row["text"]), tokenizer.encode(f"{row['text']} {choice}")
            assert value == pytest.approx(theirs(whole, len(context)), abs=1e-3)
    assert metrics["acc,none"] == 1

    text, window = WIKI[:1200], 256
    ids = tokenizer.encode(text)
    assert window < len(ids) < 2 * window
    _, said = evaluate("loglikelihood_rolling", [{"text": text}], checkpoint=MODEL, context=window)
    start = [tokenizer.bos_token_id, *ids[:window]]
    expected = theirs(start, 1) + theirs(ids[-window - 1 :], 2 * window + 1 - len(ids))
    assert said[0][0] == pytest.approx(expected, abs=1e-3)


def test_choices_are_told_apart(evaluate: Evaluate, shipped_path: Path) -> None:
    metrics, said = evaluate("multiple_choice", QUESTIONS, bundle=shipped_path, memory="400MiB")
    assert metrics["acc,none"] == 1 and all(len(values) == 2 for values in said)


def test_answers_are_those_of_a_run(evaluate: Evaluate, shipped_path: Path) -> None:
    _, said = evaluate("generate_until", QUESTIONS, bundle=shipped_path, tiers=4)
    for row, texts in zip(QUESTIONS, said, strict=True):
        expected = answer(shipped_path, "--tiers", 4, "--temperature", 0, prompt=row["text"], tokens=12)["text"]
        assert texts[0] == expected.split("\n")[0] and len(texts[0]) > 5


def requests_of(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def test_sampling_follows_the_tasks_arguments(tiny_path: Path) -> None:
    model = DymoeLM(bundle=tiny_path, max_gen_toks=20)

    def answers(**kwargs: object) -> list[str]:
        return model.generate_until(requests_of("generate_until", *[("Hello", kwargs)] * 2), disable_tqdm=True)

    greedy = answers(until=[])
    assert greedy[0] == greedy[1] == answers(until="", do_sample=False, temperature=1.0, num_beams=1)[0]
    sampled = answers(do_sample=True, top_k=50, max_new_tokens=15)
    assert sampled[0] != sampled[1] and sampled == answers(do_sample=True, top_k=50, max_tokens=15)
    with pytest.raises(DymoeError, match="typical_p"):
        answers(typical_p=0.5)
    with pytest.raises(DymoeError, match="context of 256"):
        answers(max_gen_toks=256)


def test_a_prompt_that_is_too_long_loses_its_beginning(tiny_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = DymoeLM(bundle=tiny_path, context=50)
    whole, cut = model.loglikelihood(
        requests_of("loglikelihood", (WIKI[:100], " and"), (WIKI[53:100], " and")), disable_tqdm=True
    )
    assert whole == cut and "cut to its last 47" in caplog.text
    with pytest.raises(DymoeError, match="51 tokens"):
        model.loglikelihood(requests_of("loglikelihood", ("a", "b" * 51)), disable_tqdm=True)


def test_a_context_of_spaces_is_no_context(tiny_path: Path) -> None:
    model = DymoeLM(bundle=tiny_path)
    spaces, none = model.loglikelihood(requests_of("loglikelihood", ("  ", "One"), ("", "  One")), disable_tqdm=True)
    assert spaces == none


def test_a_text_that_begins_with_the_first_token_gets_no_second(shipped_path: Path) -> None:
    model = DymoeLM(bundle=shipped_path)
    ids = model.tok_encode("<|endoftext|>One day")
    assert ids.count(model.prefix_token_id) == 1
    assert DymoeLM(bundle=shipped_path, prefix_token_id=5).prefix_token_id == 5


def test_chat_templates_are_the_models(shipped_path: Path) -> None:
    model = DymoeLM(bundle=shipped_path)
    messages = [{"role": "user", "content": "Hello"}]
    assert model.apply_chat_template(messages) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert model.apply_chat_template(messages, add_generation_prompt=False) == "<|im_start|>user\nHello"
    assert "<|im_start|>" in str(model.chat_template(True)) and model.chat_template(False) is None
    assert "/" not in model.tokenizer_name


WRONG = {
    "neither": ({}, "either bundle=PATH or checkpoint=PATH"),
    "both": ({"bundle": "a", "checkpoint": "b"}, "either bundle=PATH or checkpoint=PATH"),
    "unknown": ({"bundle": "TINY", "points": 3}, "points is not known"),
    "of a bundle": ({"checkpoint": "TINY", "memory": "1GiB"}, "memory is not known"),
    "no size": ({"bundle": "TINY", "memory": "much"}, "'much' is not a size"),
    "no tier": ({"bundle": "TINY", "tiers": "high"}, "high"),
    "context": ({"bundle": "TINY", "context": 257}, "context, 256"),
    "kv": ({"bundle": "TINY", "kv_bits": 3}, "kv-bits 3"),
    "threads": ({"bundle": "TINY", "threads": "two"}, "threads=two"),
    "phase": ({"bundle": "TINY", "eval_phase": "both"}, "decode or prefill"),
    "tokens": ({"bundle": "TINY", "max_gen_toks": 0}, "max_gen_toks=0"),
    "missing": ({"bundle": "nowhere.dymoe"}, "nowhere.dymoe"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_one_sentence(case: str, tiny_path: Path) -> None:
    args, words = WRONG[case]
    with pytest.raises(DymoeError) as refused:
        DymoeLM(**{name: str(tiny_path) if value == "TINY" else value for name, value in args.items()})
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_checkpoint_does_not_generate(tiny_checkpoint: Path) -> None:
    with pytest.raises(DymoeError, match="bundle=PATH"):
        DymoeLM(checkpoint=tiny_checkpoint).generate_until(requests_of("generate_until", ("a", {})))


def test_newer_versions_of_lm_eval_find_the_model_by_its_entry_point() -> None:
    (found,) = entry_points(group="lm_eval.models", name="dymoe")
    assert found.load() is DymoeLM


def test_the_command_says_what_is_wrong_in_one_sentence(
    shipped_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_task(tmp_path, "multiple_choice", QUESTIONS)
    args = ("--model", "dymoe", "--tasks", name, "--include_path", str(tmp_path))
    args = (*args, "--model_args", f"bundle={shipped_path},memory=much")
    monkeypatch.setattr(sys, "argv", ["dymoe-lm-eval", *args])  # lm-eval reads these
    outcome = invoke(lm_eval_command, args)
    assert outcome.code == 1 and "Traceback" not in outcome.err
    said = outcome.err.splitlines()[-1].partition(": ")[2]  # of the program's name
    assert said.startswith("--model_args: 'much' is not a size")


def test_without_lm_eval_the_command_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "lm_eval.py").write_text("raise ImportError('No module named lm_eval')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from dymoe_runtime.cli.lm_eval import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'dymoe[eval]'" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_commands_of_the_document_run(shipped_path: Path, tmp_path: Path) -> None:
    """In a folder where `make demo` has run, on a part of its text."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "demo.dymoe").symlink_to(shipped_path)
    (tmp_path / "examples" / "heldout").mkdir(parents=True)
    (tmp_path / "examples" / "heldout" / "wiki.txt").write_text(WIKI[:1500], encoding="utf-8")
    (tmp_path / "examples" / "model").symlink_to(MODEL)
    document = (EXAMPLES.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    commands = re.findall(r"```sh\n(.*?)```", document, re.DOTALL)
    assert len(commands) == 3
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    for command, words in zip(commands, ("tier 4", "words", "words"), strict=True):
        done = subprocess.run(
            ["sh", "-ec", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and words in done.stdout, done.stderr
