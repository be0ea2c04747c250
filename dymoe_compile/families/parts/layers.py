"""Which layers of a model are of which kind, from the keys that many families share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from dymoe_compile.families.parts.config import Config
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import LayerSpec, MixerSpec, MlpSpec, MoeSpec

SLIDING, FULL = "sliding_attention", "full_attention"


def layers_of(config: Config) -> int:
    """Return the number of layers."""
    return config.integer("num_hidden_layers", most=10_000)


def layers_with(
    mixers: Iterable[MixerSpec], moe: MoeSpec, dense: Collection[int] = (), dense_width: int = 0, **rest: Any
) -> tuple[LayerSpec, ...]:
    """Return layers with these mixers; those in `dense` have an MLP of `dense_width`, the others experts.

    `rest` sets other fields of the layers. Raises DymoeError if there are dense layers, but they have no width.
    """
    if dense and not dense_width:
        raise DymoeError("config.json: 'intermediate_size' is missing or 0, but some layers have a dense MLP")
    return tuple(
        LayerSpec(mixer, MlpSpec(dense_width) if n in dense else moe, **rest) for n, mixer in enumerate(mixers)
    )


def kinds_of(config: Config, name: str, known: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    """Return the kind of each layer from the list `name`, or `default` if it is missing.

    Raises DymoeError if the list does not have one of `known` for each layer.
    """
    kinds = config.get(name, default=default)
    count = layers_of(config)
    given = isinstance(kinds, (list, tuple)) and len(kinds) >= count
    if not given or not all(kind in tuple(known) for kind in kinds[:count]):
        raise DymoeError(f"config.json: '{name}' must give each of {count} layers one of {', '.join(known)}")
    return tuple(kinds[:count])


def attention_kinds(config: Config, window: int | None, default: Sequence[str]) -> tuple[str, ...]:
    """Return whether the attention of each layer is SLIDING or FULL, by `layer_types`, or `default` if it is missing.

    Raises DymoeError if a layer should slide, but there is no window.
    """
    kinds = kinds_of(config, "layer_types", (SLIDING, FULL), default)
    if SLIDING in kinds and window is None:
        raise DymoeError(f"config.json: layers are of type {SLIDING}, but 'sliding_window' gives no window")
    return kinds


def each_nth(config: Config, n: int, nth: str = FULL, others: str = SLIDING) -> list[str]:
    """Return the kind of each layer if each `n`th one is `nth`, and the others are `others`."""
    return [others if (layer + 1) % n else nth for layer in range(layers_of(config))]


def window_of(config: Config, default: int = 0) -> int | None:
    """Return the number of positions that a token attends to, itself included, or None for all.

    `default` is that of a config.json without the key `sliding_window`. If that is null or 0, there is no window.
    """
    missing = "sliding_window" not in config.values
    return config.integer("sliding_window", default=default if missing else 0, least=0) or None


def first_layers(config: Config, default: int, name: str = "first_k_dense_replace") -> set[int]:
    """Return as many of the first layers as the key `name` says."""
    return set(range(min(config.integer(name, default=default, least=0), layers_of(config))))


def dense_by_list(config: Config, default: Collection[int]) -> set[int]:
    """Return the layers that `mlp_layer_types` calls dense, or `default` if it is missing."""
    kinds = ["dense" if layer in default else "sparse" for layer in range(layers_of(config))]
    return {
        n for n, kind in enumerate(kinds_of(config, "mlp_layer_types", ("dense", "sparse"), kinds)) if kind == "dense"
    }


def dense_by_step(config: Config, default: Collection[int] = ()) -> set[int]:
    """Return the layers with a dense MLP as Qwen has them: by `mlp_only_layers`, and by `decoder_sparse_step`.

    The first lists such layers; `default` is what it means if it is missing. All layers but each nth one are such, too,
    if the second is n.
    """
    step = config.integer("decoder_sparse_step", default=1)
    listed = default if config.get("mlp_only_layers", default=None) is None else config.integers("mlp_only_layers")
    return {layer for layer in range(layers_of(config)) if layer in listed or (layer + 1) % step}
