"""The manifest: the list of a dataset's shards, authenticated. Bytes: docs/format.md, 11.

Each job that writes adds a section with the shards that it wrote, under a data key of its own. So adding needs no right
to decrypt, and one folder can hold shards under several KMS keys and contexts.

It knows no folder or store: callers read and write the bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple, NoReturn, cast

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from beam_envelope.errors import FormatError, ManifestError
from beam_envelope.formats.keyfile import WrappedDataKey, parse_data_key, write_data_key
from beam_envelope.keys.context import encode_context
from beam_envelope.keys.provider import DataKey

FORMAT: Final = "beam-envelope manifest"
VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 1 << 28

_LABEL: Final = b"beam-envelope/manifest@v1\x00"
_MAC_BYTES: Final = 32
_MAX_NUMBER: Final = 2**63 - 1


class ManifestEntry(NamedTuple):
    """One shard of a dataset.

    Attributes:
        shard_id: of its key file, as hexadecimal digits.
        stored_bytes: the size of the shard.
        plaintext_bytes: the size of what is in it, if known.
        records: how many rows it has, if known.
    """

    shard_id: str
    stored_bytes: int
    plaintext_bytes: int | None = None
    records: int | None = None


@dataclass(frozen=True)
class ManifestSection:
    """The shards that one job wrote.

    Attributes:
        data_key: the section's own data key, wrapped.
        context: the encryption context of that data key.
        shards: by their paths below the manifest's folder, with `/` between folders; None for a shard that an earlier
            section lists and that was removed on purpose.
        earlier: `Manifest.digest()` of the sections before this one.
        section_id: a random UUID.
        mac: HMAC-SHA256 (RFC 2104) over all of this that must not change.
    """

    data_key: WrappedDataKey
    context: Mapping[str, str]
    shards: Mapping[str, ManifestEntry | None]
    earlier: bytes
    section_id: uuid.UUID = field(default_factory=uuid.uuid4)
    mac: bytes = b""

    def signed(self, data_key: DataKey) -> ManifestSection:
        """Return this section with its MAC, under its data key."""
        return replace(self, mac=self._mac(data_key))

    def verify(self, data_key: DataKey, what: str) -> None:
        """Check the MAC.

        Raises:
            ManifestError: it was changed, or made without the key.
        """
        if not hmac.compare_digest(self._mac(data_key), self.mac):
            raise ManifestError(f"{what} was changed after it was written, or forged. Restore it from a copy")

    def _mac(self, data_key: DataKey) -> bytes:
        """Return the MAC under a key derived by HKDF-Expand-SHA512 (RFC 5869 2.3); all parts are behind their length.

        The wrapped forms are not in it, so that keys can be rotated.
        """
        bound = _LABEL + self.section_id.bytes + encode_context(self.context)
        mac = hmac.new(HKDFExpand(hashes.SHA512(), _MAC_BYTES, bound).derive(data_key.material), digestmod="sha256")
        mac.update(len(bound).to_bytes(4, "big") + bound)
        mac.update(self.data_key.key_id + self.earlier + len(self.shards).to_bytes(8, "big"))
        for name in sorted(self.shards):
            path, entry = name.encode(), self.shards[name]
            mac.update(len(path).to_bytes(4, "big") + path)
            if entry is None:
                mac.update(b"\x00")
                continue
            mac.update(b"\x01" + bytes.fromhex(entry.shard_id))
            for number in (entry.stored_bytes, entry.plaintext_bytes, entry.records):
                mac.update((-1 if number is None else number).to_bytes(8, "big", signed=True))
        return mac.digest()


@dataclass(frozen=True)
class Manifest:
    """What a manifest says: its sections, in the order in which they were added."""

    sections: tuple[ManifestSection, ...] = ()

    @property
    def data_keys(self) -> tuple[WrappedDataKey, ...]:
        """The wrapped data key of each section."""
        return tuple(section.data_key for section in self.sections)

    @property
    def contexts(self) -> tuple[Mapping[str, str], ...]:
        """The encryption context of each data key."""
        return tuple(section.context for section in self.sections)

    def digest(self) -> bytes:
        """Return SHA-256 over the MACs of all sections: what the next one is bound to."""
        return hashlib.sha256(b"".join(section.mac for section in self.sections)).digest()

    def latest(self) -> dict[str, tuple[int, ManifestEntry | None]]:
        """Return for each path the number of the last section that names it, and what that says; not authenticated."""
        return {path: (n, entry) for n, section in enumerate(self.sections) for path, entry in section.shards.items()}

    def entries(self) -> Mapping[str, ManifestEntry | None]:
        """Return what the last section that names a path says of it; not authenticated."""
        if len(self.sections) == 1:
            return self.sections[0].shards
        return {path: entry for section in self.sections for path, entry in section.shards.items()}

    def with_section(
        self, data_key: DataKey, context: Mapping[str, str], shards: Mapping[str, ManifestEntry | None]
    ) -> Manifest:
        """Return this manifest with one more section, signed."""
        section = ManifestSection(WrappedDataKey.of(data_key), dict(context), shards, self.digest())
        return Manifest((*self.sections, section.signed(data_key)))

    def with_wrapped_keys(self, data_keys: Sequence[WrappedDataKey]) -> Manifest:
        """Return this manifest with other wrapped forms of the same data keys; the MACs stay good."""
        pairs = zip(self.sections, data_keys, strict=True)
        return Manifest(tuple(replace(section, data_key=data_key) for section, data_key in pairs))

    def check_order(self, what: str) -> None:
        """Check that each section stands behind those that it was added to.

        Raises:
            ManifestError: a section is missing, or in another's place.
        """
        digest = hashlib.sha256()
        for section in self.sections:
            if section.earlier != digest.digest():
                raise ManifestError(f"{what} has lost a section, or got one from elsewhere. Restore it from a copy")
            digest.update(section.mac)

    def to_bytes(self) -> bytes:
        """Return the one encoding: JSON, fields in this order, one line for each shard, a newline at the end."""
        encoded = io.BytesIO()
        encoded.writelines(self._lines())
        return encoded.getvalue()

    def _lines(self) -> Iterator[bytes]:
        """Yield the one encoding in short pieces: of a hundred thousand shards, the whole is there only once."""
        yield f'{{\n  "format": {_dump(FORMAT)},\n  "version": {VERSION},\n  "sections": ['.encode()
        for number, section in enumerate(self.sections):
            yield b",\n" if number else b"\n"
            yield from _section_lines(section)
        yield b"\n  ]\n}\n" if self.sections else b"]\n}\n"

    def _is_encoded_as(self, raw: bytes) -> bool:
        place = 0
        for line in self._lines():
            if not raw.startswith(line, place):
                return False
            place += len(line)
        return place == len(raw)

    @classmethod
    def from_bytes(cls, raw: bytes, what: str) -> Manifest:
        """Parse a manifest; `what` names it in messages. The bytes must be exactly those that `to_bytes` writes.

        Raises:
            FormatError: not a manifest, of an unknown version, or not in the one encoding.
            ManifestError: its sections are not in order.
        """
        if len(raw) > MAX_MANIFEST_BYTES:
            _refuse(what, f"it is larger than {MAX_MANIFEST_BYTES} bytes")
        try:
            document = json.loads(raw, object_hook=_shrunk)
            if document["format"] != FORMAT:
                _refuse(what, f"its format is not {FORMAT!r}")
            if document["version"] != VERSION:
                _refuse(what, "it is of a version that this release does not know; use a newer one")
            parsed = cls(tuple(_section(entry, what) for entry in document["sections"]))
            same = parsed._is_encoded_as(raw)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            _refuse(what, "it is not JSON, or was cut short")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            _refuse(what, "a field is missing or of the wrong type")
        if not same:
            _refuse(what, "it is not in the form that docs/format.md gives, so it was changed after it was written")
        parsed.check_order(what)
        return parsed


_dump: Final = json.JSONEncoder(ensure_ascii=False).encode


def _section_lines(section: ManifestSection) -> Iterator[bytes]:
    head = {
        "section_id": str(section.section_id),
        "earlier": section.earlier.hex(),
        "context": dict(sorted(section.context.items())),
        "data_key": write_data_key(section.data_key),
        "mac": section.mac.hex(),
    }
    yield b"    {\n"
    for name, value in head.items():
        yield f"      {_dump(name)}: {_dump(value)},\n".encode()
    yield b'      "shards": {'
    before = "\n"
    for path in sorted(section.shards):
        entry = section.shards[path]
        yield f"{before}        {_dump(path)}: {_dump(None if entry is None else entry._asdict())}".encode()
        before = ",\n"
    yield b"\n      }\n    }" if section.shards else b"}\n    }"


def _shrunk(members: dict[str, Any]) -> Any:
    """Take a shard's object as soon as it is parsed, since there may be very many; a context has no number in it."""
    return _entry(members) if type(members.get("stored_bytes")) is int else members


def _section(entry: Any, what: str) -> ManifestSection:  # parsed JSON
    section = ManifestSection(
        parse_data_key(entry["data_key"], what),
        {_string(name): _string(value) for name, value in entry["context"].items()},
        _checked(entry["shards"]),
        bytes.fromhex(entry["earlier"]),
        uuid.UUID(entry["section_id"]),
        bytes.fromhex(entry["mac"]),
    )
    if len(section.mac) != _MAC_BYTES or len(section.earlier) != _MAC_BYTES:
        raise ValueError
    return section


def _checked(shards: Any) -> dict[str, ManifestEntry | None]:  # parsed JSON
    for path, entry in shards.items():
        if not path or path.startswith("/") or ".." in path.split("/"):  # it would not be below the manifest's folder
            raise ValueError
        if not (entry is None or isinstance(entry, ManifestEntry)):
            raise TypeError
    return cast("dict[str, ManifestEntry | None]", shards)


def _entry(shard: dict[str, Any]) -> ManifestEntry:  # parsed JSON
    return ManifestEntry(
        uuid.UUID(hex=_string(shard["shard_id"])).hex,
        _number(shard["stored_bytes"]),
        None if shard["plaintext_bytes"] is None else _number(shard["plaintext_bytes"]),
        None if shard["records"] is None else _number(shard["records"]),
    )


def _number(value: Any) -> int:  # parsed JSON
    if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
        raise ValueError
    return value


def _string(value: Any) -> str:  # parsed JSON
    if not isinstance(value, str):
        raise TypeError
    return value


def _refuse(what: str, why: str) -> NoReturn:
    msg = f"{what} is not a readable manifest: {why}. Restore it from a copy, or read with manifest='ignore'"
    raise FormatError(msg) from None
