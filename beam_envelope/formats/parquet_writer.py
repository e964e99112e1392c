"""The writing side of an encrypted Parquet file. Bytes: docs/format.md, 10."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe

from beam_envelope.errors import EnvelopeError
from beam_envelope.formats.keyfile import PARQUET_CIPHER, KeyFile, WrappedDataKey
from beam_envelope.formats.output import Buffer, Output
from beam_envelope.formats.parquet_columns import leaf_paths
from beam_envelope.formats.parquet_interop import WrappingClient, master_key_names
from beam_envelope.formats.parquet_keys import (
    COLUMNS_ENTRY,
    ColumnKeys,
    LocalClient,
    encode_columns,
    is_uniform,
    key_name,
)
from beam_envelope.keys.provider import DataKey

_GATHER_BYTES: Final = 1 << 18
_DEK_BITS: Final = 256
_LOG: Final = logging.getLogger(__name__)


class EncryptedParquetWriter:
    """Writes Arrow tables and batches into an encrypted Parquet file. Made by `create_parquet`.

    Only an explicit, successful `close` (or the end of a `with` block) finishes the file. An exception in the block, a
    `close` while an exception is being handled, and garbage collection abort it and leave nothing.

    Attributes:
        name: the file.
        schema: the schema of what is written.
        num_rows: how many rows were written.
    """

    def __init__(
        self,
        output: Output,
        schema: pa.Schema,
        data_keys: Sequence[DataKey],
        column_keys: ColumnKeys,
        context: Mapping[str, str],
        *,
        name: str,
        options: Mapping[str, Any],
        interop: bool = False,
    ) -> None:
        """Start the file; `data_keys`, one for each of `column_keys.groups`, may be closed afterwards.

        With `interop` there are none: the KMS is asked here, once for each group, and there is no key file.

        Raises:
            KeyAccessError, KmsUnavailableError: from the KMS, with `interop`.
            ValueError, TypeError: the schema, the columns or an option do not go.
            OSError: from the output.
        """
        self._output: Output | None = None  # until nothing here can fail before the caller has this writer
        self._assigned = column_keys.assign(leaf_paths(schema, options))
        self._groups = column_keys.groups
        self.name = output.name
        self.schema = schema
        self.num_rows = 0
        self._key_file: KeyFile | None = None
        self._broken = False
        self._pid = os.getpid()
        self._handled_at_start = sys.exc_info()[1]
        # pyarrow may use a factory for as long as the file is open, but does not keep it.
        if interop:
            self._factory, properties = self._kms_properties(master_key_names(column_keys, context))
        else:
            forms = tuple(map(WrappedDataKey.of, data_keys))
            self._key_file = KeyFile(forms, dict(context), cipher=PARQUET_CIPHER, name=name)
            self._factory, properties = self._local_properties(data_keys, self._key_file)
            output.begin(self._key_file.to_bytes())
        self._sink = _Sink(output)
        self._writer: Any = pq.ParquetWriter(self._sink, schema, **options, encryption_properties=properties)
        try:
            entry = None if interop else encode_columns(self._assigned)
            if entry is not None:
                self._writer.add_key_value_metadata({COLUMNS_ENTRY: entry})
        except BaseException:
            self._sink.drop()  # pyarrow's writer finishes when it is garbage collected
            raise
        self._output = output

    @property
    def key_file(self) -> KeyFile:
        """What is written beside it. Raises ValueError with `interop=True`: nothing is."""
        if self._key_file is None:
            raise ValueError(f"{self.name} is written with interop=True: its keys are in its footer, not in a key file")
        return self._key_file

    @property
    def columns(self) -> dict[str, str]:
        """For the path of each column, `plain`, or the KMS keys that it is under, as they were given."""
        return {
            leaf: "plain" if number is None else ", ".join(map(str, self._groups[number]))
            for leaf, number in self._assigned.items()
        }

    @property
    def closed(self) -> bool:
        """Whether the file is finished or dropped."""
        return self._output is None

    def write_table(self, table: pa.Table, row_group_size: int | None = None) -> None:
        """Write a table as row groups of `row_group_size` rows (pyarrow's default: 1024 * 1024).

        Raises:
            ValueError: the table has another schema, the file is closed, or an earlier write failed.
            OSError: from the output.
        """
        if self._output is None or self._broken or os.getpid() != self._pid:
            self._refuse()
        if not table.schema.equals(self.schema):
            raise ValueError(
                f"{self.name} takes tables of the schema that it was created with. It differs in: "
                f"{', '.join(_differences(table.schema, self.schema))}"
            )
        # A row group that fails midway leaves a gap.
        self._broken = True
        try:
            self._writer.write_table(table, row_group_size=row_group_size)
        except pa.ArrowException as error:
            # What follows the colon may be a value of the table.
            reason = str(error).partition(":")[0]
            raise ValueError(f"pyarrow cannot write this table to {self.name}: {reason}") from None
        self._broken = False
        self.num_rows += table.num_rows

    def write_batch(self, batch: pa.RecordBatch, row_group_size: int | None = None) -> None:
        """Write a batch. Raises as `write_table`."""
        self.write_table(pa.Table.from_batches([batch]), row_group_size)

    def write(self, table_or_batch: pa.Table | pa.RecordBatch, row_group_size: int | None = None) -> None:
        """Write a table or a batch. Raises as `write_table`."""
        if isinstance(table_or_batch, pa.RecordBatch):
            self.write_batch(table_or_batch, row_group_size)
        else:
            self.write_table(table_or_batch, row_group_size)

    def add_key_value_metadata(self, key_value_metadata: Mapping[str | bytes, str | bytes]) -> None:
        """Add entries to the metadata of the file, which is encrypted too.

        Raises:
            ValueError: an entry is one of ours, or the file is closed.
        """
        if self._output is None or os.getpid() != self._pid:
            self._refuse()
        if {COLUMNS_ENTRY, COLUMNS_ENTRY.encode()} & set(key_value_metadata):
            raise ValueError(f"{COLUMNS_ENTRY} is an entry of our own; choose another name")
        self._writer.add_key_value_metadata(dict(key_value_metadata))

    def close(self) -> None:
        """Finish the file: the key file is durable, then the file is visible.

        Raises:
            OSError: from the output; nothing is left then.
            ValueError: an earlier write failed; nothing is left then.
            EnvelopeError: another writer interfered.
        """
        output = self._output
        if output is None:
            return
        handled = sys.exc_info()[1]
        if handled is not None and handled is not self._handled_at_start:
            _LOG.warning("%s is closed while %s is handled: it is dropped", self.name, type(handled).__name__)
            self.abort()
            return
        try:
            if self._broken or os.getpid() != self._pid:
                self._refuse()
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
        if os.getpid() != self._pid:
            return  # the other process may still be writing
        with contextlib.suppress(Exception):
            self._writer.close()  # or it would when it is garbage collected; what it writes goes nowhere
        output.abort()

    def __enter__(self) -> EncryptedParquetWriter:
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
        if getattr(self, "_output", None) is not None:
            self.abort()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to pickle or copy."""
        raise TypeError("an open Parquet file cannot be pickled or copied")

    def _refuse(self) -> NoReturn:
        if self._output is None:
            raise ValueError(f"{self.name} is closed")
        if os.getpid() != self._pid:
            msg = f"{self.name} was opened before a fork; only the process that opened it may go on writing"
            raise ValueError(msg)
        raise ValueError(f"an earlier write to {self.name} failed, so it is dropped. Write it again from the start")

    def _local_properties(self, data_keys: Sequence[DataKey], key_file: KeyFile) -> tuple[pe.CryptoFactory, Any]:
        """Have pyarrow make the file's own keys, which are wrapped at once."""
        client = LocalClient(key_file.binding(), self.name)
        for place, data_key in enumerate(data_keys):
            client.add(place, data_key)
        names = [key_name(place) for place in range(len(data_keys))]
        # Double wrapping would put a key of 128 bits between those of 256.
        factory, properties = self._properties(client, names, double_wrapping=False)
        encrypted = [number for number in self._assigned.values() if number is not None]
        self._check_wrapped(client.wrapped, 1 if is_uniform(self._assigned) else 1 + len(encrypted))
        return factory, properties

    def _kms_properties(self, names: list[str]) -> tuple[pe.CryptoFactory, Any]:
        """Have pyarrow make the file's own keys, and a key for each KMS key that the KMS wraps."""
        client = WrappingClient({name: group[0] for name, group in zip(names, self._groups, strict=True)})
        factory, properties = self._properties(client, names, double_wrapping=True)
        self._check_wrapped(client.wrapped, len({0, *self._assigned.values()} - {None}))
        return factory, properties

    def _properties(
        self, client: pe.KmsClient, names: Sequence[str], *, double_wrapping: bool
    ) -> tuple[pe.CryptoFactory, Any]:
        columns: dict[str, list[str]] = {}
        for leaf, number in self._assigned.items():
            if number is not None:
                columns.setdefault(names[number], []).append(leaf)
        configuration = pe.EncryptionConfiguration(
            footer_key=names[0],
            **({"uniform_encryption": True} if is_uniform(self._assigned) else {"column_keys": columns}),
            encryption_algorithm="AES_GCM_V1",
            plaintext_footer=False,
            double_wrapping=double_wrapping,
            data_key_length_bits=_DEK_BITS,
        )
        factory = pe.CryptoFactory(lambda _: client)
        return factory, factory.file_encryption_properties(pe.KmsConnectionConfig(), configuration)

    def _check_wrapped(self, found: int, expected: int) -> None:
        """See that pyarrow understood which columns it is to encrypt."""
        if found != expected:
            msg = f"pyarrow would wrap {found} keys for {self.name} instead of {expected}"
            raise EnvelopeError(f"{msg}; nothing is written. Use another release of pyarrow")


class _Sink:
    """The file that pyarrow writes to: gathers small pieces and passes them on, until it is told to drop them."""

    closed = False

    def __init__(self, output: Output) -> None:
        self._output: Output | None = output
        self._small = bytearray()
        self._written = 0

    def write(self, data: Buffer) -> int:
        with memoryview(data) as view, view.cast("B") as octets:
            size = len(octets)
            self._written += size
            if self._output is None:
                return size
            if len(self._small) + size < _GATHER_BYTES:
                self._small += octets
                return size
            self._flush(self._output)
            self._output.write(octets)
            return size

    def tell(self) -> int:
        return self._written

    def flush(self) -> None:
        """Do nothing: `finish` does it."""

    def close(self) -> None:
        """Do nothing: the output is committed, or it is not."""

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def finish(self) -> None:
        """Pass on the rest."""
        if self._output is not None:
            self._flush(self._output)

    def drop(self) -> None:
        """Let what is still to come go nowhere."""
        self._output = None
        self._small = bytearray()

    def _flush(self, output: Output) -> None:
        small, self._small = self._small, bytearray()
        if small:
            output.write(small)


def _differences(one: pa.Schema, other: pa.Schema) -> list[str]:
    """Return the names of columns that are in one of two schemas only, or differ; or a word for what else does."""
    fields = [{field.name: field for field in schema} for schema in (one, other)]
    names = dict.fromkeys([*one.names, *other.names])
    different = [name for name in names if any(name not in own for own in fields) or fields[0][name] != fields[1][name]]
    return different or ["the order of the columns"]
