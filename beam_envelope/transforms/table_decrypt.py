"""How one file of encrypted Parquet, or of Parquet with encrypted cells, becomes plain Parquet. Shells: tables.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import pyarrow as pa
from apache_beam import typehints

from beam_envelope.errors import FormatError, NotEncryptedError
from beam_envelope.formats.parquet_reader import EncryptedParquetReader, OnDenied
from beam_envelope.formats.record import RecordDecryptor
from beam_envelope.formats.table import Counts, decrypt_columns
from beam_envelope.io.parquet_bundle import CountingOutput
from beam_envelope.io.parquet_read import open_parquet_at
from beam_envelope.io.store import store_of
from beam_envelope.io.table_parquet import ParquetSource, PlainParquetWriter
from beam_envelope.io.table_source import (
    MAX_GROUP_BYTES,
    batch_rows,
    cut,
)
from beam_envelope.keys.choice import KeyChoice, PathFields
from beam_envelope.keys.context import AnyContext
from beam_envelope.transforms.elements import ReadKeys
from beam_envelope.transforms.file_work import FileDoFn
from beam_envelope.transforms.metrics import Progress
from beam_envelope.transforms.plan import IfExists, Task
from beam_envelope.transforms.table_plan import DEFAULT_CODEC, DecryptedTable, Form, about, encrypted_columns

Options: TypeAlias = "Callable[[pa.Schema], Mapping[str, Any]]"


class DecryptDoFn(FileDoFn):
    """Decrypts files, one after another; subclasses say how."""

    label = "Decrypt"

    def __init__(self, form: Form, if_exists: IfExists) -> None:
        """Hold configuration only."""
        self._form, self._if_exists = form, if_exists

    def write(
        self, task: Task, tables: Iterator[pa.Table], schema: pa.Schema | None, options: Options, key_id: str,
        progress: Progress,
    ) -> DecryptedTable:  # fmt: skip
        """Write tables as a plain file, of a schema or of that of the first of them."""
        table = next(tables, None)
        found = schema if table is None else table.schema
        output = CountingOutput(store_of(task.target).create(task.target, overwrite=True, size_hint=task.size))
        try:
            writer = PlainParquetWriter(output, found, options(found))
        except BaseException:
            output.abort()
            raise
        with writer:
            done = 0
            while table is not None:
                rows = table.num_rows
                writer.write_table(table, rows)
                del table
                progress.add("rows", rows)
                progress.add("bytes_plaintext", output.stored_bytes - done)
                done = output.stored_bytes
                table = next(tables, None)
        progress.add("bytes_plaintext", output.stored_bytes - done)
        progress.add("bytes_ciphertext", task.size)
        progress.add("files")
        return DecryptedTable(
            task.source, task.target, writer.num_rows, output.stored_bytes, task.size, key_id, skipped=False
        )

    def skipped(self, task: Task, rows: int, key_id: str, progress: Progress) -> DecryptedTable | None:
        """Return what is there, if it is a whole file of so many rows and may be kept."""
        there = store_of(task.target).size(task.target) if self._if_exists == "skip" else None
        if there is None:
            return None
        try:
            with ParquetSource(task.target, there) as found:
                if found.num_rows != rows:
                    return None
        except FormatError:
            return None
        progress.add("files_skipped")
        progress.add("bytes_skipped", task.size)
        return DecryptedTable(task.source, task.target, None, there, task.size, key_id, skipped=True)


@typehints.with_output_types(DecryptedTable)
class DecryptParquetDoFn(DecryptDoFn):
    """Reads encrypted Parquet."""

    def __init__(
        self,
        choice: KeyChoice,
        fields: PathFields,
        columns: Sequence[str] | None,
        on_denied: OnDenied,
        form: Form,
        if_exists: IfExists,
    ) -> None:
        """Hold configuration only."""
        super().__init__(form, if_exists)
        self._choice, self._fields, self._on_denied = choice, fields, on_denied
        self._columns = None if columns is None else list(columns)

    def settings(self) -> dict[str, Any]:
        """Return the keys, the names of the columns, and the names in the context."""
        context = self._choice.pairs
        names = "any" if isinstance(context, AnyContext) else ", ".join(context)
        columns = "all" if self._columns is None else ", ".join(self._columns)
        keys = ", ".join(map(str, self._choice.keys))
        return {"key": keys, "context": names, "columns": columns, "on_denied": self._on_denied}

    def check(self, task: Task) -> None:
        """Open a file, and ask for its columns."""
        with about(task.source), self._open(task) as reader:
            reader.iter_batches(row_groups=[], columns=self._columns)

    def do(self, task: Task, progress: Progress) -> DecryptedTable:
        """Decrypt one file."""
        with about(task.source), self._open(task) as reader:
            key_id = reader.key_file.data_keys[0].key_id.hex()
            if (kept := self.skipped(task, reader.num_rows, key_id, progress)) is not None:
                return kept
            rows = batch_rows(4 * task.size, reader.num_rows)  # Parquet is about a quarter of what it is in memory
            groups = (
                reader.iter_batches(row_groups=[number], columns=self._columns, batch_size=rows)
                for number in range(reader.num_row_groups)
            )
            tables = cut(groups, self._form.row_group_rows, MAX_GROUP_BYTES)
            schema = None if reader.num_rows else reader.read(self._columns).schema
            options = {
                "compression": self._form.compression or DEFAULT_CODEC
            }  # a reader does not tell that of the file
            return self.write(task, tables, schema, lambda _: options, key_id, progress)

    def _open(self, task: Task) -> EncryptedParquetReader:
        choice = self._choice.filled(self._fields(task.source))
        return open_parquet_at(
            task.source, choice.keys, choice.pairs, on_denied=self._on_denied, shard_id=task.shard_id
        )


@typehints.with_output_types(DecryptedTable)
class DecryptCellsDoFn(DecryptDoFn):
    """Reads plain Parquet with encrypted cells in it."""

    def __init__(
        self,
        keys: ReadKeys,
        columns: Sequence[str] | None,
        scopes: Mapping[str, str],
        form: Form,
        if_exists: IfExists,
        fields: PathFields,
    ) -> None:
        """Hold configuration only."""
        super().__init__(form, if_exists)
        self._keys, self._scopes, self._fields = keys, dict(scopes), fields
        self._columns = None if columns is None else tuple(columns)

    def settings(self) -> dict[str, Any]:
        """Return the keys, the names of the columns, and the names in the context."""
        context = self._keys.context
        return {
            "key": ", ".join(map(str, self._keys.keys)),
            "cells": "all" if self._columns is None else ", ".join(self._columns),
            "keys": self._keys.store.place,
            "context": "any" if isinstance(context, AnyContext) else ", ".join(name for name, _ in context),
        }

    def check(self, task: Task) -> None:
        """Decrypt the first rows of a file."""
        with about(task.source), ParquetSource(task.source, task.size) as source:
            columns = self._columns_of(source)
            for group in source.groups():
                for batch in group:
                    self._open(pa.Table.from_batches([batch.slice(0, 1)]), columns, self._decryptor(task))
                    return

    def do(self, task: Task, progress: Progress) -> DecryptedTable:
        """Decrypt one file."""
        with about(task.source), ParquetSource(task.source, task.size) as source:
            if (kept := self.skipped(task, source.num_rows, "", progress)) is not None:
                return kept
            columns, decryptor = self._columns_of(source), self._decryptor(task)
            counts = Counts()
            sealed = cut(source.groups(), self._form.row_group_rows, MAX_GROUP_BYTES)
            tables = (self._open(table, columns, decryptor, counts) for table in sealed)
            empty = None if source.num_rows else self._open(source.schema.empty_table(), columns, decryptor)
            schema = None if empty is None else empty.schema
            result = self.write(task, tables, schema, partial(self._form.options, source), "", progress)
            progress.add("cells_decrypted", counts.of["cells_decrypted"])
            return result

    def _decryptor(self, task: Task) -> RecordDecryptor:
        return self._keys.filled(self._fields(task.source)).decryptor()

    def _columns_of(self, source: ParquetSource) -> Sequence[str]:
        columns = encrypted_columns(source.schema) if self._columns is None else self._columns
        if not columns:
            raise NotEncryptedError(
                f"{source.path} has no encrypted cells that say so in their metadata. If other software dropped the "
                "metadata, name the columns (--columns, columns=)"
            )
        return columns

    def _open(
        self, table: pa.Table, columns: Sequence[str], decryptor: RecordDecryptor, counts: Counts | None = None
    ) -> pa.Table:
        return decrypt_columns(table, columns, decryptor, deterministic=self._scopes, counts=counts)
