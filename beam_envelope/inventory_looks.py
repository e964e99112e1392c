"""What a file without a key file looks like, from its first bytes: a guess, at one small read."""

from __future__ import annotations

import codecs
import re
from typing import Any, Final

from beam_envelope.errors import EnvelopeError
from beam_envelope.formats.parquet_footer import read_footer
from beam_envelope.formats.parquet_interop import in_key_file
from beam_envelope.formats.parquet_source import MAGIC, PLAIN_MAGIC, Source
from beam_envelope.formats.shard_layout import MIN_SHARD_BYTES
from beam_envelope.io.s3 import S3Store
from beam_envelope.io.store import store_of

EMPTY: Final = "an empty file"
TEXT: Final = "text"
LOST_PARQUET: Final = "encrypted Parquet that lost its key file"
RANDOM: Final = "encrypted or compressed data"
BINARY: Final = "binary data"
PLAIN_FORMATS: Final = {
    PLAIN_MAGIC: "Parquet with a plain footer",
    b"Obj\x01": "Avro",
    b"ORC": "ORC",
    b"ARROW1": "Arrow",
    b"SQLite format 3\x00": "SQLite",
    b"PK\x03\x04": "ZIP",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x89PNG\r\n": "PNG",
    b"%PDF-": "PDF",
    b"\xff\xd8\xff": "JPEG",
}
"""What no shard is but by a chance of 1 in 65 536 or less, by the first bytes."""
PLAINTEXT: Final = frozenset({TEXT, *PLAIN_FORMATS.values()})

_HEAD_BYTES: Final = 512
_MAX_NAME: Final = 1024
# Of 512 random bytes, 221 +- 5 values are different; of text and tables, far fewer.
_RANDOM_VALUES: Final = 190
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def look_at(path: str) -> tuple[str, str | None]:
    """Return what a file looks like, and, if it is Parquet with its keys in the footer, the KMS key that it names.

    What cannot be read looks like "".
    """
    store = store_of(path)
    try:
        with store.open(path) as stream:
            # Of S3, the buffered reader would fetch 1 MiB.
            source = Source(stream.raw if isinstance(store, S3Store) else stream)  # type: ignore[attr-defined]
            head = source.read(_HEAD_BYTES)
            return _parquet(source, path) if head.startswith(MAGIC) else (_looks(head), None)
    except OSError:
        return "", None


def _parquet(source: Any, path: str) -> tuple[str, str | None]:
    try:
        material = read_footer(source, path).material
    except EnvelopeError:
        return "encrypted Parquet whose footer cannot be read", None
    return (LOST_PARQUET, None) if in_key_file(material) else ("", material.master_key[:_MAX_NAME])


def _looks(head: bytes) -> str:
    if not head:
        return EMPTY
    for magic, name in PLAIN_FORMATS.items():
        if head.startswith(magic):
            return name
    try:
        # The last character may be cut.
        text = codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _HEAD_BYTES)
    except UnicodeDecodeError:
        text = "\x00"
    if not _CONTROLS.search(text):
        return TEXT
    small = MIN_SHARD_BYTES <= len(head) < _HEAD_BYTES
    return RANDOM if small or len(set(head)) >= _RANDOM_VALUES else BINARY
