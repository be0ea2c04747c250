"""Exports to GGUF in llama.cpp: sizes, quality by its own tool beside that of the runtime, and speed.

    python benchmarks/export/against_llamacpp.py BUNDLE MODEL TEXT... --bin DIR --calibration FILE...

BUNDLE was compiled from MODEL with the calibration files; TEXT was not used for that. DIR has llama-perplexity,
llama-quantize, llama-imatrix and llama-bench. KL is to the original, which is written to a GGUF file, too. Windows have
512 tokens, of which the second half is scored, as llama-perplexity does it. For the runtime, the original is the
checkpoint in float32. Recipes are as large as llama.cpp's own mixes of types, which get an importance matrix of
llama-imatrix from the same files. It makes all files in a temporary folder.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np

from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_compile.checkpoint.original import open_original
from dymoe_compile.export.gguf.export import Options, export
from dymoe_compile.export.gguf.original import write_original
from dymoe_compile.export.gguf.quantizing import BASE, IMPORTANCE, ORIGINAL, TYPES, prepare
from dymoe_compile.job.progress import silent
from dymoe_runtime import Bundle, RunOptions, load_kernels, load_scorer
from dymoe_runtime.units import format_size

WINDOW = 512
MIXES = ("Q2_K", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M")
# Bytes by which a file's metadata may grow when it is quantized.
ALLOWANCE = 1024
KL, PERPLEXITY = r"Mean +KLD: +(\S+) ± +(\S+)", r"Mean PPL\(Q\) +: +(\S+)"
TOP = r"Same top p: +(\S+)"


class Tools:
    """The programs of llama.cpp."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder, self.threads = folder, threads

    def run(self, name: str, *args: object) -> str:
        """Return what a program prints; exit with it if it fails."""
        command = [str(self._folder / name), *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout + done.stderr

    def base(self, model: Path, text: Path, base: Path) -> np.ndarray:
        """Keep the original's logits in `base`; return the ids of all windows, int64 [n, 512]."""
        self._perplexity(model, text, base)
        with base.open("rb") as file:
            file.seek(8)
            context, _, chunks = np.frombuffer(file.read(12), np.int32)
            return np.frombuffer(file.read(4 * context * chunks), np.int32).reshape(chunks, context).astype(np.int64)

    def quality(self, model: Path, text: Path, base: Path) -> tuple[float, float, float]:
        """Return the KL of a model, its standard error, and the share of positions with the same best token in %."""
        printed = self._perplexity(model, text, base, "--kl-divergence")
        kl, top = re.search(KL, printed), re.search(TOP, printed)
        if kl is None or top is None:
            raise SystemExit(printed[-3000:])
        return float(kl[1]), float(kl[2]), float(top[1])

    def _perplexity(self, model: Path, text: Path, base: Path, *args: object) -> str:
        files = ("-m", model, "-f", text, "--kl-divergence-base", base)
        return self.run("llama-perplexity", *files, "-c", WINDOW, "-t", self.threads, *args)

    def speed(self, model: Path) -> tuple[float, float]:
        """Return the tokens/s of a prompt of 128 tokens, and of decoding 64."""
        args = ("-m", model, "-p", 128, "-n", 64, "-t", self.threads, "-r", 3, "-o", "json")
        prompt, decode = json.loads(self.run("llama-bench", *args).split("\n]")[0] + "\n]")
        return prompt["avg_ts"], decode["avg_ts"]


def own_kl(bundle: Bundle, model: Path, ids: np.ndarray, tiers: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Yield each tier with the KL of the runtime on the second half of each window."""
    kernels, scored = load_kernels(), slice(WINDOW // 2, WINDOW - 1)
    original = open_original(model, kernels)
    expected = [log_softmax(original.logits(original.hidden(window)[scored])) for window in ids]
    for tier in tiers:
        with load_scorer(bundle, RunOptions(tier=tier), WINDOW, kernels) as scorer:
            found = (log_softmax(scorer.logits(scorer.hidden(window)[scored])) for window in ids)
            kls = [(np.exp(p) * (p - q)).sum(-1) for p, q in zip(expected, found, strict=True)]
        yield tier, float(np.mean(kls))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithms of the probabilities of logits [T, vocab]."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--bin", "folder", required=True, type=click.Path(path_type=Path), help="Where llama.cpp's programs are.")
@click.option("--calibration", multiple=True, help="Files that BUNDLE was calibrated with. Without them, no recipes.")
@click.option("--characters", default=30000, show_default=True, help="How much of each text to use.")
@click.option("--threads", default=2, show_default=True)
def main(
    bundle: Path,
    model: Path,
    texts: tuple[Path, ...],
    folder: Path,
    calibration: tuple[str, ...],
    characters: int,
    threads: int,
) -> None:
    """Make all exports of BUNDLE, and print what they are like."""
    opened, tools = Bundle.open(bundle), Tools(folder, threads)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        text = place / "text.txt"
        text.write_text("".join(path.read_text(encoding="utf-8")[:characters] for path in texts), encoding="utf-8")
        print_tiers(opened, model, tools, text, place)
        if calibration:
            print_recipes(opened, model, tools, text, place, calibration)


def print_tiers(bundle: Bundle, model: Path, tools: Tools, text: Path, place: Path) -> None:
    """Print KL, size and speed of each tier."""
    original = place / "original.gguf"
    write_original(bundle, Checkpoint.open(model), original, silent)
    ids = tools.base(original, text, place / "base.kld")
    print(f"{ids.size} tokens, half of them scored\n")
    print("| tier | file | of the bundle | KL, runtime | KL, llama.cpp | ratio | same best | prompt | decoding |")
    print("|---|---|---|---|---|---|---|---|---|")
    for tier, own in own_kl(bundle, model, ids, bundle.layout.ladder):
        file = place / f"tier-{tier}.gguf"
        result = export(bundle, file, Options(tier), load_kernels())
        kl, error, top = tools.quality(file, text, place / "base.kld")
        prompt, decode = tools.speed(file)
        print(
            f"| {tier} | {format_size(result['bytes'])} | {result['bytes'] / result['bundle_bytes']:.2f} | {own:.5f} "
            f"| {kl:.5f} ± {error:.5f} | {kl / own:.3f} | {top:.1f}% | {prompt:.0f} | {decode:.0f} |",
            flush=True,
        )


def print_recipes(
    bundle: Bundle, model: Path, tools: Tools, text: Path, place: Path, calibration: Sequence[str]
) -> None:
    """Print KL and size of llama.cpp's mixes, and of recipes that are no larger."""
    prepared = prepare(bundle, place, model, calibration, load_kernels(), silent)
    original, theirs, file = place / ORIGINAL, place / "theirs.gguf", place / "quantized.gguf"
    texts = place / "calibration.txt"
    texts.write_text("".join(Path(name).read_text(encoding="utf-8") for name in calibration), encoding="utf-8")
    tools.run("llama-imatrix", "-m", original, "-f", texts, "-o", theirs, "-c", WINDOW, "-t", tools.threads)
    print("\n| mix | bytes | KL | recipe: bytes | KL | expected | ratio | prompt | decoding | of the mix |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for mix in MIXES:
        tools.run("llama-quantize", "--imatrix", theirs, original, file, mix, tools.threads)
        size, mix_speed = file.stat().st_size, tools.speed(file)
        kl, error, _ = tools.quality(file, text, place / "base.kld")
        recipe = prepared.recipe(size - ALLOWANCE)
        (place / TYPES).write_text(recipe.to_text(), encoding="utf-8")
        types = ("--imatrix", place / IMPORTANCE, "--tensor-type-file", place / TYPES)
        tools.run("llama-quantize", *types, original, file, BASE, tools.threads)
        ours, our_error, _ = tools.quality(file, text, place / "base.kld")
        speed = tools.speed(file)
        print(
            f"| {mix} | {size} | {kl:.5f} ± {error:.5f} | {file.stat().st_size} | {ours:.5f} ± {our_error:.5f} "
            f"| {recipe.kl:.5f} | {ours / kl:.3f} | {speed[0]:.0f} | {speed[1]:.0f} "
            f"| {mix_speed[0]:.0f}, {mix_speed[1]:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
