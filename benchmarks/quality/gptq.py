"""Quantize a checkpoint by GPTQ with the package GPTQModel, for peers.py.

    python benchmarks/quality/gptq.py MODEL OUT --bits 3 --calibration TEXT...

It needs an environment of its own with gptqmodel, which asks for other versions of torch, and on two cores
GPTQMODEL_CPU_WORKERS=2, without which that package refuses to start. Groups have 64 weights, as our blocks; all else is
as the package has it. Calibration is `--tokens` tokens of the texts, taken at random in windows of 512.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoTokenizer

WINDOW = 512
GROUP = 64


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--bits", type=int, required=True)
@click.option("--calibration", "texts", multiple=True, required=True)
@click.option("--tokens", default=65536, show_default=True)
def main(model: Path, output: Path, bits: int, texts: tuple[str, ...], tokens: int) -> None:
    """Write the quantized checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = []
    for text in texts:
        ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
        windows += [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [windows[i] for i in order[: tokens // WINDOW]]
    quantizer = GPTQModel.load(str(model), QuantizeConfig(bits=bits, group_size=GROUP, offload_to_disk=False))
    quantizer.quantize([{"input_ids": ids, "attention_mask": [1] * WINDOW} for ids in chosen], batch_size=4)
    quantizer.save(str(output))


if __name__ == "__main__":
    main()
