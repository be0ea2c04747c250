"""The architectures of llama.cpp: what each can compute, and which one a model is.

A model is described by its *features*: whatever a plain decoder with a softmax router does not have. An architecture
can compute some of them, and computes others whether the model has them or not. The features and the names of tensors
are those of llama.cpp's graphs (`src/models/` in its sources); the tests of each were a random model in llama.cpp
against the decoder of the runtime (benchmarks/export/llamacpp_families.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, Rope, RouterSpec, clamped_swiglu

# The activation that llama.cpp has for gpt-oss.
GPT_OSS = clamped_swiglu(1.702, 7.0)
# Below this, what a router adds to the sum of its weights changes nothing.
NO_EPS = 1e-9


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp, by the features that it may have and those that it always has."""

    name: str
    may: frozenset[str] = frozenset()
    always: frozenset[str] = frozenset()
    pairs: bool = False  # the rotary embedding turns neighbouring columns, not those half a head apart
    own_head: bool = True  # the head is a tensor of its own even where it is tied
    expert_width: bool = True  # the width of experts has a key of its own
    post_norm: bool = False  # the norm before the experts is called one after attention


def _words(text: str) -> frozenset[str]:
    return frozenset(word.replace("-", " ") for word in text.split())


_ROPES = "linear-rope yarn-rope"
_PLAIN = f"fewer-key-heads wide-heads {_ROPES}"
_SHARED = "shared-expert uneven-shared-expert"
_DENSE = "dense-first-layers shared-expert sigmoid selection-bias expert-groups scaled-routing-weights"
_LLAMA = Architecture(
    "llama",
    _words(f"{_PLAIN} output-bias llama3-rope"),
    _words("normalized-weights"),
    pairs=True,
    own_head=False,
    expert_width=False,
)
_QWEN3 = Architecture(
    "qwen3moe",
    _words(_PLAIN),
    _words("normalized-weights head-norms"),
    own_head=False,
)
_GRANITE = Architecture(
    "granitemoe",
    _LLAMA.may | _words(_SHARED) | _words("scaled-embeddings scaled-residuals scaled-logits scaled-scores"),
    _LLAMA.always,
    pairs=True,
    own_head=False,
    expert_width=False,
)
_GLM = Architecture(
    "glm4moe",
    _words(f"{_DENSE} {_PLAIN} head-norms normalized-weights half-turned-heads"),
    _words("sigmoid selection-bias shared-expert"),
    own_head=False,
    post_norm=True,
)
# model_type of a bundle -> its architecture in llama.cpp
ARCHITECTURES = {
    "dots1": Architecture(
        "dots1",
        _words(f"{_DENSE} {_ROPES} wide-heads normalized-weights"),
        _words("head-norms shared-expert"),
    ),
    "ernie4_5_moe": Architecture(
        "ernie4_5-moe",
        _words(f"{_PLAIN} dense-first-layers shared-expert uneven-shared-expert selection-bias"),
        _words("normalized-weights"),
        pairs=True,
        own_head=False,
    ),
    "glm4_moe": _GLM,
    "gpt_oss": Architecture(
        "gpt-oss",
        _words(f"{_PLAIN} fractional-yarn-rope"),
        _words("normalized-weights windows sinks output-bias router-bias expert-biases clamped-swiglu"),
        post_norm=True,
    ),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "hunyuan_v1_moe": Architecture(
        "hunyuan-moe",
        _words(f"{_PLAIN} uneven-shared-expert"),
        _words("normalized-weights head-norms norms-after-rope shared-expert"),
        own_head=False,
    ),
    "mellum": Architecture(
        "mellum",
        _words(f"{_PLAIN} windows plain-rope-in-windows"),
        _words("normalized-weights head-norms"),
    ),
    "minimax_m2": Architecture(
        "minimax-m2",
        _words(f"{_PLAIN} half-turned-heads"),
        _words("normalized-weights full-norms sigmoid selection-bias"),
    ),
    "mixtral": _LLAMA,
    "olmoe": Architecture("olmoe", _words(_ROPES), _words("full-norms"), expert_width=False),
    "qwen2_moe": Architecture(
        "qwen2moe",
        _words(f"{_ROPES} fewer-key-heads uneven-shared-expert"),
        _words("shared-expert gated-shared-expert"),
    ),
    "qwen3_moe": _QWEN3,
    "qwen3_omni_moe": _QWEN3,
    "qwen3_omni_moe_text": _QWEN3,
    "qwen3_omni_moe_thinker": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_vl_moe_text": _QWEN3,
    "solar_open": _GLM,
}


def architecture_of(spec: ModelSpec) -> Architecture:
    """Return the architecture that computes `spec`; raise DymoeError, naming what is missing, if there is none."""
    architecture = ARCHITECTURES.get(spec.model_type)
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise DymoeError(
            f"{spec.model_type}: no architecture of llama.cpp that this can write; it writes {known}; "
            "run the bundle with dymoe-run, or export it with --format onnx"
        )
    features = frozenset(features_of(spec))
    if "windows" not in architecture.may | architecture.always:
        features -= {"windows"}  # up to that context, a window changes nothing: see `context_of`
    problems = [f"has {name}, which" for name in sorted(features - architecture.may - architecture.always)]
    problems += [f"lacks {name}, without which" for name in sorted(architecture.always - features)]
    if problems:
        raise DymoeError(
            f"{spec.model_type}: the model {problems[0]} llama.cpp's architecture {architecture.name} cannot run; "
            "run the bundle with dymoe-run, or export it with --format onnx"
        )
    return architecture


def context_of(spec: ModelSpec, architecture: Architecture) -> int:
    """Return the longest context that an architecture computes as the model does."""
    if "windows" in architecture.may | architecture.always:
        return spec.max_context
    return min([spec.max_context, *(mixer.window for mixer in attentions_of(spec) if mixer.window is not None)])


def attentions_of(spec: ModelSpec) -> list[AttentionSpec]:
    """Return the attention of each layer that has one."""
    return [layer.mixer for layer in spec.layers if isinstance(layer.mixer, AttentionSpec)]


def features_of(spec: ModelSpec) -> Iterator[str]:
    """Yield the features of a model; some may come twice."""
    for is_there, name in (
        (spec.norm != "rms", "LayerNorm"),
        (spec.head_bias, "head bias"),
        (spec.logit_softcap != 0, "capped logits"),
        (spec.activation == GPT_OSS, "clamped swiglu"),
        (spec.activation not in ("silu", GPT_OSS), "another activation"),
        (spec.embed_scale != 1, "scaled embeddings"),
        (spec.logit_scale != 1, "scaled logits"),
    ):
        if is_there:
            yield name
    yield from _router_features(spec.moe.router)
    yield from _expert_features(spec)
    yield from _differences(attentions_of(spec))
    for layer in spec.layers:
        yield from _layer_features(layer)
        if isinstance(layer.mixer, AttentionSpec):
            yield from _attention_features(layer.mixer, spec)
        else:
            yield f"layers of the kind '{layer.mixer.kind}'"


def _router_features(router: RouterSpec) -> Iterator[str]:
    by_logits = router.score == "softmax_of_chosen"  # is what a softmax over all and a division by the sum give
    for is_there, name in (
        (router.score == "sparsemixer", "sparsemixer"),
        (router.score == "sigmoid", "sigmoid"),
        (router.normalize or by_logits, "normalized weights"),
        (router.bias, "router bias"),
        (router.selection_bias, "selection bias"),
        (router.groups > 1, "expert groups" if router.group_score == "top2" else "groups by one score"),
        (router.scale != 1, "scaled routing weights"),
        (max(router.eps, router.least_sum) > NO_EPS, "damped routing weights"),
        (router.softcap != 0, "capped router logits"),
        (router.expert_scale, "scaled experts"),
        (router.plain_norm, "router norm"),
        (router.scales_input, "scaled expert inputs"),
    ):
        if is_there:
            yield name


def _expert_features(spec: ModelSpec) -> Iterator[str]:
    moe = spec.moe
    if moe.biases:
        yield "expert biases"
    if moe.shared is not None:
        yield "shared expert"
        if moe.shared.width % moe.width:
            yield "uneven shared expert"
        for is_there, name in (
            (moe.shared.gated, "gated shared expert"),
            (moe.shared.scale != 1, "scaled shared expert"),
            (moe.shared.own_norms, "norms of the shared expert"),
        ):
            if is_there:
                yield name
    dense = [n for n, layer in enumerate(spec.layers) if isinstance(layer.feed_forward, MlpSpec)]
    if dense:
        widths = {layer.feed_forward.width for layer in spec.layers if isinstance(layer.feed_forward, MlpSpec)}
        yield "dense first layers" if dense == list(range(len(dense))) and len(widths) == 1 else "dense layers"


def _layer_features(layer: LayerSpec) -> Iterator[str]:
    for is_there, name in (
        (not layer.pre_norms, "no norms before layers"),
        (layer.post_norms, "norms after layers"),
        (layer.parallel, "parallel layers"),
        (layer.scalar, "scaled layers"),
        (layer.residual_scale != 1, "scaled residuals"),
    ):
        if is_there:
            yield name


def _differences(mixers: list[AttentionSpec]) -> Iterator[str]:
    """Yield features of attention that differs by layer in more than its window."""
    if len({replace(mixer, window=None, rope=None) for mixer in mixers}) > 1:
        yield "attention that differs by layer"
    ropes = {mixer.window is not None: {m.rope for m in mixers if m.window == mixer.window} for mixer in mixers}
    everywhere = set().union(*ropes.values())
    if len(everywhere) > 1:
        full, sliding = ropes.get(False, set()), ropes.get(True, set())
        plain = len(full) == 1 and all(rope is not None and sliding == {Rope(rope.theta)} for rope in full)
        yield "plain rope in windows" if plain else "rope that differs by layer"


def _attention_features(mixer: AttentionSpec, spec: ModelSpec) -> Iterator[str]:
    rope = mixer.rope
    for is_there, name in (
        (mixer.heads * mixer.head_dim != spec.hidden_size, "wide heads"),
        (mixer.kv_heads != mixer.heads, "fewer key heads"),
        (mixer.window is not None and mixer.window < spec.max_context, "windows"),
        (mixer.qk_norm == "head", "head norms"),
        (mixer.qk_norm == "full", "full norms"),
        (mixer.norm_after_rope, "norms after rope"),
        (mixer.clip is not None, "clipped queries and keys"),
        (mixer.output_bias, "output bias"),
        (mixer.chunk is not None, "chunks"),
        (mixer.value_norm, "value norms"),
        (mixer.sinks, "sinks"),
        (mixer.gate != "none", "gated attention"),
        (mixer.scale is not None and mixer.scale != mixer.head_dim**-0.5, "scaled scores"),
        (mixer.temperature is not None, "temperature by position"),
        (rope is None, "layers without positions"),
        (rope is not None and rope.dims not in (0, mixer.head_dim), "half turned heads"),
        (rope is not None and rope.kind != "default", f"{rope.kind if rope else ''} rope"),
        (rope is not None and rope.kind == "yarn" and not rope.truncate, "fractional yarn rope"),
    ):
        if is_there:
            yield name
