"""What files that hold tables have in common: their names, their bytes for pyarrow, and errors that show no value."""

from __future__ import annotations

import abc
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, Literal, NamedTuple, TypeAlias, TypeVar

import pyarrow as pa
from apache_beam.io.filesystems import FileSystems

from beam_envelope.errors import EnvelopeError, FormatError, TruncatedError
from beam_envelope.formats.parquet_source import Source
from beam_envelope.io.store import split_path, store_of

CsvTypes: TypeAlias = Literal["text", "inferred"]

_Opened = TypeVar("_Opened", bound="TableSource")

CSV_TYPES: Final = ("text", "inferred")
BATCH_BYTES: Final = 1 << 22
GROUP_BYTES: Final = 1 << 26
MAX_GROUP_BYTES: Final = 1 << 28
_MAX_BATCH_ROWS: Final = 1 << 16
_KINDS: Final = {
    **dict.fromkeys((".parquet", ".parq", ".pq"), "parquet"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
}
_CODECS: Final = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_PYARROW_ERRORS: Final = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError)
_DECIMAL: Final = re.compile(r"decimal(128|256)?\((\d+),\s*(-?\d+)\)")
_ZONED: Final = re.compile(r"timestamp\[(s|ms|us|ns),\s*(?:tz=)?([\w/+:-]+)\]")


class Name(NamedTuple):
    """What the name of a file says: `parquet`, `csv` or `json`, by which ending; how it is packed; its name to be."""

    kind: str
    ending: str
    codec: str | None
    parquet: str


def parse_name(path: str) -> Name:
    """Say what a file's name says: `part.csv.gz` is packed CSV, and becomes `part.parquet`.

    Raises:
        ValueError: its ending is none that is known.
    """
    folder, name = split_path(path)
    stem, codec = name, None
    for ending, packed in _CODECS.items():
        if stem.lower().endswith(ending):
            stem, codec = stem[: -len(ending)], packed
    for ending, kind in _KINDS.items():
        if stem.lower().endswith(ending) and not (kind == "parquet" and codec):
            return Name(kind, ending, codec, path if kind == "parquet" else f"{folder}{stem[: -len(ending)]}.parquet")
    msg = (
        f"{path} is no table: the names of those end in {', '.join(_KINDS)}, and of text also in .gz, .bz2 or .zst "
        "behind that. Leave it out of the pattern, or encrypt it as it is (EncryptFiles, --format=shard)"
    )
    raise ValueError(msg)


def is_passed_over(name: str) -> bool:
    """Whether a name says that a file is none of the dataset's, as for Spark, Hive and Arrow: `_SUCCESS`, `.a.crc`."""
    return name.startswith(("_", "."))


@dataclass(frozen=True)
class TextTypes:
    """Which types the columns of text have. Configuration only, so it travels.

    Attributes:
        csv: those of CSV columns that are not in `columns`: all text, or as pyarrow infers them from a file's first
            4 MiB.
        columns: names of columns and of their types, for CSV and for JSON lines.
    """

    csv: CsvTypes = "text"
    columns: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, csv: str, columns: Mapping[str, str] | None) -> TextTypes:
        """Check the arguments. Raises ValueError."""
        if csv not in CSV_TYPES:
            raise ValueError(f"csv_types is one of {', '.join(CSV_TYPES)}, not {csv!r}")
        for text in (columns or {}).values():
            parse_type(text)
        return cls("inferred" if csv == "inferred" else "text", tuple((columns or {}).items()))

    def arrow(self) -> dict[str, pa.DataType]:
        """Return the types of `columns`."""
        return {name: parse_type(text) for name, text in self.columns}


def parse_type(text: str) -> pa.DataType:
    """Return an Arrow type by its name: `int64`, `string`, `date32`, `timestamp[us, UTC]`, `decimal128(12, 2)`.

    Raises:
        ValueError: there is no such type.
    """
    try:
        if match := _DECIMAL.fullmatch(text):
            make = pa.decimal256 if match[1] == "256" else pa.decimal128
            return make(int(match[2]), int(match[3]))
        if match := _ZONED.fullmatch(text):
            return pa.timestamp(match[1], match[2])
        return pa.type_for_alias(text)
    except ValueError:
        msg = f"{text!r} is no type; write one of Arrow's, such as int64, float64, string, bool, date32, timestamp[us]"
        raise ValueError(f"{msg}, timestamp[us, UTC] or decimal128(12, 2)") from None


class Bytes:
    """The bytes of a file as pyarrow reads them: a local file by itself, another through its store.

    Attributes:
        native: the open file.
        failure: the error that the store raised, which pyarrow may have rewritten.
    """

    def __init__(self, path: str) -> None:
        """Open it. Raises OSError."""
        self._stream: BinaryIO | None = None
        self._source: Source | None = None
        if FileSystems.get_scheme(path) is None:
            self.native: Any = pa.OSFile(path)
        else:
            self._stream = store_of(path).open(path)
            self._source = Source(self._stream)
            self.native = self._source.native()

    @property
    def failure(self) -> Exception | None:
        """The store's own error."""
        return None if self._source is None else self._source.failure

    def unpacked(self, codec: str | None) -> Any:
        """Return the bytes from the start on, unpacked."""
        self.native.seek(0)
        return self.native if codec is None else pa.CompressedInputStream(pa.PythonFile(_Kept(self.native)), codec)

    def close(self) -> None:
        """Close it."""
        self.native.close()
        if self._stream is not None:
            self._stream.close()


class _Kept:
    """A file that stays open when what unpacks it is closed."""

    closed = False

    def __init__(self, native: Any) -> None:
        self._native = native

    def read(self, size: int = -1) -> bytes:
        return bytes(self._native.read(size))

    def close(self) -> None:
        """Do nothing."""

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False


class TableSource(abc.ABC):
    """An open file with a table in it. Close it, or use it in a `with` block.

    Attributes:
        schema: of the table.
    """

    schema: pa.Schema

    def __init__(self, path: str, size: int) -> None:
        """Open the file, of `size` bytes. Raises FormatError, TruncatedError, OSError."""
        self.path, self.size = path, size
        self._bytes = Bytes(path)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @abc.abstractmethod
    def _open(self) -> None:
        """Find the schema."""

    @abc.abstractmethod
    def groups(self) -> Iterator[Iterator[pa.RecordBatch]]:
        """Yield the rows once, by row groups; text has only one. Raises FormatError, TruncatedError, OSError."""

    @abc.abstractmethod
    def done_bytes(self) -> int:
        """Return how much of the file's size was read so far."""

    @abc.abstractmethod
    def compression(self) -> str | list[str]:
        """Return the codec for Parquet, or one for each leaf. Call it after the first batch was read."""

    def close(self) -> None:
        """Close the file."""
        self._bytes.close()

    def __enter__(self: _Opened) -> _Opened:  # noqa: PYI019  # typing.Self came with Python 3.11
        """Return the source itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close."""
        self.close()

    def explain(self, message: str) -> str:
        """Return what goes behind the path for a message of pyarrow's, whose end may show a value."""
        return f" cannot be read: {message.partition(':')[0].partition(chr(10))[0]}"

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Turn what pyarrow raises into errors that name the file and show no value."""
        try:
            yield
        except EnvelopeError:
            raise
        except _PYARROW_ERRORS as error:
            if self._bytes.failure is not None:
                raise self._bytes.failure from None
            if isinstance(error, OSError) and error.errno is not None:
                raise
            message = str(error)
            if "Truncated compressed" in message:
                raise TruncatedError(f"{self.path} was cut short: its packed end is missing. Restore it") from None
            raise FormatError(f"{self.path}{self.explain(message)}") from None


def batch_rows(n_bytes: int, n_rows: int) -> int:
    """Return how many rows are a batch of about 4 MiB, if so many rows have so many bytes."""
    return max(1, min(_MAX_BATCH_ROWS, BATCH_BYTES * n_rows // max(1, n_bytes)))


def cut(groups: Iterable[Iterable[pa.RecordBatch]], row_group_rows: int | None, max_bytes: int) -> Iterator[pa.Table]:
    """Yield the row groups to write: those that are there, or of so many rows each; none larger than `max_bytes`.

    Args:
        groups: the batches of each row group that is there.
        row_group_rows: how many rows a row group gets; None: keep those that are there.
        max_bytes: how large a row group may become in memory.
    """
    if row_group_rows is not None:
        yield from _cut((batch for group in groups for batch in group), row_group_rows, max_bytes)
        return
    for group in groups:
        yield from _cut(group, None, max_bytes)


def _cut(batches: Iterable[pa.RecordBatch], max_rows: int | None, max_bytes: int) -> Iterator[pa.Table]:
    pending: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        rest = batch
        while rest.num_rows:
            part = rest if max_rows is None else rest.slice(0, max_rows - rows)
            rest = rest.slice(part.num_rows)
            pending.append(part)
            rows += part.num_rows
            size += _size(part)
            if rows == max_rows or size >= max_bytes:
                yield pa.Table.from_batches(pending)
                pending, rows, size = [], 0, 0
    if pending:
        yield pa.Table.from_batches(pending)


def _size(batch: pa.RecordBatch) -> int:
    """Return the bytes of a batch without those of dictionaries, which its neighbours share."""
    columns = [column.indices if pa.types.is_dictionary(column.type) else column for column in batch.columns]
    return sum(column.nbytes for column in columns)
