"""Device profiles: those shipped, and what is wrong with others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from dymoe_compile.job.profile import AUTO, check_dense_bits, load_profile
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.tools.machine.rates import Rates

PROFILES = sorted((Path(__file__).parent.parent.parent / "profiles").glob("*.toml"))
GOOD = {
    "name": '"board"',
    "ladder": "[2, 3, 4]",
    "dense_bits": "8",
    "memory": '"6GiB"',
    "threads": "4",
    "memory_bandwidth": '"9GB/s"',
    "decode_rate": '"2G/s"',
    "prompt_rate": '"5G/s"',
    "layer_us": "60",
    "disk_bandwidth": '"400MB/s"',
    "disk_latency_us": "100.5",
}


def write_profile(folder: Path, values: Mapping[str, str]) -> Path:
    path = folder / "board.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in values.items()), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_shipped_profiles_load_by_name_and_by_path(path: Path) -> None:
    profile = load_profile(path.stem)
    assert profile == load_profile(str(path))
    assert profile.name == path.stem
    assert profile.memory_bytes >= 1 << 30
    assert profile.rates.memory_bytes_per_s > profile.rates.disk_bytes_per_s >= 10**8
    for rates in (profile.rates.prompt_weights_per_s, profile.rates.decode_weights_per_s):
        assert min(rates.values()) > 1e9
    assert 0 < profile.rates.layer_s < profile.rates.disk_latency_s * 10 < 0.01
    assert profile.ladder == tuple(sorted(profile.ladder))


def test_there_are_shipped_profiles() -> None:
    assert len(PROFILES) == 10


def test_a_profile_is_read_value_by_value(tmp_path: Path) -> None:
    profile = load_profile(str(write_profile(tmp_path, GOOD)))
    assert (profile.name, profile.ladder, profile.dense_bits, profile.memory_bytes) == ("board", (2, 3, 4), 8, 6 << 30)
    decode, prompt = (dict.fromkeys((2, 3, 4), rate) for rate in (2e9, 5e9))
    assert profile.rates == Rates(4, 9e9, decode, prompt, 60e-6, 4e8, 100.5e-6)


def test_rates_may_differ_by_the_bits_of_weights(tmp_path: Path) -> None:
    values = {**GOOD, "decode_rate": '{ 2 = "2G/s", 8 = 1000000 }', "prompt_rate": '{ 4 = "5G/s" }', "expert_us": "7.5"}
    rates = load_profile(str(write_profile(tmp_path, values))).rates
    assert (rates.decode_weights_per_s, rates.prompt_weights_per_s) == ({2: 2e9, 8: 1e6}, {4: 5e9})
    assert rates.expert_s == 7.5e-6


def test_a_profile_may_have_no_rates(tmp_path: Path) -> None:
    kept = ("name", "ladder", "dense_bits", "memory", "threads", "disk_bandwidth")
    profile = load_profile(str(write_profile(tmp_path, {key: GOOD[key] for key in kept})))
    assert (profile.name, profile.memory_bytes, profile.rates) == ("board", 6 << 30, None)


@pytest.mark.parametrize("value", ['"400MB"', "400000000", '"400000000"'])
def test_a_bandwidth_may_be_any_size(tmp_path: Path, value: str) -> None:
    path = write_profile(tmp_path, {**GOOD, "disk_bandwidth": value})
    assert load_profile(str(path)).rates.disk_bytes_per_s == 400_000_000


@pytest.mark.parametrize("key", sorted(GOOD))
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = write_profile(tmp_path, {k: v for k, v in GOOD.items() if k != key})
    with pytest.raises(DymoeError) as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)
    assert f"'{key}'" in str(caught.value)


@pytest.mark.parametrize("key", ["extra", "memory_bytes", "disk_bytes_per_s", "Name"])
def test_an_unknown_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(DymoeError, match=f"unknown key '{key}'"):
        load_profile(str(write_profile(tmp_path, {**GOOD, key: "3"})))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ladder", "[]"),
        ("ladder", "[4, 3]"),
        ("ladder", "[1, 2]"),
        ("ladder", "[2, 9]"),
        ("ladder", "4"),
        ("ladder", '["two"]'),
        ("ladder", "[2.5, 3.5]"),
        ("ladder", '"234"'),
        ("dense_bits", "3"),
        ("dense_bits", "32"),
        ("dense_bits", '"8"'),
        ("threads", "0"),
        ("threads", "1.5"),
        ("threads", '"4"'),
        ("memory", '"much"'),
        ("memory", "-1"),
        ("memory", "true"),
        ("memory", '"5GiB/s"'),
        ("disk_bandwidth", '"fast"'),
        ("disk_bandwidth", "0"),
        ("memory_bandwidth", '"0GB/s"'),
        ("decode_rate", "-1"),
        ("decode_rate", "{}"),
        ("decode_rate", '{ two = "2G/s" }'),
        ("decode_rate", '{ 9 = "2G/s" }'),
        ("prompt_rate", '{ 2 = "quick" }'),
        ("prompt_rate", "{ 2 = 0 }"),
        ("expert_us", "-1"),
        ("prompt_layer_us", "nan"),
        ("prompt_rate", '"quick"'),
        ("layer_us", "-1"),
        ("layer_us", '"60"'),
        ("disk_latency_us", "nan"),
        ("disk_latency_us", "inf"),
        ("disk_bandwidth", '"1GB/min"'),
    ],
)
def test_a_bad_value_is_an_error_that_names_the_file(tmp_path: Path, key: str, value: str) -> None:
    path = write_profile(tmp_path, {**GOOD, key: value})
    with pytest.raises(DymoeError) as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("data", [b"name = ", b"[[", b"name = 'a'\nname = 'b'\n", b"\xff\xfe", b"{}"])
def test_a_file_that_is_not_toml_is_an_error_that_names_it(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(data)
    with pytest.raises(DymoeError, match="not valid TOML") as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)


def test_an_unknown_profile_is_answered_with_those_shipped() -> None:
    with pytest.raises(DymoeError) as caught:
        load_profile("laptop-8tb")
    assert "laptop-8tb" in str(caught.value)
    assert all(path.stem in str(caught.value) for path in PROFILES)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DymoeError, match=r"absent\.toml: no such profile"):
        load_profile(str(tmp_path / "absent.toml"))


def test_a_folder_in_place_of_a_profile_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(DymoeError, match=r"folder\.toml"):
        load_profile(str(tmp_path / "folder.toml"))


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8, 16, AUTO])
def test_dense_bits_from_4_to_8_and_16_and_auto_are_accepted(bits: object) -> None:
    check_dense_bits(bits, "--dense-bits")


@pytest.mark.parametrize("bits", [0, 2, 3, 9, 15, 32, -8])
def test_other_dense_bits_are_refused(bits: int) -> None:
    with pytest.raises(DymoeError, match=rf"--dense-bits.*{bits}"):
        check_dense_bits(bits, "--dense-bits")
