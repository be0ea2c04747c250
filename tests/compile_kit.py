"""What the tests of compiling share: reading reports, comparing bundles, and what every bundle must hold."""

from __future__ import annotations

import filecmp
import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from helpers import Outcome

from dymoe_runtime.bundle.bundle import Bundle, read_manifest
from dymoe_runtime.bundle.records import read_record
from dymoe_runtime.bundle.tiers import unpack_codes
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.tools.describe import describe

# What dymoe-compile says of its stages on a pipe: at the end of each, and on the way.
STAGE_DONE = re.compile(r"(?P<title>[a-z ]+): (?P<total>\d+) done in (?P<seconds>\d+\.\d) s")
STAGE_UNDER_WAY = re.compile(r"(?P<title>[a-z ]+): (?P<done>\d+) of (?P<total>\d+) after (?P<seconds>\d+) s")
# Elements of HTML that are never closed.
VOID = {"meta", "br", "link", "img", "hr", "input"}


def without_stages(outcome: Outcome) -> Outcome:
    """The outcome without the lines on stderr about the stages that were reached."""
    lines = outcome.err.splitlines()
    stages = [line for line in lines if STAGE_DONE.fullmatch(line) or STAGE_UNDER_WAY.fullmatch(line)]
    assert lines[: len(stages)] == stages, outcome.err
    return replace(outcome, err="\n".join(lines[len(stages) :]))


def interrupt(*args: object) -> NoReturn:
    """In place of a function that is interrupted."""
    raise KeyboardInterrupt


def same_files(a: Path, b: Path) -> bool:
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    return filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


class Page(HTMLParser):
    """Reads a page strictly: each tag is closed in turn; keeps texts, tags and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if "style" not in self.open:
            self.texts.append(data)


def assert_findings_fit(path: Path) -> None:
    """compile.json and report.html are files of the bundle, can be read, and tell what policy.json tells."""
    bundle, manifest = Bundle.open(path), read_manifest(path)
    policy, spec = bundle.policy, bundle.spec
    for name in ("compile.json", "report.html"):
        assert manifest.files[name].nbytes == (path / name).stat().st_size and manifest.files[name].sha256
    found = json.loads((path / "compile.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert found["version"] == 2 and found["ladder"] == list(manifest.ladder)
    assert found["default_point"] == policy.default_point and found["notes"] == list(policy.notes)
    assert found["provenance"] == manifest.provenance
    points = [asdict(point) for point in policy.points]
    shown = [{k: v for k, v in p.items() if k != "kl_interval"} for p in found["points"]]
    assert shown == [{k: v for k, v in p.items() if k not in ("decode", "prefill")} for p in points]
    for point in found["points"]:
        assert point["kl_interval"] is None or point["kl_interval"][0] <= point["kl"] <= point["kl_interval"][1]
    kinds = {point["kind"] for point in found["compared"]}
    assert kinds == ({"uniform", "mixed", "flat", "cosine", "static"} if len(manifest.ladder) > 1 else {"uniform"})
    measured = {(p["bytes_per_token"], p["kl"], p["nll"], p["top1_agreement"]) for p in found["compared"]}
    assert {(p["bytes_per_token"], p["kl"], p["nll"], p["top1_agreement"]) for p in found["points"]} <= measured
    assert math.isfinite(found["reference_nll"]) and found["measured_tokens"] > 0
    assert found["storage"]["expert_bytes"] == bundle.expert_bytes()
    assert found["storage"]["dense_bytes"] == (path / "dense.safetensors").stat().st_size
    assert len(found["layers"]) == spec.num_layers
    for layer, entry in zip(policy.layers, found["layers"], strict=True):
        assert entry["layer"] == layer.layer and entry["dense"] == (not spec.is_moe(layer.layer))
        if not entry["dense"]:
            for name in ("frequency", "gate_mass", "pinned", "data_free"):
                assert entry[name] == list(getattr(layer, name))
            assert entry["sensitivity"] == layer.sensitivity and set(entry["sensitivity"]) == {
                str(tier) for tier in manifest.ladder
            }
            assert [len(errors) for errors in entry["expert_error"].values()] == [spec.num_experts] * len(
                manifest.ladder
            )
    made = sum(manifest.files[name].nbytes for name in ("policy.json", "compile.json", "report.html"))
    assert found["storage"]["bundle_bytes"] == sum(entry.nbytes for entry in manifest.files.values()) - made
    assert found["storage"]["original_bytes"] > 0
    assert found["memory"]["floor_bytes"] == describe(bundle, load_kernels())["floor_bytes"]
    assert_examples_fit(found["examples"], [point.name for point in policy.points])
    page = Page((path / "report.html").read_text(encoding="utf-8"))
    shown = {row[0].removesuffix(" (default)") for row in page.rows if row}
    assert {point.name for point in policy.points} <= shown


def assert_examples_fit(examples: dict[str, Any], points: list[str]) -> None:
    """Each example has a guess of every point, and those that differ are of the smallest point."""
    assert list(examples["agreed"]) == points and max(examples["agreed"].values()) <= examples["places"] <= 64
    even = [example for example in examples["shown"] if not example["differs"]]
    odd = examples["shown"][len(even) :]
    assert len(even) == min(8, examples["places"])
    assert len(odd) <= min(4, examples["places"] - examples["agreed"][points[0]])
    assert all(example["differs"] and not example["points"][points[0]]["same"] for example in odd)
    for example in examples["shown"]:
        assert list(example["points"]) == points and example["original"]["same"] and example["follows"]
        for guess in (example["original"], *example["points"].values()):
            assert guess["token"] and 0 <= guess["of_original"] <= guess["probability"] <= 1


def assert_codes_nest(bundle: Bundle) -> None:
    """The codes of every tier of every record are the top bits of its highest tier's."""
    top = bundle.layout.ladder[-1]
    for layer in bundle.spec.moe_layers:
        for expert in range(bundle.spec.num_experts):
            segments = read_record(bundle, ExpertKey(layer, expert))
            for where in bundle.layout.matrices.values():
                codes = unpack_codes(segments, where, top)
                for tier in bundle.layout.ladder:
                    prefix = segments[: bundle.layout.segments_of(tier)]
                    assert np.array_equal(unpack_codes(prefix, where, tier), codes >> (top - tier))
