# /// script
# requires-python = ">=3.10"
# dependencies = ["cryptography>=42"]
# ///
"""Read a record under a local keyring, without beam_envelope: `python read_record.py KEYS KEYRING [AAD] < envelope`.

KEYS is the folder of the key store. Written from docs/format.md alone, whose sections the docstrings name. What it
prints is authentic.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import sys
import uuid
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

SUITES = {0xF8: ("record-aes-256-gcm", 32, 45), 0xF9: ("record-aes-256-siv", 64, 33)}
MAX_KEY_FILE_BYTES, MAX_WRAPPED_BYTES, MAX_FORMS = 1 << 20, 6144, 10


def expand(key: bytes, info: bytes, size: int) -> bytes:
    """RFC 5869, 2.3."""
    return HKDFExpand(hashes.SHA512(), size, info).derive(key)


def framed(*parts: bytes) -> bytes:
    """Put a 4-byte length before each part."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def encode_context(context: dict[str, str]) -> bytes:
    """Section 1.4: a count, then the pairs, sorted by the bytes of their keys."""
    pairs = sorted((key.encode(), value.encode()) for key, value in context.items())
    return len(pairs).to_bytes(4, "big") + b"".join(framed(*pair) for pair in pairs)


def parse_key_file(raw: bytes) -> dict[str, Any]:
    """Sections 1.3 and 3.2: rebuild the one encoding from the fields that are known, and compare."""
    found = json.loads(raw) if len(raw) <= MAX_KEY_FILE_BYTES else {}
    (data_key,) = found["data_keys"]
    forms = [
        {
            "provider": str(form["provider"]),
            "kms_key": str(form["kms_key"]),
            "wrapped_key": base64.b64encode(base64.b64decode(form["wrapped_key"])).decode(),
        }
        for form in data_key["wrapped_keys"]
    ]
    document = {
        "format": "beam-envelope key file",
        "version": 1,
        "shard_id": str(uuid.UUID(found["shard_id"])),
        "cipher": str(found["cipher"]),
        "content": {name: str(found["content"][name]) for name in ("compression", "created", "name")},
        "derivation": {name: bytes.fromhex(found["derivation"][name]).hex() for name in ("salt", "commitment")},
        "context": {key: str(found["context"][key]) for key in sorted(found["context"])},
        "data_keys": [{"key_id": bytes.fromhex(data_key["key_id"]).hex(), "wrapped_keys": forms}],
    }
    if json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n" != raw:
        raise ValueError("the key file was changed, or is of another version")
    too_long = any(len(form["wrapped_key"]) > MAX_WRAPPED_BYTES // 3 * 4 for form in forms)
    if len(forms) > MAX_FORMS or too_long or len(found["derivation"]["salt"]) != 2 * 24:
        raise ValueError("a limit is passed, or the salt is not one")
    return document


def unwrap(key_file: dict[str, Any], keyring: dict[str, Any]) -> bytes:
    """Sections 4.1, 5 and the key id: open any wrapped form under a key that the caller has."""
    keys = {f"{key['name']}/{key['id']}": base64.b64decode(key["key"]) for key in keyring["keys"]}
    (data_key,) = key_file["data_keys"]
    for form in data_key["wrapped_keys"]:
        if form["provider"] == "local-kms" and form["kms_key"] in keys:
            wrapped = base64.b64decode(form["wrapped_key"])
            aad = framed(form["kms_key"].encode()) + encode_context(key_file["context"])
            with contextlib.suppress(InvalidTag):
                material = AESGCM(keys[form["kms_key"]]).decrypt(wrapped[:12], wrapped[12:], aad)
                if expand(material, b"beam-envelope/key-id@v1\0", 16).hex() == data_key["key_id"]:
                    return material
    raise ValueError("no key of the keyring opens it, or the key file was changed")


def derive(material: bytes, key_file: dict[str, Any], key_bytes: int, key_id: bytes) -> bytes:
    """Sections 2.2 and 3.3: derive the key, and check the commitment and the key id."""
    content, derivation = key_file["content"], key_file["derivation"]
    binding = b"beam-envelope/shard@v1\0" + framed(
        uuid.UUID(key_file["shard_id"]).bytes,
        key_file["cipher"].encode(),
        content["compression"].encode(),
        content["created"].encode(),
        content["name"].encode(),
    )
    info = b"beam-envelope/record@v1\0" + bytes.fromhex(derivation["salt"]) + binding
    derived = expand(material, info + encode_context(key_file["context"]), key_bytes + 12 + 32)
    commitment = derived[key_bytes + 12 :]
    if not hmac.compare_digest(commitment, bytes.fromhex(derivation["commitment"])) or commitment[:16] != key_id:
        raise ValueError("the key file was changed, or is that of another key")
    return derived[:key_bytes]


def decrypt(envelope: bytes, keys: Path, keyring: dict[str, Any], aad: bytes = b"") -> bytes:
    """Sections 3.4, 3.5 and 3.7: find the key that the envelope names, and open it at its place."""
    cipher, key_bytes, min_bytes = SUITES[envelope[0]]
    if len(envelope) < min_bytes:
        raise ValueError("the envelope was cut short")
    prefix = envelope[:17]
    key_file = parse_key_file((keys / f"_KEY_FOR_{prefix[1:].hex()}.json").read_bytes())
    if key_file["cipher"] != cipher:
        raise ValueError("the envelope or its key file was changed")
    key = derive(unwrap(key_file, keyring), key_file, key_bytes, prefix[1:])
    associated = prefix + b"\0" + aad
    if cipher == "record-aes-256-siv":
        return AESSIV(key).decrypt(envelope[17:], [associated])
    return AESGCM(key).decrypt(envelope[17:29], envelope[29:], associated)


def main(keys: str, keyring: str, aad: str = "") -> None:
    """Print the record of the envelope on standard input."""
    envelope = sys.stdin.buffer.read()
    sys.stdout.buffer.write(decrypt(envelope, Path(keys), json.loads(Path(keyring).read_bytes()), aad.encode()))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:  # noqa: BLE001
        sys.exit(f"{' '.join(sys.argv[1:])}: {type(error).__name__}: {error}")
