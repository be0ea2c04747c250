"""The report of a compilation: one self-contained HTML page.

It begins with what people choose by, and ends with what engineers look up. The page has no script and no outside
reference: it opens from a bundle on any machine, today or in ten years. Names, notes and examples come from untrusted
checkpoints and texts, so all text is escaped by `text`.
"""

from __future__ import annotations

from collections.abc import Mapping

from dymoe_compile.report.choosing import glance, memory_table
from dymoe_compile.report.inside import inside
from dymoe_compile.report.quality import quality
from dymoe_compile.report.speed import speed
from dymoe_compile.report.values import Json, bits, flat, scalar, words
from dymoe_runtime.tools.charts.markup import definitions, element, fold, links, page, section, text
from dymoe_runtime.tools.charts.numbers import fixed, kl, size

# Words of the report, for who does not know them yet.
WORDS = (
    ("expert", "One of several small networks of a layer. A router chooses a few of them for each token."),
    ("tier", "The bits of each weight of an expert as it runs. Tiers are nested: the lower is a part of the higher."),
    ("operating point", "A rule that gives each expert of each token a tier, named by the mean bits."),
    ("KL", "Kullback-Leibler divergence of a point's predictions from the original's: 0 if they are the same."),
    ("nat", "The unit of KL and NLL: 1.44 bits of information."),
    ("NLL", "Negative log-likelihood: how much the text surprises the model. Lower is better."),
    ("dense weights", "All weights but those of experts. They are always in memory."),
    ("routing weights", "The numbers by which a layer multiplies the outputs of the experts that its router chose."),
)


def render(findings: Json) -> str:
    """Return the page for a parsed compile.json; sections without data are left out."""
    model = findings.get("model") or {}
    origin = (findings.get("provenance") or {}).get("origin")
    repository = origin.get("repository") if isinstance(origin, Mapping) else None
    name = scalar(repository) or scalar(model.get("name")) or "Compiled model"
    sections = {
        ("memory", "Memory"): memory_table(findings),
        ("speed", "Speed"): speed(findings),
        ("quality", "Quality"): quality(findings),
        ("inside", "Inside the model"): inside(findings),
        ("origin", "How it was made"): origins(findings),
    }
    shown = [title for title, content in sections.items() if content]
    glossary = section("Words", definitions(WORDS), name="words")
    top = element("header", element("h1", text(name)), glance(findings), links([*shown, ("words", "Words")]))
    return page(f"{name}: DyMoE report", top, element("main", *sections.values(), glossary))


def origins(findings: Json) -> str:
    """Return the section on model, storage, quantizer, notes and provenance."""
    storage, model = findings.get("storage") or {}, findings.get("model") or {}
    per_tier = storage.get("bits_per_weight") or {}
    sizes = ("expert_bytes", "dense_bytes", "bundle_bytes", "original_bytes")
    experts, dense, bundle, original = (size(storage[key]) if storage.get(key) else None for key in sizes)
    shape = {
        "family": model.get("family"),
        "layers": model.get("num_layers"),
        "experts per layer": model.get("num_experts"),
        "experts per token": model.get("top_k"),
        "hidden size": model.get("hidden_size"),
        "expert width": model.get("expert_width"),
        "tiers, bits": findings.get("ladder"),
        "bits per expert weight, with scales": [f"{fixed(v, 2)} at {bits(tier)}" for tier, v in per_tier.items()],
        "original": original,
        "bundle, without this report": bundle,
        "experts": experts,
        "dense weights": dense,
        "bits of dense weights": dense_bits(storage.get("dense_bits")),
        "KL that fewer of these bits add": [
            f"{kind} {kl(added)} at {bits(width)}"
            for kind, row in (storage.get("dense_kl") or {}).items()
            for width, added in (row or {}).items()
        ],
        **{f"quantizer: {words(key)}": value for key, value in flat(findings.get("quantizer") or {})},
    }
    notes = "".join(element("li", text(note)) for note in map(scalar, findings.get("notes") or []))
    made = definitions(flat(findings.get("provenance") or {}))
    return section(
        "How it was made",
        element("ul", notes, class_="notes") if notes else "",
        definitions(flat(shape)),
        fold("Provenance: source, options, digests and versions", made),
        name="origin",
    )


def dense_bits(value: object) -> str:
    """Return the text of one width for all kinds, or of each width with its kinds."""
    if not isinstance(value, Mapping):
        return scalar(value)
    tensors: dict[str, list[str]] = {}
    for name, width in value.items():
        tensors.setdefault(scalar(width), []).append(str(name))
    return "; ".join(f"{width}: {', '.join(names)}" for width, names in tensors.items() if width)
