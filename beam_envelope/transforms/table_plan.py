"""What EncryptTables and DecryptTables share: which file becomes which, in which form, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Optional

import pyarrow as pa

from beam_envelope.errors import FormatError
from beam_envelope.formats.parquet_columns import leaf_paths
from beam_envelope.formats.table import METADATA_KEY
from beam_envelope.io.table_parquet import ParquetSource
from beam_envelope.io.table_source import (
    GROUP_BYTES,
    MAX_GROUP_BYTES,
    TableSource,
    TextTypes,
    is_passed_over,
    parse_name,
)
from beam_envelope.io.table_text import open_text
from beam_envelope.transforms.plan import EncryptPlan
from beam_envelope.transforms.row_types import register_rows

DEFAULT_CODEC: Final = "SNAPPY"


class EncryptedTable(NamedTuple):
    """What EncryptTables says of each file.

    Attributes:
        source: the file that was read.
        table: the Parquet file that was written.
        key_file: the key file beside it; empty for cells, whose keys are in the key store.
        rows: how many rows it has; None if it was skipped.
        plaintext_bytes: the size of the source.
        ciphertext_bytes: the size of what was written.
        key_id: the id of the footer's data key; empty for cells.
        skipped: whether it was there already.
        shard_id: as its key file has it; empty for cells.
    """

    source: str
    table: str
    key_file: str
    rows: Optional[int]  # noqa: UP045  # Beam reads it
    plaintext_bytes: int
    ciphertext_bytes: int
    key_id: str
    skipped: bool
    shard_id: str = ""


class DecryptedTable(NamedTuple):
    """What DecryptTables says of each file. As `EncryptedTable`; `output` is the plain file."""

    table: str
    output: str
    rows: Optional[int]  # noqa: UP045
    plaintext_bytes: int
    ciphertext_bytes: int
    key_id: str
    skipped: bool


register_rows(EncryptedTable, DecryptedTable)


@dataclass(frozen=True)
class TablesPlan(EncryptPlan):
    """Which Parquet files become of which files: `EncryptPlan` for tables."""

    def named(self, path: str, base: str) -> str | None:
        """Give text the ending `.parquet`; pass over what belongs to no dataset. Raises ValueError: it is no table."""
        inner = path[len(base) :] if path.startswith(base) else ""
        return None if any(map(is_passed_over, inner.split("/"))) else parse_name(path).parquet


@dataclass(frozen=True)
class Form:
    """The form of the Parquet files that are written.

    Attributes:
        row_group_rows: how many rows a row group has; None: those of Parquet input are kept.
        compression: the codec of all columns; None: those of Parquet input are kept.
    """

    row_group_rows: int | None = None
    compression: str | None = None

    def max_bytes(self, source: TableSource) -> int:
        """Return how large a row group may become in memory."""
        text = self.row_group_rows is None and not isinstance(source, ParquetSource)
        return GROUP_BYTES if text else MAX_GROUP_BYTES

    def options(self, source: TableSource, schema: pa.Schema) -> dict[str, Any]:
        """Return options for the writer of `schema`, after the first batch of the source was read."""
        codecs = self.compression or source.compression()
        if isinstance(codecs, str):
            return {"compression": codecs}
        if len(set(codecs)) <= 1:
            return {"compression": codecs[0] if codecs else DEFAULT_CODEC}
        before = dict(zip(leaf_paths(source.schema, {}), codecs, strict=False))
        return {"compression": {leaf: before.get(leaf, codecs[0]) for leaf in leaf_paths(schema, {})}}


def open_table(path: str, size: int, types: TextTypes) -> TableSource:
    """Open a plain file. Raises FormatError, TruncatedError, AlreadyEncryptedError, OSError."""
    return ParquetSource(path, size) if parse_name(path).kind == "parquet" else open_text(path, size, types)


def encrypted_columns(schema: pa.Schema) -> list[str]:
    """Return the paths of the columns, and of the children of structs, whose metadata say that they are cells."""
    return [path for field in schema for path in _encrypted(field, "")]


def _encrypted(field: pa.Field, prefix: str) -> Iterator[str]:
    path = prefix + field.name
    if METADATA_KEY in (field.metadata or {}):
        yield path
    elif pa.types.is_struct(field.type):
        for child in field.type:
            yield from _encrypted(child, f"{path}.")


@contextmanager
def about(path: str) -> Iterator[None]:
    """Name the file in what a schema or its columns raise, and show no value: they concern this one file."""
    try:
        yield
    except (ValueError, TypeError, KeyError, pa.ArrowException) as error:
        text = type(error).__name__ if isinstance(error, UnicodeError) or not error.args else str(error.args[0])
        if isinstance(error, pa.ArrowException):  # behind the colon may be a value
            text = text.partition(":")[0]
        raise FormatError(f"{path}: {text}") from None
