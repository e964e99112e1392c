"""The footer of an encrypted Parquet file, read without pyarrow: under which KMS keys its keys are wrapped.

pyarrow tells nothing of that, and aborts the process when it is asked for the metadata of a column without its key.
Sources: Parquet's Encryption.md (5.4, 4.4.2), parquet.thrift, Thrift's compact protocol, parquet-java's KeyMaterial.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from beam_envelope.errors import FormatError, NotEncryptedError, TamperedError
from beam_envelope.formats.parquet_source import PLAIN_MAGIC, Source, find_footer

FOOTER_KEY: Final = b""
"""What `first_row_group` says of a column that is under the footer's key."""

# FileCryptoMetaData: AES_GCM_V1 with an aad_file_unique of less than 128 bytes, no AAD prefix, and key metadata.
_ALGORITHM: Final = re.compile(rb"\x1c\x1c\x28(?:([\x01-\x7f]))")
_AFTER_UNIQUE: Final = re.compile(rb"\x12?\x00\x00\x18")
_FOOTER_MODULE: Final = b"\x00"
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_LENGTH_BYTES: Final = 4
_MAX_DEPTH: Final = 32
_INTEGERS: Final = (4, 5, 6)
_FIXED: Final = {1: 0, 2: 0, 3: 1, 7: 8}  # sizes: bools, which are in the field's head, bytes, doubles


@dataclass(frozen=True)
class KeyMaterial:
    """What parquet-java and parquet-cpp store of one of a file's keys (`PKMT1`).

    Attributes:
        master_key: the name that the writer gave to the KMS key.
        wrapped_dek: the file's or column's own key, wrapped by the KMS, or under the key encryption key.
        kek_id: the id of the key encryption key, base64; None with single wrapping.
        wrapped_kek: the key encryption key, wrapped by the KMS; None with single wrapping.
    """

    master_key: str
    wrapped_dek: str
    kek_id: str | None = None
    wrapped_kek: str | None = None

    @classmethod
    def parse(cls, data: bytes, what: str) -> KeyMaterial:
        """Parse key metadata.

        Raises:
            FormatError: it is not of this form, or kept outside of the file.
        """
        try:
            document: Any = json.loads(data)
            if document["keyMaterialType"] == "PKMT1" and document["internalStorage"] is False:
                raise FormatError(
                    f"{what} keeps its wrapped keys in a file of their own (_KEY_MATERIAL_FOR_...), which is not "
                    "read here. Write it with internal key material"
                )
            double = document["doubleWrapping"]
            names = ["masterKeyID", "wrappedDEK", *(["keyEncryptionKeyID", "wrappedKEK"] if double else [])]
            values = [document[name] for name in names]
        except (ValueError, KeyError, TypeError, RecursionError):
            values, document = [None], {}
        if not all(isinstance(value, str) for value in values) or document.get("keyMaterialType") != "PKMT1":
            raise FormatError(
                f"{what} does not say how its keys are wrapped as Parquet's key tools do (PKMT1), so its keys came "
                "from elsewhere, or it was changed. Open it with the software that wrote it"
            )
        return cls(*values)

    @property
    def token(self) -> str:
        """What the KMS wrapped."""
        return self.wrapped_dek if self.wrapped_kek is None else self.wrapped_kek

    def own_key(self, unwrapped: bytes | bytearray, what: str) -> bytes:
        """Return the file's or column's own key, given what the KMS unwrapped.

        Raises:
            TamperedError: the key encryption key does not open it.
        """
        if self.kek_id is None:
            return bytes(unwrapped)
        try:
            sealed = base64.b64decode(self.wrapped_dek, validate=True)
            aad = base64.b64decode(self.kek_id, validate=True)
            return AESGCM(unwrapped).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], aad)
        except (binascii.Error, ValueError, InvalidTag):
            raise TamperedError(f"{what} was changed after it was written: a key in its footer does not open") from None


@dataclass(frozen=True)
class SealedFooter:
    """The footer: what is in clear of it, and its ciphertext."""

    material: KeyMaterial
    unique: bytes
    sealed: bytes

    def open(self, key: bytes, what: str) -> bytes:
        """Decrypt the footer. Raises TamperedError."""
        body = self.sealed[_LENGTH_BYTES:]
        whole = int.from_bytes(self.sealed[:_LENGTH_BYTES], "little") == len(body) > _NONCE_BYTES + _TAG_BYTES
        try:
            if whole:
                return AESGCM(key).decrypt(body[:_NONCE_BYTES], body[_NONCE_BYTES:], self.unique + _FOOTER_MODULE)
        except (InvalidTag, ValueError):
            pass
        raise TamperedError(
            f"{what} was changed after it was written: its footer does not open. Restore it from a copy"
        )


def read_footer(source: Source, what: str) -> SealedFooter:
    """Read the footer of a file whose keys are wrapped inside of it.

    Raises:
        NotEncryptedError: a plain file, or one with a plain footer.
        TruncatedError, TamperedError: it is no whole file.
        FormatError: its pages or keys are of another form than what is read here.
    """
    source.seek(0)
    if source.read(len(PLAIN_MAGIC)) == PLAIN_MAGIC:
        raise NotEncryptedError(
            f"{what} is plain Parquet, or has a plain footer, which authenticates nothing to a reader. Read it with "
            "pyarrow, or write it with an encrypted footer"
        )
    start, size = find_footer(source, what)
    source.seek(start)
    footer = source.read(size)
    algorithm = _ALGORITHM.match(footer)
    unique = b"" if algorithm is None else footer[algorithm.end() : algorithm.end() + algorithm[1][0]]
    rest = None if algorithm is None else _AFTER_UNIQUE.match(footer, algorithm.end() + len(unique))
    if rest is None:
        raise FormatError(
            f"{what} is not encrypted with AES_GCM_V1, an encrypted footer and keys that are wrapped in it; in "
            "AES_GCM_CTR_V1 changed pages would be read unseen. Write it again"
        )
    reader = _Compact(footer, rest.end())
    try:
        metadata = reader.binary()
        stop = reader.byte()
    except (IndexError, ValueError):
        stop = -1
    if stop:
        raise TamperedError(f"{what} was changed after it was written: its footer does not begin as it should")
    return SealedFooter(KeyMaterial.parse(metadata, what), unique, footer[reader.at :])


def first_row_group(footer: bytes, what: str) -> list[bytes | None]:
    """Return for each column the key metadata of its own key, `FOOTER_KEY`, or None if it is plain.

    The key of a column is the same in all row groups: libraries make it once for each file.

    Args:
        footer: FileMetaData, decrypted and so authentic.
        what: the file, for the message.

    Returns:
        The columns in order; none if there is no row group.

    Raises:
        FormatError: it is not in Thrift's compact protocol.
    """
    reader = _Compact(footer)
    try:
        for number, kind in reader.fields():
            if number == 4:  # noqa: PLR2004  # FileMetaData.row_groups
                return _columns(reader) if reader.list_size() else []
            reader.skip(kind)
    except (IndexError, ValueError):
        pass
    raise FormatError(f"the footer of {what} cannot be parsed. Write it again")


def _columns(reader: _Compact) -> list[bytes | None]:
    for number, kind in reader.fields():
        if number == 1:  # RowGroup.columns
            return [_crypto_metadata(reader) for _ in range(reader.list_size())]
        reader.skip(kind)
    raise ValueError


def _crypto_metadata(reader: _Compact) -> bytes | None:
    """Read a ColumnChunk for its crypto_metadata, a union."""
    found: bytes | None = None
    for number, kind in reader.fields():
        if number != 8:  # noqa: PLR2004  # ColumnChunk.crypto_metadata
            reader.skip(kind)
            continue
        for choice, _ in reader.fields():
            found = FOOTER_KEY if choice == 1 else None  # ENCRYPTION_WITH_FOOTER_KEY
            for member, member_kind in reader.fields():
                if choice == 2 and member == 2:  # noqa: PLR2004  # ENCRYPTION_WITH_COLUMN_KEY, key_metadata
                    found = reader.binary()
                else:
                    reader.skip(member_kind)
            if found is None:
                raise ValueError
    return found


class _Compact:
    """Reads Thrift's compact protocol. Raises IndexError and ValueError."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def byte(self) -> int:
        value = self.data[self.at]
        self.at += 1
        return value

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:  # noqa: PLR2004  # the last one
                return value
            shift += 7
            if shift > 63:  # noqa: PLR2004
                raise ValueError

    def binary(self) -> bytes:
        size = self.varint()
        if size > len(self.data) - self.at:
            raise IndexError
        self.at += size
        return self.data[self.at - size : self.at]

    def list_size(self) -> int:
        size = self.byte() >> 4
        return self.varint() if size == 0xF else size  # noqa: PLR2004

    def fields(self) -> Iterator[tuple[int, int]]:
        """Yield number and type of each field; the taker reads or skips its value."""
        number = 0
        while head := self.byte():
            if head >> 4:
                number += head >> 4
            else:
                zigzag = self.varint()
                number = (zigzag >> 1) ^ -(zigzag & 1)
            yield number, head & 0xF

    def skip(self, kind: int, depth: int = 0) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError
        if kind in _INTEGERS:
            self.varint()
        elif kind in _FIXED:
            self.at += _FIXED[kind]
            if self.at > len(self.data):
                raise IndexError
        elif kind == 8:  # noqa: PLR2004
            self.binary()
        elif kind in {9, 10}:  # list, set
            inner = self.data[self.at] & 0xF
            for _ in range(self.list_size()):
                self.skip(3 if inner in {1, 2} else inner, depth + 1)  # a bool in a list takes a byte
        elif kind == 12:  # noqa: PLR2004  # struct
            for _, inner in self.fields():
                self.skip(inner, depth + 1)
        else:  # maps are nowhere in Parquet
            raise ValueError
