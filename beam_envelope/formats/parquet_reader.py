"""The reading side of an encrypted Parquet file: only what was proven readable is asked of pyarrow.

pyarrow 25 aborts the process when the metadata of a column without key is looked at, and hangs when a filter is pushed
down to one. So nothing here looks at the metadata of a column chunk, reading goes through `iter_batches` alone, and
filters are applied to what was decrypted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, Final, Literal, NoReturn, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe

from beam_envelope.errors import EnvelopeError, FormatError, TamperedError
from beam_envelope.formats.keyfile import KeyFile
from beam_envelope.formats.parquet_columns import Paths, conform, units, with_nulls
from beam_envelope.formats.parquet_interop import KmsWrappedKeys
from beam_envelope.formats.parquet_keys import COLUMNS_ENTRY
from beam_envelope.formats.parquet_source import Source, check_ends
from beam_envelope.formats.parquet_unwrap import FileKeys, Keys
from beam_envelope.keys.provider import KeyProvider

OnDenied: TypeAlias = 'Literal["error", "null", "drop"]'
Filter: TypeAlias = "pc.Expression | list[Any] | None"

BATCH_ROWS: Final = 65536
_READ_ROWS: Final = 1 << 20
_PYARROW_ERRORS: Final = (
    pa.ArrowException,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    OverflowError,
)


@dataclass(frozen=True)
class _Plan:
    """What is read for a request, and what is made of it."""

    read: list[str] | None  # leaves; None: all
    filter: Any
    schema: pa.Schema


class EncryptedParquetReader:
    """Reads an encrypted Parquet file. Made by `open_parquet`; close it, or use it in a `with` block.

    Several threads may share it: they take turns.

    Attributes:
        name: the file.
    """

    def __init__(
        self,
        stream: BinaryIO | pa.NativeFile,
        key_file: KeyFile | None,
        keys: Sequence[KeyProvider],
        context: Mapping[str, str],
        what: str,
        *,
        on_denied: OnDenied = "error",
        own: bool = False,
    ) -> None:
        """Open the footer; without key file, the keys are in it. Raises as `open_parquet`."""
        if on_denied not in {"error", "null", "drop"}:
            raise ValueError(f"on_denied is 'error', 'null' or 'drop', not {on_denied!r}")
        self.name, self._key_file = what, key_file
        self._on_denied = on_denied
        self._lock = threading.RLock()
        self._source = Source(stream)
        self._own = own
        self._keys: Keys
        if key_file is None:
            self._keys = KmsWrappedKeys(self._source, keys, context, what)
        else:
            check_ends(self._source, what)
            self._keys = FileKeys(keys, key_file, context, what)
        # pyarrow may use a factory for as long as the file is open, but does not keep it. The lambda must not know this
        # reader: garbage collection would not see through the factory.
        client = self._keys.client
        self._factory = pe.CryptoFactory(lambda _: client)
        with self._named_errors():
            properties = self._factory.file_decryption_properties(pe.KmsConnectionConfig())
            # Without pre_buffer no thread of pyarrow's calls back into Python.
            self._file = pq.ParquetFile(self._source.native(), decryption_properties=properties, pre_buffer=False)
            metadata = self._file.metadata
            leaves = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
            arrow_schema = self._file.schema_arrow
            self._metadata = dict(metadata.metadata or {})
            self._group_rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self._paths = Paths(leaves, arrow_schema)
        self._file_schema = _without_entry(arrow_schema)
        self._metadata.pop(b"ARROW:schema", None)
        entry = self._metadata.pop(COLUMNS_ENTRY.encode(), None)
        self._assigned = self._keys.assign(entry, leaves)

    @property
    def key_file(self) -> KeyFile:
        """What its key file says. Raises ValueError if it was opened without one (`interop=True`)."""
        if self._key_file is None:
            raise ValueError(f"{self.name} was opened with the keys in its footer: it has no key file")
        return self._key_file

    @property
    def num_row_groups(self) -> int:
        """How many row groups there are."""
        return len(self._group_rows)

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return sum(self._group_rows)

    @property
    def columns(self) -> dict[str, str]:
        """For the path of each column, `readable`, `denied` or `plain`.

        Raises:
            KmsUnavailableError, TamperedError: from the KMS.
        """
        with self._lock:
            access = {number: "denied" if self._denial(number) else "readable" for number in self._numbers()}
        return {leaf: "plain" if number is None else access[number] for leaf, number in self._assigned.items()}

    @property
    def metadata(self) -> dict[bytes, bytes]:
        """The entries of the file's key-value metadata, but for ours and the one that holds the Arrow schema."""
        return dict(self._metadata)

    @property
    def schema(self) -> pa.Schema:
        """The schema of what `read` returns: of the whole file, but for what `on_denied` leaves out or makes nullable.

        Raises:
            KmsUnavailableError, TamperedError: from the KMS.
        """
        return self._file_schema if self._on_denied == "error" else self.schema_of(None)

    def schema_of(self, columns: Sequence[str] | None) -> pa.Schema:
        """Return the schema of what `read(columns)` returns. Raises as `read`; nothing but the footer is read."""
        return self._plan(columns, None).schema

    def read(self, columns: Sequence[str] | None = None, filter: Filter = None) -> pa.Table:  # noqa: A002  # as pyarrow
        """Read the whole file into a table.

        Args:
            columns: names of columns, or paths of what is in them; default: all.
            filter: a pyarrow expression, or a list of tuples as `pyarrow.parquet.read_table` takes; only the rows that
                fulfil it are returned. It may use columns that are not in `columns`.

        Raises:
            WrongKeyError, KeyAccessError: a column, or what `filter` needs, is denied. Names it and its KMS keys.
            TamperedError: the file was changed.
            ValueError: there is no such column, or the filter does not fit.
            KmsUnavailableError, OSError: from the KMS, or from the disk or stream.
        """
        plan = self._plan(columns, filter)
        return pa.Table.from_batches(self._batches(plan, None, _READ_ROWS), schema=plan.schema)

    def read_row_group(
        self,
        i: int,
        columns: Sequence[str] | None = None,
        filter: Filter = None,  # noqa: A002  # as pyarrow
    ) -> pa.Table:
        """Read one row group into a table. Raises as `read`, and IndexError."""
        plan = self._plan(columns, filter)
        return pa.Table.from_batches(self._batches(plan, self._checked([i]), _READ_ROWS), schema=plan.schema)

    def iter_batches(
        self,
        row_groups: Sequence[int] | None = None,
        columns: Sequence[str] | None = None,
        batch_size: int = BATCH_ROWS,
        filter: Filter = None,  # noqa: A002  # as pyarrow
    ) -> Iterator[pa.RecordBatch]:
        """Read batch by batch.

        Args:
            row_groups: numbers of row groups; default: all.
            columns: as `read`.
            batch_size: the most rows in a batch.
            filter: as `read`; batches without rows are left out.

        Raises:
            IndexError: there is no such row group.
            As `read`, at once or while it goes on.
        """
        if batch_size <= 0:
            raise ValueError(f"batch_size is above 0, not {batch_size}")
        return self._batches(
            self._plan(columns, filter), None if row_groups is None else self._checked(row_groups), batch_size
        )

    def close(self) -> None:
        """Close the file, and the stream if it was opened here."""
        with self._lock:
            if not self._source.closed:
                self._file.close(force=True)
                self._source.closed = True
                if self._own:
                    self._source.stream.close()

    def __enter__(self) -> EncryptedParquetReader:
        """Return the reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to pickle or copy."""
        raise TypeError("an open Parquet file cannot be pickled or copied; open it where it is read")

    def _checked(self, row_groups: Sequence[int]) -> list[int]:
        for number in row_groups:
            if not 0 <= number < len(self._group_rows):
                raise IndexError(f"{self.name} has {len(self._group_rows)} row groups; there is no number {number}")
        return list(row_groups)

    def _numbers(self) -> list[int]:
        return sorted({number for number in self._assigned.values() if number is not None})

    def _denial(self, number: int | None) -> EnvelopeError | None:
        return None if number is None else self._keys.denial(number, remembered=self._on_denied != "error")

    def _plan(self, columns: Sequence[str] | None, filter: Filter) -> _Plan:  # noqa: A002
        if isinstance(columns, str):
            raise TypeError(f"columns is a list of names, not the text {columns!r}")
        with self._lock:
            self._refuse_closed()
            wanted = list(self._paths.leaves) if columns is None else self._paths.find(columns)
            schema = self._schema_of(wanted)
            denied = self._denied(schema, wanted)
            if denied and self._on_denied == "error":
                self._refuse(denied, "Name others, or open the file with on_denied='null' or 'drop'")
            readable = [leaf for leaf in wanted if leaf not in denied]
            if self._on_denied == "drop":
                schema = self._schema_of(readable)
            elif denied:
                schema = with_nulls(schema, wanted, denied)
            if filter is not None:
                filter, needed = self._needed(filter)  # noqa: A001
                readable = self._paths.find([*readable, *needed])
                _check_conforms(self._schema_of(readable), schema)
            everything = len(readable) == len(self._paths.leaves) and columns is None
            return _Plan(None if everything else readable, filter, schema)

    def _schema_of(self, leaves: Sequence[str]) -> pa.Schema:
        """Return the schema of what pyarrow reads for these leaves; no column chunk is touched."""
        with self._named_errors():
            return _without_entry(self._file.read_row_groups([], columns=list(leaves), use_threads=False).schema)

    def _denied(self, schema: pa.Schema, leaves: Sequence[str]) -> set[str]:
        """Return those leaves that may not be read, nor what is in one list or map with them."""
        denied: set[str] = set()
        for unit in units(schema, leaves):
            if any(self._denial(self._assigned[leaf]) for leaf in unit):
                denied.update(unit)
        return denied

    def _needed(self, filter: Filter) -> tuple[Any, list[str]]:  # noqa: A002
        """Return a filter as an expression, and the leaves that it needs, all of which may be read."""
        expression = filter if isinstance(filter, pc.Expression) else pq.filters_to_expression(filter)
        whole = self._file_schema
        _try(expression, whole)
        text = str(expression)
        names = [name for name in whole.names if name in text]
        if not _fits(expression, _select(whole, names)):
            names = list(whole.names)
        for name in list(names):
            fewer = [other for other in names if other != name]
            if _fits(expression, _select(whole, fewer)):
                names = fewer
        leaves = self._paths.find(names)
        denied = self._denied(self._schema_of(leaves), leaves)
        readable = [leaf for leaf in leaves if leaf not in denied]
        if denied and not _fits(expression, self._schema_of(readable)):
            self._refuse(denied, "Filter by others", ", which the filter needs")
        return expression, readable

    def _refuse(self, denied: set[str], advice: str, why: str = "") -> NoReturn:
        """Name the columns that may not be read."""
        by_number: dict[int, list[str]] = {}
        for leaf in self._paths.leaves:
            number = self._assigned[leaf]
            if leaf in denied and number is not None and self._denial(number):
                by_number.setdefault(number, []).append(leaf)
        columns = "; ".join(
            f"{', '.join(leaves)} (under {self._keys.kms_keys(number)})" for number, leaves in by_number.items()
        )
        denials = [denial for number in by_number if (denial := self._denial(number))]
        raise type(denials[0])(
            f"this reader may not open these columns of {self.name}{why}: {columns}. {advice}. {denials[0]}"
        )

    def _batches(self, plan: _Plan, row_groups: list[int] | None, batch_size: int) -> Iterator[pa.RecordBatch]:
        batches: Any = None
        while True:
            with self._lock:
                self._refuse_closed()
                with self._named_errors():
                    if batches is None:
                        batches = self._file.iter_batches(
                            batch_size, row_groups=row_groups, columns=plan.read, use_threads=False
                        )
                    batch = next(batches, None)
            if batch is None:
                return
            if plan.filter is None:
                yield conform(batch, plan.schema)
                continue
            for kept in pa.Table.from_batches([batch]).filter(plan.filter).to_batches():
                if kept.num_rows:
                    yield conform(kept, plan.schema)

    def _refuse_closed(self) -> None:
        if self._source.closed:
            raise ValueError(f"{self.name} is closed")

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turn what pyarrow raises into an error of ours."""
        client = self._keys.client
        client.failure = self._source.failure = None
        try:
            yield
        except EnvelopeError:
            raise
        except _PYARROW_ERRORS as error:
            if client.failure is not None:
                raise client.failure from None
            if self._source.failure is not None:
                raise self._source.failure from None
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's own
            reason = str(error).partition("\n")[0][:200]
            if isinstance(error, pa.ArrowNotImplementedError):
                raise FormatError(f"pyarrow cannot read {self.name}: {reason}") from None
            raise TamperedError(
                f"{self.name} was changed after it was written, or damaged: {reason}. Restore it from a copy"
            ) from None


def _without_entry(schema: pa.Schema) -> pa.Schema:
    """Return a schema without our entry, which pyarrow takes from the footer into it."""
    metadata = {name: value for name, value in (schema.metadata or {}).items() if name != COLUMNS_ENTRY.encode()}
    return schema.with_metadata(metadata or None)


def _select(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    return pa.schema([field for field in schema if field.name in names])


def _check_conforms(have: pa.Schema, schema: pa.Schema) -> None:
    """Refuse a filter that reads a whole map of which a part is asked for: it cannot be cut out of what was read."""
    try:
        conform(pa.RecordBatch.from_arrays([pa.nulls(1, field.type) for field in have], names=have.names), schema)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"the filter needs the whole of a map; ask for the whole of it too: {error}") from None


def _try(expression: Any, schema: pa.Schema) -> None:
    try:
        schema.empty_table().filter(expression)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"the filter does not fit the file: {str(error).partition(chr(10))[0]}") from None


def _fits(expression: Any, schema: pa.Schema) -> bool:
    try:
        _try(expression, schema)
    except ValueError:
        return False
    return True
