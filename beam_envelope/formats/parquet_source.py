"""The bytes of an encrypted Parquet file: where pyarrow reads them, and what is looked at before it does."""

from __future__ import annotations

import io
import json
import re
from typing import Any, BinaryIO, Final

import pyarrow as pa

from beam_envelope.errors import NotEncryptedError, TamperedError, TruncatedError

MAGIC: Final = b"PARE"
PLAIN_MAGIC: Final = b"PAR1"
_TAIL_BYTES: Final = 8  # the length of the footer, and the magic
# FileCryptoMetaData in Thrift's compact protocol (Parquet's Encryption.md, 5.4): AES_GCM_V1 with an aad_file_unique of
# 8 bytes, supply_aad_prefix absent or false, and key metadata of 128 to 16383 bytes (a varint of two bytes).
_CRYPTO_METADATA: Final = re.compile(
    rb"\x1c\x1c\x28\x08.{8}\x12?\x00\x00\x18([\x80-\xff][\x01-\x7f])(\{[^{}]*\})\x00", re.DOTALL
)
_MAX_CRYPTO_METADATA_BYTES: Final = 1024
_NO_FOOTER: Final = (
    "{} was changed after it was written: its footer does not begin as it should. Restore it from a copy"
)
_KEY_MATERIAL: Final = {
    "keyMaterialType": "PKMT1",
    "internalStorage": True,
    "isFooterKey": True,
    "kmsInstanceID": "DEFAULT",
    "kmsInstanceURL": "DEFAULT",
    "masterKeyID": "k0",
    "doubleWrapping": False,
}


class Source:
    """What pyarrow reads from. Errors of the caller's stream are kept, since pyarrow rewrites some."""

    def __init__(self, stream: BinaryIO | pa.NativeFile) -> None:
        self.stream: Any = stream
        self.failure: Exception | None = None
        self.closed = False
        if type(stream) is io.BytesIO:
            self.stream = pa.BufferReader(stream.getvalue())  # no copy, and no lock on it

    def native(self) -> Any:
        """Return a file that pyarrow reads without calls into Python, where there is one."""
        return self.stream if isinstance(self.stream, pa.NativeFile) else pa.PythonFile(self, mode="r")

    def read(self, size: int = -1) -> bytes:
        """Read that many bytes, or fewer at the end."""
        try:
            data: bytes = self.stream.read(size) or b""
            if 0 <= len(data) < size:  # a raw stream may return less than there is
                parts = [data]
                left = size - len(data)
                while left > 0 and (more := self.stream.read(left)):
                    parts.append(more)
                    left -= len(more)
                data = b"".join(parts)
        except Exception as error:
            self.failure = error
            raise
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position."""
        try:
            return int(self.stream.seek(offset, whence))
        except Exception as error:
            self.failure = error
            raise

    def tell(self) -> int:
        """Return the position."""
        return int(self.stream.tell())

    def close(self) -> None:
        """Do nothing: the reader closes the stream if it is its own."""

    def readable(self) -> bool:
        """Return True."""
        return True

    def writable(self) -> bool:
        """Return False."""
        return False

    def seekable(self) -> bool:
        """Return True."""
        return True


def check_ends(source: Source, what: str) -> None:
    """Look at what is not authenticated, before pyarrow does: it would read a plain file that is put in the place.

    Raises:
        NotEncryptedError, TruncatedError, TamperedError.
    """
    source.seek(0)
    if source.read(len(PLAIN_MAGIC)) == PLAIN_MAGIC:
        msg = f"{what} is plain Parquet beside the key file of an encrypted file: it was put in its place. Restore it"
        raise NotEncryptedError(msg)
    start, footer_bytes = find_footer(source, what)
    source.seek(start)
    if not _is_ours(source.read(min(footer_bytes, _MAX_CRYPTO_METADATA_BYTES))):
        raise TamperedError(_NO_FOOTER.format(what))


def find_footer(source: Source, what: str) -> tuple[int, int]:
    """Return where the footer of an encrypted Parquet file begins, and how many bytes it has.

    Raises:
        TruncatedError, TamperedError: the file does not begin and end as one.
    """
    size = source.seek(0, io.SEEK_END)
    source.seek(0)
    head = source.read(len(MAGIC))
    if head != MAGIC and MAGIC.startswith(head):
        raise TruncatedError(f"{what} has {size} bytes, which no whole file has: it was cut short. Write it again")
    if head != MAGIC:
        raise TamperedError(f"{what} does not begin as an encrypted Parquet file does: it was changed. Restore it")
    source.seek(max(size - _TAIL_BYTES, 0))
    tail = source.read(_TAIL_BYTES)
    if size < len(MAGIC) + _TAIL_BYTES or tail[-len(MAGIC) :] != MAGIC:
        raise TruncatedError(f"{what} does not end as an encrypted Parquet file does: it was cut short. Write it again")
    footer_bytes = int.from_bytes(tail[:4], "little")
    start = size - _TAIL_BYTES - footer_bytes
    if start < len(MAGIC):
        raise TamperedError(_NO_FOOTER.format(what))
    return start, footer_bytes


def _is_ours(footer: bytes) -> bool:
    """Whether a footer begins with just what our writer lets pyarrow write. Nothing authenticates that part.

    What matters most is the algorithm: were it changed to AES_GCM_CTR_V1, pages would be read without authentication.
    """
    found = _CRYPTO_METADATA.match(footer)
    if found is None:
        return False
    size, material = found.groups()
    try:
        document = json.loads(material)
    except ValueError:
        return False
    token = document.pop("wrappedDEK", None)
    return (
        len(material) == (size[0] & 0x7F) | size[1] << 7
        and isinstance(token, str)
        and document == _KEY_MATERIAL
        and all(type(document[name]) is type(value) for name, value in _KEY_MATERIAL.items())
        and len(material) == len(json.dumps({**document, "wrappedDEK": token}, separators=(",", ":")))
    )
