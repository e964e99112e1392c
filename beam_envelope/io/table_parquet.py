"""Plain Parquet files on any Beam filesystem: read row group by row group, and written whole or not at all."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from beam_envelope.errors import AlreadyEncryptedError, FormatError
from beam_envelope.formats.output import Buffer, Output
from beam_envelope.formats.parquet_source import MAGIC
from beam_envelope.io.table_source import TableSource, batch_rows

_GATHER_BYTES: Final = 1 << 18
_DEFAULT_CODEC: Final = "SNAPPY"
_CODEC_NAMES: Final = {"UNCOMPRESSED": "NONE", "LZ4_RAW": "LZ4"}
_SPARK: Final = b"org.apache.spark.version"


class ParquetSource(TableSource):
    """A plain Parquet file."""

    def _open(self) -> None:
        self._read_rows = 0
        with self.named_errors():
            self._bytes.native.seek(0)
            if self._bytes.native.read(len(MAGIC)) == MAGIC:
                msg = (
                    f"{self.path} is encrypted Parquet already. Leave it out of the input pattern, or decrypt it first"
                )
                raise AlreadyEncryptedError(msg)
            self._bytes.native.seek(0)
            # Without pre_buffer and threads, none of pyarrow's threads calls back into Python.
            self._file = pq.ParquetFile(self._bytes.native, pre_buffer=False)
            self._metadata = self._file.metadata
            if _SPARK in (self._metadata.metadata or {}):
                # Spark's INT96 counts microseconds; as nanoseconds, years before 1678 or after 2261 would wrap around.
                options = {"metadata": self._metadata, "pre_buffer": False, "coerce_int96_timestamp_unit": "us"}
                self._file = pq.ParquetFile(self._bytes.native, **options)
            self.schema = self._file.schema_arrow

    def explain(self, message: str) -> str:
        """Say that it is no Parquet file, or not a whole one."""
        return f" is no Parquet file that pyarrow can read: {super().explain(message).partition(': ')[2]}"

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return int(self._metadata.num_rows)

    def groups(self) -> Iterator[Iterator[pa.RecordBatch]]:
        """Yield the row groups."""
        for number in range(self._metadata.num_row_groups):
            yield self._batches(number)

    def _batches(self, number: int) -> Iterator[pa.RecordBatch]:
        group = self._metadata.row_group(number)
        rows = batch_rows(group.total_byte_size, group.num_rows)
        batches: Any = None
        while True:
            with self.named_errors():
                if batches is None:
                    batches = self._file.iter_batches(rows, row_groups=[number], use_threads=False)
                batch = next(batches, None)
            if batch is None:
                return
            self._read_rows += batch.num_rows
            # Of a batch without columns pyarrow forgets the metadata.
            yield (
                batch
                if batch.schema.metadata == self.schema.metadata
                else batch.replace_schema_metadata(self.schema.metadata)
            )

    def done_bytes(self) -> int:
        """Return the share of the rows that were read, in bytes of the file."""
        return self.size * self._read_rows // max(1, self._metadata.num_rows)

    def compression(self) -> str | list[str]:
        """Return the codecs of the first row group.

        Where columns are encrypted by other software, looking at their metadata would abort the process; by then,
        though, reading them has failed.
        """
        if not self._metadata.num_rows:
            return _DEFAULT_CODEC
        group = self._metadata.row_group(0)
        codecs = [group.column(number).compression for number in range(group.num_columns)]
        return [_CODEC_NAMES.get(codec, codec) for codec in codecs]


class PlainParquetWriter:
    """Writes tables as a plain Parquet file, which is there when `close` returns, or not at all.

    Attributes:
        num_rows: how many rows were written.
    """

    def __init__(self, output: Output, schema: pa.Schema, options: Mapping[str, Any]) -> None:
        """Start the file. Raises FormatError: there is no Parquet of this schema."""
        self._output: Output | None = output
        self._name = output.name
        self._sink = _Sink(output)
        self.num_rows = 0
        try:
            self._writer: Any = pq.ParquetWriter(self._sink, schema, **options)
        except (pa.ArrowException, OSError) as error:
            raise FormatError(f"{self._name} cannot be Parquet: {str(error).partition(':')[0]}") from None

    def write_table(self, table: pa.Table, row_group_size: int | None = None) -> None:
        """Write a table as row groups of so many rows. Raises FormatError, OSError."""
        try:
            self._writer.write_table(table, row_group_size=row_group_size)
        except (pa.ArrowException, ValueError) as error:
            raise FormatError(f"pyarrow cannot write {self._name}: {_reason(error)}") from None
        self.num_rows += table.num_rows

    def close(self) -> None:
        """Finish the file. Raises OSError, EnvelopeError; nothing is left then."""
        output = self._output
        if output is None:
            return
        try:
            self._writer.close()
            self._sink.finish()
            output.commit()
        except BaseException:
            self.abort()
            raise
        self._output = None

    def abort(self) -> None:
        """Drop the file. May be called again."""
        output, self._output = self._output, None
        if output is None:
            return
        self._sink.drop()
        with contextlib.suppress(Exception):
            self._writer.close()  # or it would when it is garbage collected; what it writes goes nowhere
        output.abort()

    def __enter__(self) -> PlainParquetWriter:
        """Return the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close after success, abort after an exception."""
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        """Abort what nobody finished."""
        if getattr(self, "_output", None) is not None and not sys.is_finalizing():
            self.abort()


class _Sink:
    """The file that pyarrow writes to: gathers small pieces, until it is told to drop them."""

    closed = False

    def __init__(self, output: Output) -> None:
        self._output: Output | None = output
        self._small = bytearray()

    def write(self, data: Buffer) -> int:
        with memoryview(data) as view:
            if self._output is not None:
                self._small += view.cast("B")
                if len(self._small) >= _GATHER_BYTES:
                    self.finish()
            return view.nbytes

    def finish(self) -> None:
        small, self._small = self._small, bytearray()
        if self._output is not None and small:
            self._output.write(small)

    def drop(self) -> None:
        self._output = None
        self._small = bytearray()

    def flush(self) -> None:
        """Do nothing: `finish` does it."""

    def close(self) -> None:
        """Do nothing: the output is committed, or it is not."""

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True


def _reason(error: Exception) -> str:
    """Return the start of a message of pyarrow's: what follows the colon may be a value."""
    return str(error).partition(":")[0].partition("\n")[0]
