"""KL of the types of llama.cpp and ik_llama.cpp, and of any quantized checkpoint, with our dense weights.

    python benchmarks/quality/peers.py BUNDLE MODEL -o FILE --held-out TEXT... --gguf F32.gguf --imatrix FILE
        --llama-quantize PATH --type iq2_kt --type iq3_k... [--checkpoint NAME:BITS:DIR]

F32.gguf is MODEL in the GGUF format, by the peer's own converter, and the importance matrix is by its own tool. Only
the experts take the type: the peer quantizes them and turns them back into floats. These run here with the dense
weights of BUNDLE, with 8 bits for the inputs of experts, and all else as for our points. DIR is a checkpoint that
another quantizer has made of MODEL, in any format that dymoe-compile reads. FILE gets a line for each, for table.py;
those that it already has of the same texts are left alone.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from common import Simulated, Stack, held_out, originals, row_header, row_of, score_original, uniform
from gguf import GGUFReader

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.kernels import load_kernels

# Bits per weight. Some of ik_llama.cpp's types add 16 or 32 bits to each row, which count for little in long rows.
TYPE_BITS = {
    "iq2_xxs": 2.06, "iq2_xs": 2.31, "iq2_s": 2.5, "q2_K": 2.63, "iq3_xxs": 3.06, "iq3_s": 3.44, "q3_K": 3.44,
    "iq4_xs": 4.25, "q4_0": 4.5, "q4_K": 4.5, "q5_K": 5.5, "q6_K": 6.56,
    "iq2_kt": 2.12, "iq2_ks": 2.19, "iq2_k": 2.38, "iq2_kl": 2.69, "iq3_kt": 3.12, "iq3_ks": 3.19, "iq3_k": 3.44,
    "iq4_kss": 4.0, "iq4_kt": 4.0, "iq4_ks": 4.25, "iq4_k": 4.5, "iq5_ks": 5.25, "iq5_k": 5.5,
}  # fmt: skip
# Factors in ik_llama.cpp's kernels that its conversion to floats leaves out (iqk_gemm_ktquants.cpp).
KERNEL_FACTORS = {"iq2_kt": 1.05, "iq3_kt": 1.01}
MATRICES = ("gate", "up", "down")


@click.command()
@click.argument("bundle_path", type=click.Path(path_type=Path))
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--held-out", "texts", multiple=True, required=True)
@click.option("--bytes", "nbytes", default=60000, show_default=True, help="Of each held-out text.")
@click.option("--gguf", type=click.Path(path_type=Path))
@click.option("--imatrix", type=click.Path(path_type=Path))
@click.option("--llama-quantize", type=click.Path(path_type=Path))
@click.option("--type", "types", multiple=True, type=click.Choice(list(TYPE_BITS)))
@click.option("--checkpoint", "checkpoints", multiple=True, metavar="NAME:BITS:DIR")
def main(
    bundle_path: Path,
    model: Path,
    output: Path,
    texts: tuple[str, ...],
    nbytes: int,
    gguf: Path | None,
    imatrix: Path | None,
    llama_quantize: Path | None,
    types: tuple[str, ...],
    checkpoints: tuple[str, ...],
) -> None:
    """Measure each peer, and append it to the output."""
    bundle, kernels = Bundle.open(bundle_path), load_kernels()
    judged = held_out(model, texts, nbytes, kernels)
    reference = score_original(judged)
    about = {"texts": [Path(text).stem for text in texts], "bytes": nbytes}
    lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    known = {line["row"][""] for line in lines if {name: line[name] for name in about} == about}

    def measure(label: str, bits: float, experts: list[Stack]) -> None:
        scores = Simulated(bundle, {0: experts}, kernels).measure(uniform(bundle, 0), judged)
        row = dict(zip(row_header(judged), row_of(label, bits, scores, judged, reference), strict=True))
        print(*row.values())
        with output.open("a") as stream:
            print(json.dumps(about | {"row": row}), file=stream)

    for name in types:
        if not (gguf and imatrix and llama_quantize):
            raise SystemExit("--type needs --gguf, --imatrix and --llama-quantize")
        if name not in known:
            measure(name, TYPE_BITS[name], quantized_by(llama_quantize, gguf, imatrix, name, bundle))
    for checkpoint in checkpoints:
        label, bits, folder = checkpoint.split(":", 2)
        if label not in known:
            measure(label, float(bits), [stack for _, stack in originals(Path(folder))])


def quantized_by(llama_quantize: Path, gguf: Path, imatrix: Path, name: str, bundle: Bundle) -> list[Stack]:
    """Return what is left of the experts of a GGUF file in a type, by MoE layer."""
    rules = [f"ffn_{matrix}_exps={name}" for matrix in MATRICES]
    usage = subprocess.run([llama_quantize, "--help"], capture_output=True, text=True, check=False)
    if "--custom-q" in usage.stdout + usage.stderr:  # ik_llama.cpp
        typed = ["--custom-q", ",".join(rules)]
    else:
        typed = [word for rule in rules for word in ("--tensor-type", rule)]
    with tempfile.TemporaryDirectory() as folder:
        small, floats = f"{folder}/small.gguf", f"{folder}/floats.gguf"
        for command in (
            ["--imatrix", imatrix, "--token-embedding-type", "q8_0", *typed, gguf, small, "q8_0", "2"],
            ["--allow-requantize", small, floats, "f32", "2"],
        ):
            done = subprocess.run([llama_quantize, *command], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
        return list(stacks_of(floats, KERNEL_FACTORS.get(name, 1.0), bundle))


def stacks_of(gguf: str, factor: float, bundle: Bundle) -> Iterator[Stack]:
    """Yield the experts of each MoE layer of a GGUF file in float32, times a factor."""
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(gguf).tensors}
    for layer in bundle.spec.moe_layers:
        yield {matrix: factor * torch.tensor(tensors[f"blk.{layer}.ffn_{matrix}_exps.weight"]) for matrix in MATRICES}


if __name__ == "__main__":
    main()
