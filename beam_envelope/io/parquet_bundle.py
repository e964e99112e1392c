"""What a bundle writes: encrypted Parquet files of limited size, one open at a time for each window. No DoFn is here.

Files are written below a temporary folder, under names that no other try has; parquet_write.py moves them.
"""

from __future__ import annotations

import io
import uuid
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import pyarrow as pa

from beam_envelope.errors import FormatError
from beam_envelope.formats.output import Buffer, Output, StreamOutput
from beam_envelope.formats.parquet_keys import ColumnChoice
from beam_envelope.formats.parquet_writer import EncryptedParquetWriter
from beam_envelope.formats.row_groups import groups
from beam_envelope.formats.shard import open_sealed
from beam_envelope.formats.shard_writer import ShardWriter
from beam_envelope.io.parquet_rows import TableMaker
from beam_envelope.io.store import key_file_path, store_of
from beam_envelope.keys.cache import DataKeySource, shared_source
from beam_envelope.keys.choice import ElementFields, Opened, Values
from beam_envelope.keys.provider import DataKey, KeyProvider
from beam_envelope.transforms.metrics import Progress
from beam_envelope.transforms.row_types import register_rows


class EncryptedParquetFile(NamedTuple):
    """What WriteEncryptedParquet says of each file.

    Attributes:
        path: the file.
        key_file: its key file, beside it.
        shard_id: the id in its key file, in hexadecimal.
        rows: how many rows it has.
        stored_bytes: how many bytes it has.
        window: the window of its rows, as `start/end`; empty for the global window.
        key_fields: what its rows have in common that filled the templates of keys, in their order.
    """

    path: str
    key_file: str
    shard_id: str
    rows: int
    stored_bytes: int
    window: str
    key_fields: Sequence[str] = ()


register_rows(EncryptedParquetFile)


@dataclass(frozen=True)
class Limits:
    """How large row groups and files become. All are above 0.

    Attributes:
        row_group_rows: the most rows in a row group.
        row_group_bytes: a row group ends when its rows have so many bytes in memory.
        max_rows_per_file: the most rows in a file.
        max_bytes_per_file: a file ends with the row group that brings it to so many bytes.
    """

    row_group_rows: int
    row_group_bytes: int
    max_rows_per_file: int | None
    max_bytes_per_file: int | None

    def __post_init__(self) -> None:
        """Check them."""
        for name, value in vars(self).items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} is above 0, not {value}")


@dataclass(frozen=True)
class FileSettings(ColumnChoice):
    """How files are written. Configuration only, so it travels.

    Attributes:
        schema: of the files; None: of the first table.
        limits: their size.
        suffix: the end of their names.
        options: for pyarrow's writer.
    """

    schema: pa.Schema | None
    limits: Limits
    suffix: str
    options: Mapping[str, Any]


MAX_OPEN_FILES: Final = 100
"""How many files a window of a bundle holds open at most, where templates choose keys; then the oldest is finished."""
_NO_FIELDS: Final = ElementFields(())


class BundleKeys:
    """The data keys of a bundle: one for each set of KMS keys, over all its files; or those of the process.

    Attributes:
        chosen: the KMS keys and the context.
        sources: of the data keys.
    """

    def __init__(self, chosen: ColumnChoice) -> None:
        """Make no call yet."""
        self.chosen = chosen
        self._own = chosen.policy.reuse == "bundle"
        make = DataKeySource if self._own else shared_source
        self.sources = [make(group, chosen.context, chosen.policy) for group in chosen.column_keys.groups]

    def take(self, count: int | None = None) -> list[DataKey]:
        """Return copies of the data keys, or of the first of them; the taker closes them.

        Raises:
            KeyAccessError, KmsUnavailableError: from the KMS, when new keys are due.
        """
        taken: list[DataKey] = []
        try:
            with Progress():  # counts the calls; no longer, since other steps of the thread count theirs
                taken.extend(source.take() for source in self.sources[:count])
        except BaseException:
            _close(taken)
            raise
        return taken

    def close(self) -> None:
        """Erase the keys of a bundle; those of the process live on."""
        if self._own:
            _close(self.sources)


class BundleWriter:
    """Writes what a bundle gets, window by window, below a folder.

    Attributes:
        counts: what was done, by the name of the metric.
    """

    def __init__(self, settings: FileSettings, folder: str, fields: ElementFields = _NO_FIELDS) -> None:
        self._settings, self._folder, self._fields = settings, folder, fields
        self._keys: Opened[tuple[FileSettings, BundleKeys]] = Opened(self._open, lambda opened: opened[1].close())
        self._windows: dict[Any, OrderedDict[Values, _WindowWriter]] = {}
        self.counts: Counter[str] = Counter()

    def add(self, window: Any, name: str, element: Any) -> Iterator[EncryptedParquetFile]:
        """Write an element of a window; yield the files that are full.

        Raises:
            ValueError, TypeError: the element does not fit.
            KeyAccessError, KmsUnavailableError, OSError: from the KMS, or from the store.
        """
        writers = self._windows.setdefault(window, OrderedDict())
        for values, part in self._parts(element):
            if values not in writers:
                if len(writers) >= MAX_OPEN_FILES:
                    oldest, writer = writers.popitem(last=False)
                    yield from _of(oldest, writer.finish())
                settings, keys = self._keys(values)
                writers[values] = _WindowWriter(settings, self._folder, keys, name, self.counts)
            writers.move_to_end(values)
            yield from _of(values, writers[values].add(part))

    def finish_window(self, window: Any) -> Iterator[EncryptedParquetFile]:
        """Finish the file of a window, if there is one. Raises as `add`."""
        for values, writer in self._windows.pop(window, {}).items():
            yield from _of(values, writer.finish())

    def finish(self) -> Iterator[tuple[Any, EncryptedParquetFile]]:
        """Finish all files; yield each with its window. Raises as `add`."""
        for window, writers in self._windows.items():
            for values, writer in writers.items():
                for file in _of(values, writer.finish()):
                    yield window, file
        self._windows.clear()
        self._keys.close()

    def abort(self) -> None:
        """Drop what is unfinished, and the keys. May be called again, and after `finish`."""
        for writers in self._windows.values():
            for writer in writers.values():
                writer.abort()
        self._windows.clear()
        self._keys.close()

    def _open(self, values: Values) -> tuple[FileSettings, BundleKeys]:
        settings = self._settings.filled(values)
        return settings, BundleKeys(settings)

    def _parts(self, element: Any) -> Iterator[tuple[Values, Any]]:
        """Yield what of an element goes under which keys. Raises FormatError: it does not say."""
        if self._fields.names and isinstance(element, (pa.Table, pa.RecordBatch)):
            table = element if isinstance(element, pa.Table) else pa.Table.from_batches([element])
            if self._fields.by_function:
                raise FormatError("key_fields= is of rows; the keys of a table are chosen by its columns. Leave it out")
            if table.num_rows:
                yield from groups(table, self._fields.names)
        else:
            yield self._fields(element), element


def _of(values: Values, files: Iterable[EncryptedParquetFile]) -> Iterator[EncryptedParquetFile]:
    return (file._replace(key_fields=values) for file in files)


class _WindowWriter:
    """Gathers the rows of one window into row groups, and those into one file after another."""

    def __init__(
        self, settings: FileSettings, folder: str, keys: BundleKeys, window: str, counts: Counter[str]
    ) -> None:
        self._settings, self._folder, self._keys, self._window = settings, folder, keys, window
        self._counts = counts
        self._maker = TableMaker(settings.schema)
        self._pending: list[pa.Table] = []
        self._pending_rows = self._pending_bytes = 0
        self._file: OpenFile | None = None

    def add(self, element: Any) -> Iterator[EncryptedParquetFile]:
        for table in self._maker.add(element):
            yield from self._add_table(table)

    def finish(self) -> Iterator[EncryptedParquetFile]:
        for table in self._maker.flush():
            yield from self._add_table(table)
        if self._pending:
            self._write_row_group()
        if self._file is not None:
            yield self._close_file()

    def abort(self) -> None:
        self._pending.clear()
        if self._file is not None:
            self._file.abort()

    def _add_table(self, table: pa.Table) -> Iterator[EncryptedParquetFile]:
        limits = self._settings.limits
        while table.num_rows:
            count = self._room(table)
            piece, table = table.slice(0, count), table.slice(count)
            self._pending.append(piece)
            self._pending_rows += count
            self._pending_bytes += piece.nbytes
            rows = self._pending_rows + (0 if self._file is None else self._file.rows)
            file_is_full = rows == limits.max_rows_per_file
            if (
                file_is_full
                or self._pending_rows == limits.row_group_rows
                or self._pending_bytes >= limits.row_group_bytes
            ):
                file = self._write_row_group()
                if file_is_full or file.stored_bytes >= (limits.max_bytes_per_file or float("inf")):
                    yield self._close_file()

    def _room(self, table: pa.Table) -> int:
        """Return how many rows of a table go into the row group that is gathered: one or more."""
        limits = self._settings.limits
        rows = limits.row_group_rows - self._pending_rows
        if limits.max_rows_per_file is not None:
            written = 0 if self._file is None else self._file.rows
            rows = min(rows, limits.max_rows_per_file - written - self._pending_rows)
        by_size = (limits.row_group_bytes - self._pending_bytes) * table.num_rows // max(1, table.nbytes)
        return min(rows, max(1, by_size), table.num_rows)

    def _write_row_group(self) -> OpenFile:
        if self._file is None:
            self._file = OpenFile(self._settings, self._folder, self._keys, self._pending[0].schema)
        table = pa.concat_tables(self._pending)
        self._counts["bytes_plaintext"] += self._pending_bytes
        self._pending.clear()
        self._pending_rows = self._pending_bytes = 0
        self._file.write(table)
        return self._file

    def _close_file(self) -> EncryptedParquetFile:
        written = self._file.close(self._window)  # type: ignore[union-attr]  # called where there is one
        self._file = None
        self._counts["rows_encrypted"] += written.rows
        self._counts["bytes_ciphertext"] += written.stored_bytes
        self._counts["files"] += 1
        return written


class OpenFile:
    """A file of a bundle, under a name of its own below the folder."""

    def __init__(self, settings: FileSettings, folder: str, keys: BundleKeys, schema: pa.Schema) -> None:
        """Start it. Raises as `BundleWriter.add`."""
        self._path = f"{folder}{uuid.uuid4().hex}{settings.suffix}"
        size_hint = settings.limits.max_bytes_per_file or 0
        data_keys = keys.take()
        try:
            self._output = CountingOutput(store_of(self._path).create(self._path, overwrite=True, size_hint=size_hint))
            try:
                # The file is renamed, so its name is not one of the things that its key file binds.
                self._writer = EncryptedParquetWriter(
                    self._output,
                    schema,
                    data_keys,
                    settings.column_keys,
                    settings.context,
                    name="",
                    options=settings.options,
                )
            except BaseException:
                self._output.abort()
                raise
        finally:
            _close(data_keys)

    @property
    def rows(self) -> int:
        """How many rows were written."""
        return self._writer.num_rows

    @property
    def stored_bytes(self) -> int:
        """How many bytes were passed on."""
        return self._output.stored_bytes

    def write(self, table: pa.Table) -> None:
        """Write a table as one row group. Raises as `BundleWriter.add`."""
        self._writer.write_table(table, row_group_size=table.num_rows)

    def close(self, window: str) -> EncryptedParquetFile:
        """Finish it. Raises as `BundleWriter.add`."""
        self._writer.close()
        shard_id = self._writer.key_file.shard_id.hex
        return EncryptedParquetFile(
            self._path, key_file_path(self._path), shard_id, self.rows, self.stored_bytes, window
        )

    def abort(self) -> None:
        """Drop it."""
        self._writer.abort()


class CountingOutput:
    """An output that counts its bytes. See `formats.output.Output`."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self.name = output.name
        self.stored_bytes = 0

    def begin(self, key_file: bytes) -> None:
        """Pass it on."""
        self._output.begin(key_file)

    def write(self, data: Buffer) -> None:
        """Count, and pass on."""
        self._output.write(data)
        self.stored_bytes += memoryview(data).nbytes

    def commit(self) -> None:
        """Pass it on."""
        self._output.commit()

    def abort(self) -> None:
        """Pass it on."""
        self._output.abort()


def seal(table: pa.Table, data_key: DataKey, context: Mapping[str, str]) -> tuple[bytes, bytes]:
    """Return a table as a shard in memory, for a runner's shuffle: its key file and its bytes."""
    arrow = pa.BufferOutputStream()
    with pa.ipc.new_stream(arrow, table.schema) as stream:
        stream.write_table(table)
    sealed, key_files = io.BytesIO(), list[bytes]()
    output = StreamOutput(sealed, key_files.append)
    with ShardWriter(output, data_key, context, compression="none", name="") as shard:
        shard.write(memoryview(arrow.getvalue()).cast("B"))
    return key_files[0], sealed.getvalue()


def unseal(sealed: tuple[bytes, bytes], keys: Sequence[KeyProvider], context: Mapping[str, str]) -> pa.Table:
    """Return the table that `seal` was given.

    Raises:
        KeyAccessError, KmsUnavailableError: from the KMS.
        TamperedError, TruncatedError, FormatError: it was changed.
    """
    key_file, data = sealed
    with open_sealed(io.BytesIO(data), key_file, keys, context, "what was grouped for a file", own=True) as shard:
        return pa.ipc.open_stream(shard.read()).read_all()


def _close(keys: Sequence[DataKey | DataKeySource]) -> None:
    for key in keys:
        key.close()
