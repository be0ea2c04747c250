"""What many tests share: the shipped model, tiny random checkpoints, and commands run in this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from dymoe_compile.cli import main as compile_command
from dymoe_runtime.cli.bundle import bundle as bundle_command
from dymoe_runtime.cli.run import run as run_command

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = EXAMPLES / "model"
# What a profile says of speed, which decides nothing but predictions.
RATES = (
    'threads = 1\nmemory_bandwidth = "1GB/s"\ndecode_rate = "1G/s"\nprompt_rate = "1G/s"\nlayer_us = 1\n'
    'disk_bandwidth = "1MB/s"\ndisk_latency_us = 1\n'
)
PROMPT = "The river flows through the town of"


def tiny_config(family: str, **changes: object) -> object:
    """A transformers configuration small enough to run in milliseconds."""
    transformers = pytest.importorskip("transformers")
    common = dict(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    own = {
        "qwen3_moe": dict(
            moe_intermediate_size=40, intermediate_size=72, head_dim=16, num_experts=6, norm_topk_prob=True
        ),
        "olmoe": dict(intermediate_size=40, num_experts=6),
        "mixtral": dict(intermediate_size=40, num_local_experts=6),
    }[family]
    config_class = {
        "qwen3_moe": transformers.Qwen3MoeConfig,
        "olmoe": transformers.OlmoeConfig,
        "mixtral": transformers.MixtralConfig,
    }[family]
    return config_class(**{**common, **own, **changes})


def tiny_model(family: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random transformers model whose norms and biases are not trivial."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(0, 0.3 if "experts" in name or "gate" in name else 0.15)
    return model


def save_tiny(directory: Path, family: str, seed: int = 0, tokenizer: bool = True, **changes: object) -> Path:
    """Save a tiny random checkpoint of `family` with a byte tokenizer of its vocabulary."""
    tiny_model(family, seed, **{"vocab_size": 256, **changes}).save_pretrained(directory)
    if tokenizer:
        save_byte_tokenizer(directory)
    return directory


def save_byte_tokenizer(directory: Path) -> None:
    """A tokenizer whose tokens are the 256 bytes; token 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": alphabet[0]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The object on the last line of stdout."""
        return json.loads(self.out.strip().splitlines()[-1])


def invoke(command: Any, args: Sequence[object], stdin: str | bytes | None = None) -> Outcome:
    """Run a command in this process; a traceback fails the test."""
    result = CliRunner().invoke(command, [str(arg) for arg in args], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def compile_cli(*args: object) -> Outcome:
    return invoke(compile_command, args)


# All dense weights at 8 bits, which random models do not get by themselves.
EIGHT_BITS = ("--dense-bits", 8)


def compiled(checkpoint: Path, bundle: Path, calibration: Path) -> Path:
    """The path of a new bundle, compiled from a checkpoint with the defaults, but all dense weights at 8 bits."""
    outcome = compile_cli(checkpoint, "-o", bundle, "--calibration", calibration, *EIGHT_BITS)
    assert outcome.code == 0, outcome.err
    return bundle


def run_cli(*args: object, stdin: str | bytes | None = None) -> Outcome:
    return invoke(run_command, args, stdin)


def bundle_cli(*args: object) -> Outcome:
    return invoke(bundle_command, args)


def answer(bundle: Path, *args: object, prompt: str = PROMPT, tokens: int = 24) -> dict[str, Any]:
    """Return what `dymoe-run --json` says of an answer of so many tokens."""
    outcome = run_cli(bundle, "--prompt", prompt, "--max-tokens", tokens, "--ignore-eos", "--json", *args)
    assert outcome.code == 0, outcome.err
    assert len(outcome.out.splitlines()) == 1  # nothing but the object
    return dict(outcome.json)


def assert_one_sentence(outcome: Outcome, *words: str, code: int = 1) -> None:
    """The command failed with `code` and one line on stderr that has all `words`."""
    assert outcome.code == code, outcome
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in lines[0], (word, lines[0])


def reader_threads(expected: int = 0) -> set[int]:
    """Threads that read experts, by numbers, once there are as many as expected or some time has passed.

    The compiled ones are none of Python's, and are found only where the system lists them.
    """
    deadline = time.monotonic() + 2.0
    while True:
        found = {thread.native_id for thread in threading.enumerate() if thread.name.startswith("reader-")}
        for task in Path("/proc/self/task").glob("*"):
            with suppress(OSError):  # it has just ended
                if (task / "comm").read_text() == "dymoe-reader\n":
                    found.add(int(task.name))
        if len(found) == expected or time.monotonic() > deadline:
            return found
        time.sleep(0.001)
