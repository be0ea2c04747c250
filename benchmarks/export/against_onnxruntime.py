"""Exports to ONNX beside the bundle that they come from: sizes, quality, agreement with other programs, and speed.

    python benchmarks/export/against_onnxruntime.py BUNDLE MODEL TEXT... [--windows N]

BUNDLE was compiled from MODEL, in a family that transformers has; TEXT was not used for that. KL is to the original in
float32, on N windows of each text. It makes all exports in a temporary folder. `--folder DIR` keeps them there, so that
`--parts speed` can time them later, on a quiet machine.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime as ort
import onnxruntime_genai as og

from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_compile.checkpoint.original import open_original
from dymoe_compile.export.onnx.decoder import DecoderGraph
from dymoe_compile.export.onnx.export import Options, export
from dymoe_compile.export.onnx.graph import Graph, WeightsFile, model_of
from dymoe_compile.export.original import OriginalSource
from dymoe_runtime import Bundle, RunOptions, Tokenizer, load_kernels, load_model, load_scorer
from dymoe_runtime.model.score import Score, score_window, windows
from dymoe_runtime.units import format_size

WINDOW, PROMPT, STEPS, GENERATED, ROUNDS = 512, 128, 64, 64, 5
Logits = Callable[[np.ndarray], np.ndarray]  # of ids that continue the sequence, [T] -> [T, vocab]


class Session:
    """A model in onnxruntime, and the sequence that it has seen."""

    def __init__(self, directory: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, threads
        path = str(directory / "model.onnx")
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.reset()

    def reset(self) -> None:
        """Begin a new sequence."""
        caches = [each for each in self._session.get_inputs() if each.name.startswith("past")]
        self._past = {each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32) for each in caches}
        self._length = 0

    def run(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits [T, vocab] of ids [T], which continue the sequence."""
        self._length += len(ids)
        mask = np.ones((1, self._length), np.int64)
        logits, *caches = self._session.run(None, {"input_ids": ids[None], "attention_mask": mask, **self._past})
        self._past = dict(zip(self._past, caches, strict=True))
        return np.asarray(logits)[0]

    def whole(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits [T, vocab] of ids [T], a sequence of its own."""
        self.reset()
        return self.run(ids)


def make(bundle: Bundle, model: Path, folder: Path) -> dict[str, Path]:
    """Make all exports; return them by name, that in float32 first."""
    made = {"float32": folder / "float32"}
    if not made["float32"].exists():
        make_float32(bundle, model, made["float32"])
    kernels, top = load_kernels(), bundle.layout.ladder[-1]
    settings = {f"tier {tier}": Options(tier=tier) for tier in reversed(bundle.layout.ladder)}
    settings |= {f"tier {top}, portable": Options(tier=top, portable=True)}
    settings |= {"int4": Options(checkpoint=model), "int4, portable": Options(checkpoint=model, portable=True)}
    for name, options in settings.items():
        made[name] = folder / name.replace(", ", "-").replace(" ", "-")
        if made[name].exists():
            continue
        result = export(bundle, made[name], options, kernels)
        ratio = result["bytes"] / result["bundle_bytes"]
        print(f"{name}: {format_size(result['bytes'])}, {ratio:.3f} of the bundle's weights at this precision")
    return made


def make_float32(bundle: Bundle, model: Path, directory: Path) -> None:
    """Make the graph with the weights of the checkpoint in float32."""
    directory.mkdir()
    weights = WeightsFile(directory / "model.onnx.data")
    graph = DecoderGraph(Graph(weights), OriginalSource(Checkpoint.open(model)), bundle.spec.max_context, False).build()
    weights.close()
    (directory / "model.onnx").write_bytes(model_of(graph, False, "dymoe", "").SerializeToString())


def held_out(tokenizer: Tokenizer, texts: tuple[Path, ...], count: int) -> list[np.ndarray]:
    """Return `count` windows of each text."""
    return [window for text in texts for window in list(windows(tokenizer.encode(text.read_text()), WINDOW))[:count]]


def same(rows: np.ndarray) -> np.ndarray:
    """Return rows as they are: a head for what are logits already."""
    return rows


def scored(ids: list[np.ndarray], reference: list[np.ndarray], logits: Logits) -> Score:
    """Return the score of all windows."""
    total = Score()
    for window, expected in zip(ids, reference, strict=True):
        total.add(score_window(window, logits(window), same, (expected, same)))
    return total


def print_quality(bundle: Bundle, model: Path, made: dict[str, Path], ids: list[np.ndarray]) -> None:
    """Print KL and top-1 of the runtime at each tier and of each export."""
    kernels = load_kernels()
    original = open_original(model, kernels)
    reference = [original.logits(original.hidden(window)) for window in ids]
    rows: Iterator[tuple[str, Logits]] = ((name, Session(path, 2).whole) for name, path in made.items())
    print(f"\n{sum(map(len, ids))} tokens\n\n| | KL | top-1 |\n|---|---|---|")
    for tier in reversed(bundle.layout.ladder):
        with load_scorer(bundle, RunOptions(tier=tier), WINDOW, kernels) as scorer:
            print_score(f"dymoe-run, tier {tier}", scored(ids, reference, lambda x: scorer.logits(scorer.hidden(x))))
    for name, logits in rows:
        print_score(f"ONNX, {name}", scored(ids, reference, logits))


def print_score(name: str, score: Score) -> None:
    """Print a row of the table."""
    values = score.to_json()
    print(f"| {name} | {values['kl']:.5f} | {values['top1_agreement']:.1%} |", flush=True)


def print_agreement(model: Path, made: dict[str, Path], ids: list[np.ndarray]) -> None:
    """Print how far the graph in float32 is from transformers, and from itself token by token; and what engines do."""
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    session = Session(made["float32"], 2)
    apart, by_steps = 0.0, 0.0
    for window in ids[:: max(1, len(ids) // 3)]:
        with torch.no_grad():
            expected = theirs(torch.from_numpy(window)[None]).logits[0].numpy()
        whole = session.whole(window)
        apart = max(apart, float(np.abs(whole - expected).max()))
        session.reset()
        parts = [session.run(window[:PROMPT]), *(session.run(window[i : i + 1]) for i in range(PROMPT, len(window)))]
        by_steps = max(by_steps, float(np.abs(whole - np.concatenate(parts)).max()))
    print(f"\nfloat32 graph: {apart:.1e} from transformers, {by_steps:.1e} between one pass and prompt and steps")
    for name, path in made.items():
        onnx.checker.check_model(str(path / "model.onnx"))
        if (path / "genai_config.json").exists():
            print(f"{name}: checked; the engine's {GENERATED} tokens are those of a plain loop: {same_tokens(path)}")


def same_tokens(directory: Path) -> bool:
    """Return whether onnxruntime-genai generates the tokens of a loop that takes the likeliest one."""
    model = og.Model(str(directory))
    ids = [int(token) for token in og.Tokenizer(model).encode("def __init__(self, name):\n")]
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + GENERATED, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    session = Session(directory, 1)
    logits = session.run(np.array(ids))
    for _ in range(GENERATED):
        ids.append(int(logits[-1].argmax()))
        logits = session.run(np.array(ids[-1:]))
    generated = generator.get_sequence(0).tolist()
    return bool(generated == ids[: len(generated)]) and len(generated) == len(ids)


def print_speed(bundle: Bundle, made: dict[str, Path], ids: np.ndarray, threads: int) -> None:
    """Print the medians of interleaved rounds: a prompt, and a token."""
    kernels, top = load_kernels(threads=threads), bundle.layout.ladder[-1]
    times: dict[str, list[tuple[float, float]]] = {}
    sessions = {name: Session(path, threads) for name, path in made.items()}
    with load_model(bundle, RunOptions(tier=top, context=WINDOW, threads=threads), kernels) as model:
        for _ in range(ROUNDS):
            model.reset()
            timed = time_of(lambda x: model.prefill(x.tolist()), lambda x: model.decode(int(x[0])), ids)
            times.setdefault(f"dymoe-run, tier {top}", []).append(timed)
            for name, session in sessions.items():
                session.reset()
                times.setdefault(f"ONNX, {name}", []).append(time_of(session.run, session.run, ids))
    print(f"\n{threads} threads\n\n| | prompt of {PROMPT}, tokens/s | decoding, tokens/s |\n|---|---|---|")
    for name, rounds in times.items():
        prompt, steps = (statistics.median(values) for values in zip(*rounds, strict=True))
        print(f"| {name} | {PROMPT / prompt:.0f} | {STEPS / steps:.0f} |")


def time_of(
    prefill: Callable[[np.ndarray], object], decode: Callable[[np.ndarray], object], ids: np.ndarray
) -> tuple[float, float]:
    """Return the seconds of a prompt, and of STEPS tokens after it."""
    started = time.perf_counter()
    prefill(ids[:PROMPT])
    between = time.perf_counter()
    for at in range(PROMPT, PROMPT + STEPS):
        decode(ids[at : at + 1])
    return between - started, time.perf_counter() - between


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--windows", "count", default=4, show_default=True, help="Windows of 512 tokens of each text.")
@click.option("--threads", default=2, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where the exports are kept; those there are taken.")
@click.option("--parts", default="agreement,quality,speed", show_default=True, help="What to print.")
def main(
    bundle: Path,
    model: Path,
    texts: tuple[Path, ...],
    count: int,
    threads: int,
    folder: Path | None,
    parts: str,
) -> None:
    """Make all exports of BUNDLE, and print what they are like."""
    opened = Bundle.open(bundle)
    ids = held_out(Tokenizer.load(bundle), texts, count)
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        place.mkdir(exist_ok=True)
        made = make(opened, model, place)
        if "agreement" in parts:
            print_agreement(model, made, ids)
        if "quality" in parts:
            print_quality(opened, model, made, ids)
        if "speed" in parts:
            print_speed(opened, made, ids[0], threads)


if __name__ == "__main__":
    main()
