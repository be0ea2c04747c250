"""policy.json: what is read is what was written, what is malformed is named, and points are found."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from dymoe_runtime.bundle.policy import SAME_BITS, VERSION, LayerPolicy, OperatingPoint, Policy
from dymoe_runtime.errors import DymoeError

LADDER = (2, 3, 4)
ABOVE_ALL = 2.0  # a threshold that every share is below


def point(name: str, bits: float, kl: float, bytes_per_token: float = 0.0) -> OperatingPoint:
    thresholds = ((0.25, 0.5, ABOVE_ALL), (0.5, 0.75, ABOVE_ALL))
    return OperatingPoint(
        name=name,
        kind="mixed",
        decode=thresholds,
        prefill=thresholds[::-1],
        bits_mean=bits,
        effective_bits=bits + 0.4,
        bytes_per_token=bytes_per_token,
        kl=kl,
        nll=3.0,
        top1_agreement=0.9,
        prefill_kl=1.5 * kl,
    )


def make_policy(*points: OperatingPoint) -> Policy:
    layers = (
        LayerPolicy(
            layer=0,
            sensitivity={"2": 0.04, "3": 0.01, "4": 0.0},
            frequency=(0.5, 0.25),
            gate_mass=(0.75, 0.25),
            expert_error={"2": (0.9, 0.2), "3": (0.4, 0.1), "4": (0.05, 0.02)},
            router_overlap={"2": 0.9, "3": 0.97, "4": 1.0},
            pinned=(0,),
            data_free=(1,),
            look_ahead_by="linear",
            look_ahead_recall=(0.9, 0.6),
        ),
        LayerPolicy(1, {}, (), (), {}, {}, (), (), "none", ()),
    )
    points = points or (point("2", 2.0, 0.1, 100.0), point("mixed-3.0", 3.0, 0.02, 150.0))
    return Policy(LADDER, layers, points, points[-1].name, ("importance is flat in layer 1",))


def as_read(policy: Policy) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(policy.to_json()))
    return data


def test_a_policy_comes_back_from_json_as_it_was() -> None:
    policy = make_policy()
    assert Policy.from_json(as_read(policy)) == policy


def test_notes_may_be_absent() -> None:
    data = as_read(make_policy())
    del data["notes"]
    assert Policy.from_json(data).notes == ()


@pytest.mark.parametrize("place", ["", "layers", "points"])
def test_an_unknown_key_is_named(place: str) -> None:
    data = as_read(make_policy())
    (data[place][1] if place else data)["zzz_extra"] = 1
    with pytest.raises(DymoeError, match=r"policy\.json.*zzz_extra"):
        Policy.from_json(data)


@pytest.mark.parametrize(
    ("place", "key"),
    [
        ("", "ladder"),
        ("", "layers"),
        ("", "points"),
        ("", "default_point"),
        ("layers", "sensitivity"),
        ("layers", "look_ahead_by"),
        ("layers", "look_ahead_recall"),
        ("layers", "expert_error"),
        ("layers", "router_overlap"),
        ("layers", "pinned"),
        ("layers", "data_free"),
        ("points", "decode"),
        ("points", "prefill_kl"),
        ("points", "kl"),
    ],
)
def test_a_missing_key_is_named(place: str, key: str) -> None:
    data = as_read(make_policy())
    del (data[place][1] if place else data)[key]
    with pytest.raises(DymoeError, match=rf"policy\.json.*{key}"):
        Policy.from_json(data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ladder", None),
        ("ladder", 3),
        ("layers", None),
        ("layers", [3]),
        ("points", 3),
        ("notes", 3),
        ("default_point", "of no point"),
    ],
)
def test_a_value_of_the_wrong_kind_is_an_error_and_no_traceback(key: str, value: Any) -> None:
    with pytest.raises(DymoeError, match=r"policy\.json"):
        Policy.from_json({**as_read(make_policy()), key: value})


@pytest.mark.parametrize("version", [VERSION + 1, 0, None, "1"])
def test_another_version_is_named(version: Any) -> None:
    with pytest.raises(DymoeError, match=rf"policy\.json: version {version}.*reads {VERSION}"):
        Policy.from_json({**as_read(make_policy()), "version": version})


def test_a_missing_version_is_an_error() -> None:
    data = as_read(make_policy())
    del data["version"]
    with pytest.raises(DymoeError, match="version"):
        Policy.from_json(data)


def test_a_point_is_found_by_name() -> None:
    policy = make_policy(point("a", 2.0, 0.1), point("b", 3.0, 0.2))
    assert policy.point("b") is policy.points[1]


@pytest.mark.parametrize(("bits", "name"), [(0.0, "2"), (2.4, "2"), (2.6, "3"), (3.4, "3"), (3.6, "4"), (9.0, "4")])
def test_the_nearest_point_is_that_of_the_nearest_bits(bits: float, name: str) -> None:
    assert make_policy(*(point(str(b), b, 0.1 / b) for b in (2, 3, 4))).nearest(bits).name == name


def test_of_points_about_as_near_the_best_is_taken() -> None:
    uniform, mixed = point("3", 3.0, 0.02), point("mixed", 3.0 + SAME_BITS * 0.9, 0.01)
    assert make_policy(uniform, mixed).nearest(3.0).name == "mixed"
    assert make_policy(uniform, replace(mixed, kl=0.03)).nearest(3.0).name == "3"
    assert make_policy(uniform, replace(mixed, bits_mean=3.0 + 1.1 * SAME_BITS)).nearest(3.0).name == "3"


def test_the_best_point_within_the_bytes_is_that_of_least_kl() -> None:
    policy = make_policy(point("a", 2.0, 0.1, 100.0), point("b", 2.5, 0.01, 200.0), point("c", 3.0, 0.05, 150.0))
    expected = {100.0: "a", 149.9: "a", 150.0: "c", 199.0: "c", 200.0: "b", 1e9: "b"}
    assert {nbytes: policy.best_within(nbytes).name for nbytes in expected} == expected


def test_where_no_point_fits_the_smallest_is_taken() -> None:
    policy = make_policy(point("b", 2.5, 0.01, 200.0), point("a", 2.0, 0.1, 100.0))
    assert policy.best_within(99.9).name == "a"


def test_the_smallest_point_of_a_quality_is_that_of_fewest_bytes() -> None:
    policy = make_policy(point("a", 2.0, 0.1, 100.0), point("b", 2.5, 0.01, 200.0), point("c", 3.0, 0.05, 150.0))
    expected = {0.01: "b", 0.049: "b", 0.05: "c", 0.1: "a", 5.0: "a"}
    assert {kl: policy.smallest_within(kl).name for kl in expected} == expected


def test_a_quality_that_no_point_has_is_an_error_that_names_the_best_point() -> None:
    with pytest.raises(DymoeError, match=r"--quality 0\.001.*best point, mixed-3\.0.*0\.02000"):
        make_policy().smallest_within(0.001)


def test_the_quality_that_an_error_names_is_accepted() -> None:
    policy = make_policy(point("a", 2.0, 0.0123449, 100.0))
    with pytest.raises(DymoeError) as refused:
        policy.smallest_within(0.001)
    named = re.search(r"KL of ([0-9.]+)", str(refused.value))
    assert named is not None and policy.smallest_within(float(named[1])).name == "a"
