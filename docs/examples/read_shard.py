# /// script
# requires-python = ">=3.10"
# dependencies = ["cryptography>=42", "backports.zstd; python_version < '3.14'"]
# ///
"""Read a shard under a local keyring, without beam_envelope: `python read_shard.py SHARD KEYRING > plain`.

Written from docs/format.md alone, whose sections the docstrings name. What it prints is authentic as far as
it goes, and whole only if the exit code is 0.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import sys
import uuid
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

SEALED_CHUNK_BYTES, TAG_BYTES = 16_400, 16
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
    """Section 1: rebuild the one encoding from the fields that are known, and compare."""
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
        "cipher": "cobblestone-256",
        "content": {name: str(found["content"][name]) for name in ("compression", "created", "name")},
        "context": {key: str(found["context"][key]) for key in sorted(found["context"])},
        "data_keys": [{"key_id": bytes.fromhex(data_key["key_id"]).hex(), "wrapped_keys": forms}],
    }
    if json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n" != raw:
        raise ValueError("the key file was changed, or is of another version")
    too_long = any(len(form["wrapped_key"]) > MAX_WRAPPED_BYTES // 3 * 4 for form in forms)
    if found["content"]["compression"] not in {"none", "zstd"} or len(forms) > MAX_FORMS or too_long:
        raise ValueError("the compression is unknown, or a limit is passed")
    return document


def unwrap(key_file: dict[str, Any], keyring: dict[str, Any]) -> bytes:
    """Sections 3, 4.1 and 5: open any wrapped form under a key that the caller has, and check the key id."""
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


def decrypt(shard: BinaryIO, material: bytes, key_file: dict[str, Any]) -> Iterator[bytes]:
    """Sections 2.1 to 2.3: check the commitment, then yield each chunk once it is authenticated."""
    content = key_file["content"]
    binding = b"beam-envelope/shard@v1\0" + framed(
        uuid.UUID(key_file["shard_id"]).bytes,
        key_file["cipher"].encode(),
        content["compression"].encode(),
        content["created"].encode(),
        content["name"].encode(),
    )
    salt, commitment = shard.read(24), shard.read(32)
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + binding
    derived = expand(material, info + encode_context(key_file["context"]), 32 + 12 + 32)
    if not hmac.compare_digest(derived[44:], commitment):
        raise ValueError("the shard and its key file do not belong together, or the shard was cut short")
    aead, base_nonce = AESGCM(derived[:32]), int.from_bytes(derived[32:44], "big")
    number, sealed = 0, bytes(SEALED_CHUNK_BYTES)
    while len(sealed) == SEALED_CHUNK_BYTES:  # the last chunk is the one that is shorter
        sealed = shard.read(SEALED_CHUNK_BYTES)
        if len(sealed) < TAG_BYTES:
            raise ValueError("the shard was cut short")
        yield aead.decrypt((base_nonce ^ number).to_bytes(12, "big"), sealed, None)
        number += 1


def decompress(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Section 2.4: one Zstandard frame."""
    zstd = import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    frame = zstd.ZstdDecompressor()
    for piece in filter(None, pieces):
        yield frame.decompress(piece)  # raises EOFError after the end of the frame
    if not frame.eof or frame.unused_data:
        raise ValueError("the plaintext is not one Zstandard frame")


def main(shard: str, keyring: str) -> None:
    """Print the plaintext of a shard whose key file lies beside it."""
    path = Path(shard)
    key_file = parse_key_file(path.with_name(f"_KEY_FOR_{path.name}.json").read_bytes())
    material = unwrap(key_file, json.loads(Path(keyring).read_bytes()))
    with path.open("rb") as stream:
        pieces = decrypt(stream, material, key_file)
        for piece in decompress(pieces) if key_file["content"]["compression"] == "zstd" else pieces:
            sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:  # noqa: BLE001  # whatever went wrong, the output is not whole
        sys.exit(f"{' '.join(sys.argv[1:])}: {type(error).__name__}: {error}")
