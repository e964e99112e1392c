"""The key file: a small JSON document, beside each shard or in a key store, that holds wrapped data keys.

Bytes: docs/format.md, 1.

It knows no folder or store: callers read and write the bytes.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Final, NoReturn

from beam_envelope.errors import FormatError
from beam_envelope.keys.context import encode_context
from beam_envelope.keys.provider import KEY_ID_BYTES, DataKey, WrappedKey

FORMAT: Final = "beam-envelope key file"
VERSION: Final = 1
SHARD_CIPHER: Final = "cobblestone-256"
PARQUET_CIPHER: Final = "parquet-aes-gcm-v1"
RECORD_CIPHER: Final = "record-aes-256-gcm"
DETERMINISTIC_CIPHER: Final = "record-aes-256-siv"
RAW_CELL_CIPHER: Final = "cell-aes-256-gcm"
FERNET_CIPHER: Final = "fernet"
DERIVED_CIPHERS: Final = (RECORD_CIPHER, DETERMINISTIC_CIPHER, RAW_CELL_CIPHER, FERNET_CIPHER)
"""The ciphers whose key is derived from the data key with what `Derivation` holds."""
CIPHERS: Final = (SHARD_CIPHER, PARQUET_CIPHER, *DERIVED_CIPHERS)
COMPRESSIONS: Final = ("none", "zstd")

MAX_KEY_FILE_BYTES: Final = 1 << 20
MAX_DATA_KEYS: Final = 1024
MAX_WRAPPED_KEYS: Final = 10
SALT_BYTES: Final = 24
COMMITMENT_BYTES: Final = 32
MAX_WRAPPED_BYTES: Final = 6144  # the largest ciphertext of AWS KMS ("Decrypt", AWS KMS API Reference)

KEY_FILE_PREFIX: Final = "_KEY_FOR_"
KEY_FILE_SUFFIX: Final = ".json"
TEMPORARY_PREFIX: Final = "_TMP_"
MANIFEST_NAME: Final = "_MANIFEST.json"
_UNFINISHED_FOLDER: Final = re.compile(rf"(?:^|/){TEMPORARY_PREFIX}[0-9a-f]{{32}}/")

_BINDING_LABEL: Final = b"beam-envelope/shard@v1\x00"


def key_file_name(shard_name: str) -> str:
    """Return the name of the key file of a shard: the leading underscore hides it from Spark, Hive, Arrow and globs."""
    return f"{KEY_FILE_PREFIX}{shard_name}{KEY_FILE_SUFFIX}"


def is_key_file(name: str) -> bool:
    """Whether a file's name is that of a key file."""
    return name.startswith(KEY_FILE_PREFIX) and name.endswith(KEY_FILE_SUFFIX)


def is_internal(name: str) -> bool:
    """Whether a file's name is one of ours that holds no data: a key file, a manifest or an unfinished file."""
    return is_key_file(name) or name == MANIFEST_NAME or name.startswith(TEMPORARY_PREFIX)


def is_unfinished(path: str) -> bool:
    """Whether a file is unfinished, or whatever it is, in a folder that a job makes for unfinished files."""
    return path.rpartition("/")[2].startswith(TEMPORARY_PREFIX) or _UNFINISHED_FOLDER.search(path) is not None


@dataclass(frozen=True)
class WrappedDataKey:
    """A data key as a key file holds it: its id, and its wrapped forms, of which any one opens it."""

    key_id: bytes
    wrapped_keys: tuple[WrappedKey, ...]

    @classmethod
    def of(cls, data_key: DataKey) -> WrappedDataKey:
        """Return what of a data key may be stored."""
        return cls(data_key.key_id, data_key.wrapped_keys)


@dataclass(frozen=True)
class Derivation:
    """What leads from a data key to the key that encrypts records, and proves that it is the one.

    Attributes:
        salt: 24 random bytes.
        commitment: 32 bytes that come out of the same derivation; their first 16 are the key id in each record.
    """

    salt: bytes
    commitment: bytes


@dataclass(frozen=True)
class KeyFile:
    """What a key file says.

    Attributes:
        data_keys: the data keys: one, or for Parquet one for each KMS key.
        context: the encryption context that KMS bound to the wrapped keys.
        shard_id: a random UUID.
        cipher: how the data is encrypted.
        compression: `none` or `zstd`, done before encryption.
        name: the original file's name.
        created: when, in UTC, to the second.
        derivation: for the ciphers of `DERIVED_CIPHERS`, and for no others.
    """

    data_keys: tuple[WrappedDataKey, ...]
    context: Mapping[str, str]
    shard_id: uuid.UUID = field(default_factory=uuid.uuid4)
    cipher: str = SHARD_CIPHER
    compression: str = "none"
    name: str = ""
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))
    derivation: Derivation | None = None

    @property
    def contexts(self) -> tuple[Mapping[str, str], ...]:
        """The encryption context of each data key: one and the same."""
        return (self.context,) * len(self.data_keys)

    def to_bytes(self) -> bytes:
        """Return the one encoding: JSON, two spaces of indentation, fields in this order, a newline at the end."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "shard_id": str(self.shard_id),
            "cipher": self.cipher,
            "content": {"compression": self.compression, "created": self.created, "name": self.name},
            **({} if self.derivation is None else {"derivation": _hex(self.derivation)}),
            "context": dict(sorted(self.context.items())),
            "data_keys": [write_data_key(data_key) for data_key in self.data_keys],
        }
        return _encode(document).encode() + b"\n"

    @classmethod
    def from_bytes(cls, raw: bytes, what: str) -> KeyFile:
        """Parse a key file; `what` names it in messages.

        The bytes must be exactly those that `to_bytes` would write, so that a change of any byte is seen.

        Raises:
            FormatError: not a key file, of an unknown version, or not in the one encoding.
        """
        if len(raw) > MAX_KEY_FILE_BYTES:
            _refuse(what, f"it is larger than {MAX_KEY_FILE_BYTES} bytes")
        try:
            document = json.loads(raw)
        except (ValueError, RecursionError):
            _refuse(what, "it is not JSON, or was cut short")
        try:
            if document["format"] != FORMAT:
                _refuse(what, f"its format is not {FORMAT!r}")
            if document["version"] != VERSION:
                _refuse(what, "it is of a version that this release does not know; use a newer one")
            parsed = cls(
                data_keys=tuple(parse_data_key(entry, what) for entry in document["data_keys"]),
                context=_strings(document["context"]),
                shard_id=uuid.UUID(document["shard_id"]),
                cipher=_string(document["cipher"]),
                compression=_string(document["content"]["compression"]),
                name=_string(document["content"]["name"]),
                created=_string(document["content"]["created"]),
                derivation=_derivation(document["derivation"]) if "derivation" in document else None,
            )
            same = parsed.to_bytes() == raw
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            _refuse(what, "a field is missing or of the wrong type")
        _check_cipher(parsed, what)
        if not same:
            _refuse(what, "it is not in the form that docs/format.md gives, so it was changed after it was written")
        return parsed

    def binding(self) -> bytes:
        """Return the bytes that bind this key file to its data, such as the context of the Cobblestone message.

        All that must not change is in it, each part behind its length; the wrapped forms are not, so that keys can be
        rotated. docs/format.md, 2.2.
        """
        parts = (
            self.shard_id.bytes,
            self.cipher.encode(),
            self.compression.encode(),
            self.created.encode(),
            self.name.encode(),
        )
        framed = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return _BINDING_LABEL + framed + encode_context(self.context)

    def with_wrapped_keys(self, data_keys: Sequence[WrappedDataKey]) -> KeyFile:
        """Return this key file with other wrapped forms of the same data keys."""
        return replace(self, data_keys=tuple(data_keys))


def _check_cipher(parsed: KeyFile, what: str) -> None:
    if parsed.cipher not in CIPHERS or parsed.compression not in COMPRESSIONS:
        _refuse(what, "its cipher or compression is unknown; use a newer release")
    derived = parsed.cipher in DERIVED_CIPHERS
    if (parsed.derivation is not None) != derived:
        _refuse(what, f"it {'lacks' if derived else 'has'} a derivation, contrary to its cipher, {parsed.cipher}")
    if not 0 < len(parsed.data_keys) <= (1 if derived else MAX_DATA_KEYS):
        _refuse(what, f"it holds {len(parsed.data_keys)} data keys")


def _hex(derivation: Derivation) -> dict[str, str]:
    return {"salt": derivation.salt.hex(), "commitment": derivation.commitment.hex()}


def _derivation(entry: Any) -> Derivation:  # parsed JSON
    derivation = Derivation(bytes.fromhex(entry["salt"]), bytes.fromhex(entry["commitment"]))
    if len(derivation.salt) != SALT_BYTES or len(derivation.commitment) != COMMITMENT_BYTES:
        raise ValueError
    return derivation


def _encode(value: Any, newline: str = "\n") -> str:
    """Return what `json.dumps(value, indent=2, ensure_ascii=False)` gives, in a fraction of the time.

    With `indent` json does without its C encoder, and a rotation writes each key file anew.
    """
    inner = newline + "  "
    if isinstance(value, dict) and value:
        items = (f"{_quote(key)}: {_encode(item, inner)}" for key, item in value.items())
        return f"{{{inner}{f',{inner}'.join(items)}{newline}}}"
    if isinstance(value, list) and value:
        return f"[{inner}{f',{inner}'.join(_encode(item, inner) for item in value)}{newline}]"
    return _quote(value)


_quote: Final = json.JSONEncoder(ensure_ascii=False).encode


def write_data_key(data_key: WrappedDataKey) -> dict[str, Any]:
    """Return a data key as JSON has it."""
    return {
        "key_id": data_key.key_id.hex(),
        "wrapped_keys": [
            {
                "provider": wrapped.provider,
                "kms_key": wrapped.kms_key,
                "wrapped_key": base64.b64encode(wrapped.wrapped).decode(),
            }
            for wrapped in data_key.wrapped_keys
        ],
    }


def parse_data_key(entry: Any, what: str) -> WrappedDataKey:  # parsed JSON
    """Return a data key from JSON.

    Raises:
        FormatError: a length is out of bounds.
        KeyError, TypeError, ValueError, AttributeError: it is of another form.
    """
    key_id = bytes.fromhex(entry["key_id"])
    wrapped = tuple(_wrapped_key(form) for form in entry["wrapped_keys"])
    if len(key_id) != KEY_ID_BYTES or not 0 < len(wrapped) <= MAX_WRAPPED_KEYS:
        _refuse(what, "a data key has a wrong id, no wrapped form or too many")
    if any(len(form.wrapped) > MAX_WRAPPED_BYTES for form in wrapped):
        _refuse(what, f"a wrapped key is larger than {MAX_WRAPPED_BYTES} bytes")
    return WrappedDataKey(key_id, wrapped)


def _wrapped_key(form: Any) -> WrappedKey:  # parsed JSON
    try:
        wrapped = base64.b64decode(form["wrapped_key"], validate=True)
    except binascii.Error as error:
        raise ValueError from error
    return WrappedKey(_string(form["provider"]), _string(form["kms_key"]), wrapped)


def _string(value: Any) -> str:  # parsed JSON
    if not isinstance(value, str):
        raise TypeError
    return value


def _strings(value: Any) -> dict[str, str]:  # parsed JSON
    return {_string(key): _string(text) for key, text in value.items()}


def _refuse(what: str, why: str) -> NoReturn:
    msg = f"{what} is not a readable key file: {why}. Restore it from a copy; without it the data cannot be opened"
    raise FormatError(msg) from None
