"""A signed bundle with any byte changed, the key changed or a file added is refused."""

from __future__ import annotations

import base64
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
)
from helpers import Outcome, assert_one_sentence, bundle_cli


def save_keys(private: object, key: Path, public: Path, password: bytes = b"") -> None:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    public.write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private and its public key."""
    save_keys(Ed25519PrivateKey.generate(), tmp_path / "key.pem", tmp_path / "key.pub")
    return tmp_path / "key.pem", tmp_path / "key.pub"


@pytest.fixture
def signed(tiny_path: Path, tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    """A copy of the tiny bundle with its signature beside it."""
    shutil.copytree(tiny_path, tmp_path / "my.dymoe")
    assert bundle_cli("sign", tmp_path / "my.dymoe", "--key", keys[0]).code == 0
    return tmp_path / "my.dymoe"


@pytest.fixture
def signed_pack(packed_path: Path, tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    """A copy of the packed bundle with its signature beside it."""
    shutil.copy(packed_path, tmp_path / "packed.dymoe")
    assert bundle_cli("sign", tmp_path / "packed.dymoe", "--key", keys[0]).code == 0
    return tmp_path / "packed.dymoe"


def verified(bundle: Path, keys: tuple[Path, Path], *args: object) -> Outcome:
    return bundle_cli("verify", bundle, "--key", keys[1], *args)


def test_a_signed_bundle_is_verified(signed: Path, keys: tuple[Path, Path]) -> None:
    outcome = verified(signed, keys)
    assert outcome.code == 0 and "signed with" in outcome.out
    assert sorted(path.name for path in signed.parent.iterdir()) == ["key.pem", "key.pub", "my.dymoe", "my.dymoe.sig"]


def test_a_signature_is_that_of_the_envelope_that_dsse_describes(signed: Path, keys: tuple[Path, Path]) -> None:
    envelope = json.loads(signed.with_name("my.dymoe.sig").read_text())
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
    said = b" ".join((b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload))
    load_pem_public_key(keys[1].read_bytes()).verify(base64.b64decode(envelope["signatures"][0]["sig"]), said)
    assert json.loads(payload) == json.loads(bundle_cli("attest", signed).out)


def test_signing_again_gives_the_same(signed: Path, keys: tuple[Path, Path]) -> None:
    before = signed.with_name("my.dymoe.sig").read_bytes()
    assert bundle_cli("sign", signed, "--key", keys[0]).code == 0
    assert signed.with_name("my.dymoe.sig").read_bytes() == before


def flip(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_any_changed_byte_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    rng = random.Random(5)
    for path in [path for path in sorted(signed.iterdir()) for _ in range(3)]:
        offset, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, offset, bit)
        assert_one_sentence(verified(signed, keys), str(signed))
        flip(path, offset, bit)
    assert verified(signed, keys).code == 0


def test_any_changed_byte_of_a_packed_bundle_is_refused(signed_pack: Path, keys: tuple[Path, Path]) -> None:
    rng, size = random.Random(6), signed_pack.stat().st_size
    assert verified(signed_pack, keys).code == 0
    for offset in (20, 100, 2000, size - 1, size - 30, *(rng.randrange(size) for _ in range(25))):
        bit = rng.randrange(8)
        flip(signed_pack, offset, bit)
        assert_one_sentence(verified(signed_pack, keys), "packed")
        flip(signed_pack, offset, bit)
    assert verified(signed_pack, keys).code == 0


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def with_a_member(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("chat_template.jinja", b"evil")


@pytest.mark.parametrize("harm", [longer, with_a_member])
def test_what_is_added_to_a_packed_bundle_is_refused(
    signed_pack: Path, keys: tuple[Path, Path], harm: Callable[[Path], None]
) -> None:
    harm(signed_pack)
    assert_one_sentence(verified(signed_pack, keys), "packed")


@pytest.mark.parametrize("name", ["chat_template.jinja", ".hidden", "folder/file"])
def test_an_added_file_is_refused(signed: Path, keys: tuple[Path, Path], name: str) -> None:
    (signed / name).parent.mkdir(exist_ok=True)
    (signed / name).write_text("x")
    assert_one_sentence(verified(signed, keys), name.split("/")[0])
    assert_one_sentence(bundle_cli("sign", signed, "--key", keys[0]), name.split("/")[0])


def test_a_missing_file_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "report.html").unlink()
    assert_one_sentence(verified(signed, keys), "report.html")


def test_another_key_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    save_keys(Ed25519PrivateKey.generate(), signed.with_name("other.pem"), keys[1])
    assert_one_sentence(verified(signed, keys), "not signed with the key")


def test_the_signature_of_another_bundle_is_refused(
    signed: Path, keys: tuple[Path, Path], packed_path: Path, tmp_path: Path
) -> None:
    slim = tmp_path / "slim.dymoe"
    assert bundle_cli("slim", signed, "--tiers", "2", "-o", slim).code == 0
    signature = signed.with_name("my.dymoe.sig")
    assert_one_sentence(verified(slim, keys, "--signature", signature), "manifest.json", "not the one")
    assert_one_sentence(verified(packed_path, keys, "--signature", signature), "does not cover packed bundle")


def test_what_a_signed_pack_unpacks_to_is_signed(signed_pack: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    assert bundle_cli("unpack", signed_pack, "-o", tmp_path / "again.dymoe").code == 0
    outcome = verified(tmp_path / "again.dymoe", keys, "--signature", tmp_path / "packed.dymoe.sig")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("key", ["payload", "payloadType", "signatures"])
def test_a_changed_envelope_is_refused(signed: Path, keys: tuple[Path, Path], key: str) -> None:
    signature = signed.with_name("my.dymoe.sig")
    envelope = json.loads(signature.read_text())
    other = {"payload": base64.b64encode(b"{}").decode(), "payloadType": "text/plain", "signatures": []}[key]
    signature.write_text(json.dumps({**envelope, key: other}))
    assert_one_sentence(verified(signed, keys), "not signed with the key")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"payload": "!", "payloadType": "x", "signatures": [1]}'])
def test_what_is_no_signature_gets_one_sentence(signed: Path, keys: tuple[Path, Path], text: str) -> None:
    signed.with_name("my.dymoe.sig").write_text(text)
    assert_one_sentence(verified(signed, keys), "my.dymoe.sig", "dymoe-bundle sign")


def test_a_missing_signature_gets_one_sentence(signed: Path, keys: tuple[Path, Path]) -> None:
    signed.with_name("my.dymoe.sig").unlink()
    assert_one_sentence(verified(signed, keys), "my.dymoe.sig", "--signature")
    assert_one_sentence(bundle_cli("verify", signed, "--signature", "x"), "--key")


def test_keys_of_other_kinds_get_one_sentence(signed: Path, keys: tuple[Path, Path]) -> None:
    for swapped in (("verify", signed, "--key", keys[0]), ("sign", signed, "--key", keys[1])):
        assert_one_sentence(bundle_cli(*swapped), "not a p", "PEM", "openssl")
    save_keys(generate_private_key(SECP256R1()), *keys)
    assert_one_sentence(bundle_cli("sign", signed, "--key", keys[0]), "Ed25519", "openssl genpkey")
    assert_one_sentence(verified(signed, keys), "Ed25519")


def test_an_encrypted_key_takes_its_password_from_the_environment(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_keys(Ed25519PrivateKey.generate(), *keys, b"secret")
    assert_one_sentence(bundle_cli("sign", signed, "--key", keys[0]), "encrypted", "DYMOE_KEY_PASSWORD")
    monkeypatch.setenv("DYMOE_KEY_PASSWORD", "wrong")
    assert_one_sentence(bundle_cli("sign", signed, "--key", keys[0]), "another password")
    monkeypatch.setenv("DYMOE_KEY_PASSWORD", "secret")
    assert bundle_cli("sign", signed, "--key", keys[0]).code == 0
    assert verified(signed, keys).code == 0


def test_signing_replaces_no_file_of_others(signed: Path, keys: tuple[Path, Path]) -> None:
    target = signed.with_name("notes")
    target.write_text("mine")
    assert_one_sentence(bundle_cli("sign", signed, "--key", keys[0], "-o", target), "notes", "no signature")
    assert target.read_text() == "mine"


def test_a_damaged_bundle_is_not_signed(damaged: Path, keys: tuple[Path, Path]) -> None:
    flip(damaged / "experts-00000.safetensors", 9000, 0)
    assert_one_sentence(bundle_cli("sign", damaged, "--key", keys[0]), "does not match")
    assert not damaged.with_name(f"{damaged.name}.sig").exists()
