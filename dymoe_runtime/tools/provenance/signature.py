"""Ed25519 signatures of bundles: a DSSE envelope around the in-toto statement, in a file beside the bundle.

https://github.com/secure-systems-lab/dsse says what is signed. The statement has the digest of the manifest's file,
which has those of all other files; that of a packed bundle has the digest of the whole file, too.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.errors import DymoeError, needing_extra
from dymoe_runtime.files import parse_json, read_regular
from dymoe_runtime.tools.provenance.statement import STATEMENT, check_whole, subjects

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
# The most bytes of a key's file, and of an envelope: several times those of the largest bundle.
MAX_KEY_BYTES, MAX_ENVELOPE_BYTES = 1 << 16, 16 << 20
PASSWORD = "DYMOE_KEY_PASSWORD"
MAKE_KEY = "make a key with: openssl genpkey -algorithm ed25519 -out key.pem"
PUBLIC_PART = "openssl pkey -in key.pem -pubout prints the public key"


def signature_of(bundle: Path) -> Path:
    """Return where the signature of a bundle is by default: beside it."""
    return bundle.parent / f"{bundle.resolve().name if bundle.name in ('', '..') else bundle.name}.sig"


def sign(statement: Mapping[str, Any], key: Path) -> bytes:
    """Return the envelope of a statement, signed with the private key in the PEM file `key`.

    The environment variable DYMOE_KEY_PASSWORD has the password of an encrypted one. Raises DymoeError if it is no
    Ed25519 key.
    """
    private = _private_key(key)
    payload = json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()
    signature = private.sign(_authenticated(PAYLOAD_TYPE, payload))
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": _key_id(private.public_key()), "sig": base64.b64encode(signature).decode()}],
    }
    return (json.dumps(envelope, indent=1) + "\n").encode()


def verify_signature(bundle: Bundle, signature: Path, key: Path) -> dict[str, Any]:
    """Return the statement that was signed about a bundle with the other half of the public key in `key`.

    This reads all of the bundle. Raises DymoeError if the signature is not of that key, or the bundle is not, byte for
    byte and file for file, the one that was signed.
    """
    remedy = "give the signature that dymoe-bundle sign wrote, with --signature"
    envelope = parse_json(read_regular(signature, remedy, MAX_ENVELOPE_BYTES), str(signature), remedy)
    payload = _signed_payload(envelope, _public_key(key), signature, key)
    statement = parse_json(payload, str(signature), remedy)
    _check_subjects(bundle, statement, signature)
    check_whole(bundle)
    return statement


def is_envelope(path: Path) -> bool:
    """Return whether a file is an envelope, such as `sign` makes."""
    try:
        return "payloadType" in parse_json(read_regular(path, "", MAX_ENVELOPE_BYTES, follow_links=False), "", "")
    except DymoeError:
        return False


def _authenticated(kind: str, payload: bytes) -> bytes:
    """Return the bytes that DSSE signs: its pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)


def _signed_payload(envelope: Mapping[str, Any], public: Ed25519PublicKey, signature: Path, key: Path) -> bytes:
    from cryptography.exceptions import InvalidSignature

    try:
        kind, payload = str(envelope["payloadType"]), base64.b64decode(envelope["payload"], validate=True)
        signed = [base64.b64decode(each["sig"], validate=True) for each in envelope["signatures"]]
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise DymoeError(f"{signature}: not a signature; give one that dymoe-bundle sign wrote") from error
    for each in signed if kind == PAYLOAD_TYPE else ():
        try:
            public.verify(each, _authenticated(kind, payload))
            return payload
        except InvalidSignature:
            continue
    raise DymoeError(f"{signature}: not signed with the key {key}; do not use the bundle, or give the right --key")


def _check_subjects(bundle: Bundle, statement: Mapping[str, Any], signature: Path) -> None:
    """Raise DymoeError unless a signed statement is about this bundle, and about all of its files."""
    try:
        signed = {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}
        known = statement["_type"] == STATEMENT
    except (KeyError, TypeError) as error:
        raise DymoeError(f"{signature}: not a statement about a bundle; sign the bundle again") from error
    found = {each["name"]: each["digest"]["sha256"] for each in subjects(bundle)}
    missing = sorted(set(found) - set(signed))
    if not known or missing:
        what = missing[0] if missing else "the statement"
        raise DymoeError(f"{signature}: does not cover {what}; sign {bundle.path} itself, as it is shipped")
    for name, digest in found.items():
        if signed[name] != digest:
            raise DymoeError(f"{bundle.path}: {name} is not the one that was signed; get the bundle again")


def _key_id(public: Ed25519PublicKey) -> str:
    """Return the SHA-256 of the public key, a hint for those who have many."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _private_key(path: Path) -> Ed25519PrivateKey:
    with needing_extra("sign", "signing"):
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    data, password = read_regular(path, MAKE_KEY, MAX_KEY_BYTES), os.environ.get(PASSWORD)
    try:
        key = load_pem_private_key(data, password.encode() if password and b"ENCRYPTED" in data else None)
    except TypeError as error:
        raise DymoeError(f"{path}: the key is encrypted; put its password into {PASSWORD}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DymoeError(f"{path}: not a private key in PEM, or another password; {MAKE_KEY}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise DymoeError(f"{path}: a key of another kind than Ed25519; {MAKE_KEY}")
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    with needing_extra("sign", "verifying a signature"):
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    try:
        key = load_pem_public_key(read_regular(path, PUBLIC_PART, MAX_KEY_BYTES))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DymoeError(f"{path}: not a public key in PEM; {PUBLIC_PART}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise DymoeError(f"{path}: a key of another kind than Ed25519; {MAKE_KEY}")
    return key
