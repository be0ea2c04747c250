r"""Make a random checkpoint of a known shape: for measuring speed and memory where no trained weights are at hand.

    python benchmarks/models/make.py qwen3_5_moe /tmp/qwen35
    python benchmarks/models/make.py gpt_oss /tmp/small --layers 2 --experts 8

The directory has the names, types and configuration of the published model. One layer is made at a time, so memory
holds one layer and the embedding. The tokenizer is a byte-level BPE trained on Python's standard library.

Experts are not used evenly. While a layer is made, random and real tokens run through it in transformers, and each
expert's router gets a constant, so that popularity falls like a Zipf law with the `--overlap` that two unrelated tokens
have. The constant is the router's bias. A router without one has it in column 0, because dimension 0 of all hidden
states is the same: embeddings are `CONSTANT` there, and what layers add is 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

CALIBRATION = Path(__file__).parents[2] / "examples" / "calibration"
CORPUS_BYTES = 24 << 20
VOCABULARY = 32768
SPECIAL = ("<|endoftext|>", "<|padding|>")
CONSTANT = 4.0
# Sequences that run through a layer: half of each kind fit its router, the others tell how it does.
RANDOM, TEXT, LENGTH = 4, 4, 192
MOST_POPULAR = 0.9  # largest share of tokens that want the same expert
# E2M1: values of the codes without their sign, and the middles between them.
CODES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
MIDDLES = (CODES[1:] + CODES[:-1]) / 2
MX_COLUMNS, MX_BIAS = 32, 127

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """A model's configuration, and what its checkpoint has of its own."""

    config: Callable[[int, int], dict[str, Any]]  # layers, experts -> config.json
    layers: int
    experts: int
    router: str  # module of a layer
    prefix: str = "model."  # of the language model
    mxfp4: bool = False  # whether experts are stored so
    norms: float = 1.0  # what norms are filled with, but those of `plain_norms`
    plain_norms: tuple[str, ...] = ()


def qwen3_5_moe(layers: int, experts: int) -> dict[str, Any]:
    """Return a configuration like Qwen3.5-35B-A3B's, with half of its width, heads and experts' width."""
    text = {
        "model_type": "qwen3_5_moe_text",
        "vocab_size": VOCABULARY,
        "hidden_size": 1024,
        "num_hidden_layers": layers,
        "layer_types": [f"{'linear' if (layer + 1) % 4 else 'full'}_attention" for layer in range(layers)],
        "full_attention_interval": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "attn_output_gate": True,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": experts,
        "num_experts_per_tok": min(8, experts // 2),
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
        },
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "dtype": "bfloat16",
    }
    return {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": text,
        "tie_word_embeddings": False,
    }


def gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    """Return a configuration like gpt-oss-20b's, with fewer layers and tokens."""
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": layers,
        "layer_types": [f"{'full' if layer % 2 else 'sliding'}_attention" for layer in range(layers)],
        "sliding_window": 128,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "num_local_experts": experts,
        "num_experts_per_tok": min(4, experts // 2),
        "experts_per_token": min(4, experts // 2),
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "initial_context_length": 4096,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }


def olmoe(layers: int, experts: int) -> dict[str, Any]:
    """Return a configuration like OLMoE-1B-7B's, with fewer tokens."""
    return {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": experts,
        "num_experts_per_tok": min(8, experts // 2),
        "norm_topk_prob": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000},
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "dtype": "bfloat16",
    }


SHAPES = {
    "qwen3_5_moe": Shape(
        qwen3_5_moe,
        layers=8,
        experts=256,
        router="mlp.gate",
        prefix="model.language_model.",
        norms=0.0,
        plain_norms=("linear_attn.norm.weight",),
    ),
    "olmoe": Shape(olmoe, layers=16, experts=64, router="mlp.gate"),
    "gpt_oss": Shape(gpt_oss, layers=4, experts=32, router="mlp.router", mxfp4=True),
}


def main() -> None:
    """Write the checkpoint, and print how its routers choose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--overlap", type=float, default=0.43)
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    layers, experts = args.layers or shape.layers, args.experts or shape.experts
    args.out.mkdir(parents=True)
    values = shape.config(layers, experts)
    write_json(args.out / "config.json", values)
    write_json(args.out / "generation_config.json", {"eos_token_id": 0, "pad_token_id": 1, "do_sample": False})
    tokenizer = make_tokenizer(args.out)
    write_weights(args.out, shape, text_part(values), calibration(tokenizer, args.seed), args.overlap, args.seed)


def write_weights(
    out: Path, shape: Shape, values: dict[str, Any], ids: torch.Tensor, overlap: float, seed: int
) -> None:
    """Write the shards and their index; `ids` [sequences, LENGTH] run through each layer."""
    generator = torch.Generator().manual_seed(seed)
    layers, hidden = values["num_hidden_layers"], values["hidden_size"]
    kinds = values.get("layer_types", ["full_attention"] * layers)
    index: dict[str, str] = {}
    total = 0

    def write(number: int, tensors: Tensors) -> None:
        nonlocal total
        name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, out / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())

    ends = ends_of_model(shape, hidden, generator)
    x = ends[f"{shape.prefix}embed_tokens.weight"][ids]  # [B, T, H]
    write(0, ends)
    del ends
    for layer in range(layers):
        model = one_layer(values, kinds[layer])
        module = model.layers[0]
        tensors = random_tensors(module, shape, generator)
        module.load_state_dict(unpacked(tensors), assign=True)
        router = Router(module.get_submodule(shape.router), overlap, generator)
        with torch.no_grad():
            x = model(inputs_embeds=x, use_cache=False).last_hidden_state
        tensors |= {f"{shape.router}.{name}": tensor.data for name, tensor in router.module.named_parameters()}
        write(layer + 1, {f"{shape.prefix}layers.{layer}.{name}": tensor for name, tensor in tensors.items()})
        print(f"layer {layer}, {kinds[layer]}: {router.statistics()}", flush=True)
        del model, module, tensors
    write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    print(f"{total / 1e9:.2f} GB in {out}")


def ends_of_model(shape: Shape, hidden: int, generator: torch.Generator) -> Tensors:
    """Return what is before and after the layers: embedding [V, H], norm [H] and head [V, H]."""
    embed = normal((VOCABULARY, hidden), 1.0, generator)
    embed[:, 0] = CONSTANT
    head = normal((VOCABULARY, hidden), 2 * hidden**-0.5, generator)
    head[:, 0] = 0
    norm = torch.full((hidden,), shape.norms, dtype=torch.bfloat16)
    return {
        f"{shape.prefix}embed_tokens.weight": embed,
        f"{shape.prefix}norm.weight": norm,
        "lm_head.weight": head,
    }


def one_layer(values: Mapping[str, Any], kind: str) -> Any:
    """Return transformers' model of one layer of that kind without weights, whose output is the layer's."""
    changes = {"num_hidden_layers": 1, "layer_types": [kind], "vocab_size": 8, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(**{**values, **changes, "quantization_config": None})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
        ).model
    model.rotary_emb = type(model.rotary_emb)(config)
    model.norm = torch.nn.Identity()
    return model.eval()


def random_tensors(module: torch.nn.Module, shape: Shape, generator: torch.Generator) -> Tensors:
    """Return the tensors of a layer by their names in the checkpoint."""
    tensors: Tensors = {}
    for name, parameter in module.named_parameters():
        size = tuple(parameter.shape)
        if shape.mxfp4 and name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = size  # of the transposed matrix
            std = std_of(name, columns)
            packed = [to_mxfp4(torch.randn(rows, columns, generator=generator) * std) for _ in range(experts)]
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = map(torch.stack, zip(*packed, strict=True))
        else:
            tensors[name] = random_tensor(name, size, shape, generator)
    return tensors


def random_tensor(name: str, size: tuple[int, ...], shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Return a random tensor as what has such a name may be in a trained model."""
    if "norm" in name:
        return torch.full(size, 1.0 if name in shape.plain_norms else shape.norms, dtype=torch.bfloat16)
    if name.endswith("A_log"):
        return torch.empty(size).uniform_(0.01, 16, generator=generator).log()  # float32, as published
    if name.endswith("dt_bias"):
        return torch.ones(size, dtype=torch.bfloat16)
    if name.endswith("sinks"):
        return normal(size, 1.0, generator)
    if "bias" in name:
        return normal(size, 0.05, generator)
    tensor = normal(size, std_of(name, size[-1]), generator)
    if name.removesuffix(".weight").endswith(("o_proj", "out_proj", "down_proj")):
        tensor[..., 0, :] = 0  # so that dimension 0 stays CONSTANT
    return tensor


def std_of(name: str, columns: int) -> float:
    """Return the standard deviation of a matrix whose products are about as large as what goes in."""
    return (1.5 if "down_proj" in name else 1.0) / math.sqrt(columns)


def normal(size: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    """Return normally distributed bfloat16."""
    tensor = torch.empty(size, dtype=torch.bfloat16)
    for part in tensor if len(size) > 2 else [tensor]:
        part.copy_(torch.randn(part.shape, generator=generator) * std)
    return tensor


def to_mxfp4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [rows, columns] as codes [rows, columns / 32, 16], two in a byte, and scales [rows, columns / 32].

    The largest weight of 32 is in the range of the largest codes, 4 and 6.
    """
    blocks = weights.unflatten(1, (-1, MX_COLUMNS))
    exponents = torch.frexp(blocks.abs().amax(-1))[1] - 3  # 2**(e - 1) <= largest < 2**e becomes 4 to 8
    codes = torch.bucketize(torch.ldexp(blocks.abs(), -exponents[..., None]), MIDDLES).to(torch.uint8)
    codes |= (blocks < 0).to(torch.uint8) << 3
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + MX_BIAS).to(torch.uint8)


def unpacked(tensors: Tensors) -> Tensors:
    """Return the tensors with experts in bfloat16, as transformers runs them."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        plain[name] = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
    return plain


class Router:
    """A router that fits its constants to the first tokens it sees, before it chooses, and knows what it chose."""

    def __init__(self, module: Any, overlap: float, generator: torch.Generator) -> None:
        self.module = module
        experts = len(self.module.weight)
        order = torch.randperm(experts, generator=generator)
        self._targets = popularity(experts, self.module.top_k, overlap)[order]
        self._chosen = torch.empty(0)
        module.register_forward_pre_hook(self._fit)
        module.register_forward_hook(self._keep)

    def statistics(self) -> str:
        """Return how the tokens that were not fitted to choose, in words."""
        chosen = self._chosen.view(RANDOM + TEXT, LENGTH, -1)  # [sequences, T, E], of 0 and 1
        held_out = {"random": chosen[RANDOM // 2 : RANDOM], "text": chosen[RANDOM + TEXT // 2 :]}
        shares = torch.cat(list(held_out.values())).mean(dim=(0, 1)).sort(descending=True).values
        overlaps = {
            name: float((each[:, 1:] * each[:, :-1]).sum(-1).mean()) / self.module.top_k
            for name, each in held_out.items()
        }
        return (
            f"neighbours share {overlaps['random']:.0%} of experts on random tokens, {overlaps['text']:.0%} on text; "
            f"an expert is chosen by {shares[0]:.1%} (first), {shares[len(shares) // 2]:.1%} (median) of tokens"
        )

    @torch.no_grad()
    def _fit(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Set the scale of the weights and the constants, so that experts are as popular as the targets."""
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        x = inputs[0].reshape(RANDOM + TEXT, LENGTH, -1).float()
        x = torch.cat([x[: RANDOM // 2], x[RANDOM : RANDOM + TEXT // 2]]).flatten(0, 1)  # [N, H]
        if bias is None:
            weight[:, 0] = 0
        logits = x @ weight.float().T
        weight /= logits.std()
        logits /= logits.std()
        constants, unit = torch.zeros(len(weight)), torch.ones(len(x)) if bias is not None else x[:, 0]
        least = 0.1 / len(x)
        for _ in range(300):
            chosen = (logits + unit[:, None] * constants).topk(self.module.top_k).indices
            shares = torch.bincount(chosen.flatten(), minlength=len(weight)) / len(x)
            steps = torch.log((self._targets + least) / (shares + least))
            constants += 0.2 * steps.clamp(-1, 1) / unit.mean()
        if bias is None:
            weight[:, 0] = constants
        else:
            bias.copy_(constants)

    def _keep(self, module: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        experts = len(self.module.weight)
        self._chosen = torch.nn.functional.one_hot(output[2], experts).sum(1).float()  # [B T, E]


def popularity(experts: int, top_k: int, overlap: float) -> torch.Tensor:
    """Return the share of tokens that choose each expert, the most popular first.

    The shares are min(MOST_POPULAR, c r**-s) of rank r and sum up to `top_k`. Two unrelated tokens share `overlap` of
    their experts, or the least that is possible.
    """
    ranks = torch.arange(1, experts + 1).double()

    def shares(slope: float) -> torch.Tensor:
        scale = solve(lambda c: float((c * ranks**-slope).clamp(max=MOST_POPULAR).sum()), top_k, 1e6)
        return (scale * ranks**-slope).clamp(max=MOST_POPULAR)

    return shares(solve(lambda slope: float(shares(slope).square().sum()) / top_k, overlap, 3.0)).float()


def solve(rising: Callable[[float], float], wanted: float, most: float) -> float:
    """Return where a rising function of numbers from 0 to `most` has the value `wanted`, by bisection."""
    low, high = 0.0, most
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2


def calibration(tokenizer: Tokenizer, seed: int) -> torch.Tensor:
    """Return RANDOM sequences of random ids and TEXT ones of the texts in examples/calibration, [sequences, LENGTH]."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(len(SPECIAL), VOCABULARY, (RANDOM, LENGTH), generator=generator)
    texts = [path.read_text() for path in sorted(CALIBRATION.glob("*.txt"))]
    pieces = [torch.tensor(tokenizer.encode(text).ids).split(LENGTH) for text in texts]
    return torch.cat([random, torch.stack([pieces[place % len(pieces)][1 + place] for place in range(TEXT)])])


def make_tokenizer(out: Path) -> Tokenizer:
    """Train a tokenizer of VOCABULARY tokens, and write its files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise SystemExit(f"the standard library makes {tokenizer.get_vocab_size()} tokens only, not {VOCABULARY}")
    tokenizer.save(os.fspath(out / "tokenizer.json"))
    names = {"eos_token": SPECIAL[0], "bos_token": SPECIAL[0], "pad_token": SPECIAL[1]}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    return tokenizer


def corpus() -> Iterator[str]:
    """Yield the texts of up to CORPUS_BYTES of Python's standard library."""
    total = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts or total > CORPUS_BYTES:
            continue
        total += path.stat().st_size
        yield path.read_text(errors="replace")


def text_part(values: dict[str, Any]) -> dict[str, Any]:
    """Return the part of config.json that describes the language model."""
    text: dict[str, Any] = values.get("text_config", values)
    return text


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object."""
    path.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
