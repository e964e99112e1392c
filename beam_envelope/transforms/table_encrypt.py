"""How one file of a table becomes encrypted Parquet, or Parquet with encrypted cells. Shells: tables.py."""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import pyarrow as pa
from apache_beam import typehints

from beam_envelope.errors import ContextMismatchError, FormatError
from beam_envelope.formats.keyfile import MAX_KEY_FILE_BYTES, PARQUET_CIPHER, KeyFile
from beam_envelope.formats.manifest import ManifestEntry
from beam_envelope.formats.parquet_columns import leaf_paths
from beam_envelope.formats.parquet_keys import ColumnChoice
from beam_envelope.formats.parquet_source import MAGIC
from beam_envelope.formats.parquet_writer import EncryptedParquetWriter
from beam_envelope.formats.record import RecordEncryptor
from beam_envelope.formats.table import Counts, Layout, encrypt_columns
from beam_envelope.io.manifest import WrittenShard
from beam_envelope.io.options import Settings
from beam_envelope.io.parquet_bundle import BundleKeys, CountingOutput
from beam_envelope.io.store import key_file_path, read_small, split_path, store_of
from beam_envelope.io.table_parquet import ParquetSource, PlainParquetWriter
from beam_envelope.io.table_source import (
    TextTypes,
    cut,
)
from beam_envelope.keys.choice import KeyChoice, Opened, PathFields, Values
from beam_envelope.keys.provider import DataKey
from beam_envelope.transforms.elements import WriteKeys
from beam_envelope.transforms.file_work import FileDoFn
from beam_envelope.transforms.metrics import Progress
from beam_envelope.transforms.plan import IfExists, Task
from beam_envelope.transforms.table_plan import EncryptedTable, Form, about, encrypted_columns, open_table

Writer: TypeAlias = "EncryptedParquetWriter | PlainParquetWriter"


class EncryptDoFn(FileDoFn):
    """Encrypts files, one after another; subclasses say how."""

    label = "Encrypt"

    def __init__(self, types: TextTypes, form: Form, if_exists: IfExists, fields: PathFields) -> None:
        """Hold configuration only."""
        self._types, self._form, self._if_exists, self._fields = types, form, if_exists, fields

    @abc.abstractmethod
    def sealed_schema(self, schema: pa.Schema) -> pa.Schema:
        """Return the schema of what is written. Raises ValueError, TypeError, KeyError: its columns do not go."""

    @abc.abstractmethod
    def seal(self, table: pa.Table, values: Values, progress: Progress) -> pa.Table:
        """Return what is written for a table; the values fill the templates of keys."""

    @abc.abstractmethod
    def writer(
        self, output: CountingOutput, schema: pa.Schema, options: Mapping[str, Any], n_bytes: int, values: Values
    ) -> Writer:
        """Start a file; the values fill the templates of keys."""

    @abc.abstractmethod
    def finished(self, task: Task) -> tuple[str, str] | None:
        """Return the key id and shard id of what is there, if it is whole and belongs to this dataset; else None."""

    @abc.abstractmethod
    def key_choices(self, source: str) -> tuple[KeyChoice, ...]:
        """Return the KMS keys and the context that generate data keys for a source.

        Raises:
            FormatError: its path does not say what fills a template.
        """

    def check(self, task: Task) -> None:
        """Look at the schema of a file. Raises FormatError: columns that were named do not go, or are not there."""
        with about(task.source), open_table(task.source, task.size, self._types) as source:
            self.sealed_schema(source.schema)

    def do(self, task: Task, progress: Progress) -> EncryptedTable:
        """Encrypt one file."""
        values = self._fields(task.source)
        there = store_of(task.target).size(task.target) if self._if_exists == "skip" else None
        if there is not None and (ids := self.finished(task)) is not None:
            progress.add("files_skipped")
            progress.add("bytes_skipped", task.size)
            key_id, shard_id = ids
            key_file = key_file_path(task.target) if key_id else ""
            return EncryptedTable(
                task.source, task.target, key_file, None, task.size, there, key_id, skipped=True, shard_id=shard_id
            )
        with about(task.source), open_table(task.source, task.size, self._types) as source:
            schema = self.sealed_schema(source.schema)
            tables = cut(source.groups(), self._form.row_group_rows, self._form.max_bytes(source))
            table = next(tables, None)
            options = self._form.options(source, schema)
            # A retried bundle finds what its first try wrote, so only the plan refuses what exists.
            store = store_of(task.target)
            output = CountingOutput(store.create(task.target, overwrite=True, size_hint=task.size))
            try:
                writer = self.writer(output, schema, options, task.size, values)
            except BaseException:
                output.abort()
                raise
            with writer:
                done = 0
                while table is not None:
                    rows = table.num_rows
                    writer.write_table(self.seal(table, values, progress), rows)
                    del table  # before the next one comes
                    now = source.done_bytes()
                    progress.add("rows", rows)
                    progress.add("bytes_plaintext", now - done)
                    done = now
                    table = next(tables, None)
                progress.add("bytes_plaintext", task.size - done)
        progress.add("bytes_ciphertext", output.stored_bytes)
        progress.add("files")
        sealed = writer.key_file if isinstance(writer, EncryptedParquetWriter) else None
        return EncryptedTable(
            task.source,
            task.target,
            key_file_path(task.target) if sealed else "",
            writer.num_rows,
            task.size,
            output.stored_bytes,
            sealed.data_keys[0].key_id.hex() if sealed else "",
            skipped=False,
            shard_id=sealed.shard_id.hex if sealed else "",
        )


@typehints.with_output_types(EncryptedTable)
class EncryptParquetDoFn(EncryptDoFn):
    """Writes encrypted Parquet, with a key file beside each file."""

    def __init__(
        self,
        chosen: ColumnChoice,
        types: TextTypes,
        form: Form,
        if_exists: IfExists,
        fields: PathFields,
    ) -> None:
        """Hold configuration only."""
        super().__init__(types, form, if_exists, fields)
        self._chosen = chosen
        self._column_keys, self._context = chosen.column_keys, dict(chosen.context)
        self._opened: Opened[BundleKeys] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the data keys behind: only configuration travels."""
        return {**self.__dict__, "_opened": None}

    def settings(self) -> dict[str, Any]:
        """Return the keys, the names of the columns, and the names in the context."""
        return {
            "key": ", ".join(map(str, self._column_keys.groups[0])),
            "columns": ", ".join(name for name, _ in self._column_keys.named),
            "context": ", ".join(self._context),
        }

    def start_bundle(self) -> None:
        """Get ready to ask for the data keys of the bundle: one for each group of KMS keys, over all its files."""
        self._opened = Opened(lambda values: BundleKeys(self._chosen.filled(values)), BundleKeys.close)

    def finish_bundle(self) -> None:
        """Erase them; those of the process live on."""
        if self._opened is not None:
            self._opened.close()
        self._opened = None

    def teardown(self) -> None:
        """Erase them, also after an error."""
        self.finish_bundle()

    def key_choices(self, source: str) -> tuple[KeyChoice, ...]:
        """Return one for each group of the columns' keys."""
        chosen = self._chosen.filled(self._fields(source))
        return tuple(KeyChoice(group, tuple(chosen.context.items())) for group in chosen.column_keys.groups)

    def sealed_schema(self, schema: pa.Schema) -> pa.Schema:
        """Return the same schema: only the bytes are encrypted."""
        self._column_keys.assign(leaf_paths(schema, {}))
        return schema

    def seal(self, table: pa.Table, values: Values, progress: Progress) -> pa.Table:
        """Return the same table."""
        return table

    def writer(
        self, output: CountingOutput, schema: pa.Schema, options: Mapping[str, Any], n_bytes: int, values: Values
    ) -> Writer:
        """Start a file under the bundle's data keys; its own keys are fresh."""
        data_keys: list[DataKey] = []
        try:
            keys = self._opened(values)  # type: ignore[misc]  # set by start_bundle
            data_keys.extend(source.take(n_bytes) for source in keys.sources)
            name, chosen = split_path(output.name)[1], keys.chosen
            return EncryptedParquetWriter(
                output, schema, data_keys, chosen.column_keys, chosen.context, name=name, options=options
            )
        finally:
            for data_key in data_keys:
                data_key.close()

    def listed(self, result: EncryptedTable) -> tuple[WrittenShard, Settings]:
        """Return the file; its section is under the keys of the footer."""
        entry = ManifestEntry(result.shard_id, result.ciphertext_bytes, records=result.rows)
        chosen = self._chosen.filled(self._fields(result.source))
        settings = Settings(chosen.column_keys.groups[0], chosen.context)
        return WrittenShard(result.table, entry, not result.skipped), settings

    def finished(self, task: Task) -> tuple[str, str] | None:
        """Return the ids, if there is a key file of this dataset, and the file beside it is whole."""
        try:
            raw = read_small(key_file_path(task.target), MAX_KEY_FILE_BYTES + 1)
            key_file = KeyFile.from_bytes(raw, f"the key file of {task.target}")
        except (FileNotFoundError, FormatError):
            return None
        if key_file.context != self._chosen.filled(self._fields(task.source)).context:
            msg = (
                f"{task.target} exists and belongs to another dataset: its context is {dict(key_file.context)}. "
                "Choose another output"
            )
            raise ContextMismatchError(msg)
        same = key_file.cipher == PARQUET_CIPHER and len(key_file.data_keys) == len(self._column_keys.groups)
        as_listed = task.shard_id in ("", key_file.shard_id.hex)
        if not same or not as_listed or _magic(task.target) != MAGIC:
            return None
        return key_file.data_keys[0].key_id.hex(), key_file.shard_id.hex


@typehints.with_output_types(EncryptedTable)
class EncryptCellsDoFn(EncryptDoFn):
    """Writes plain Parquet, in which the cells of some columns are encrypted."""

    def __init__(
        self,
        keys: WriteKeys,
        columns: Sequence[str],
        deterministic: Mapping[str, str],
        layout: Layout,
        types: TextTypes,
        form: Form,
        if_exists: IfExists,
        fields: PathFields,
    ) -> None:
        """Hold configuration only."""
        super().__init__(types, form, if_exists, fields)
        self._keys, self._columns = keys, tuple(columns)
        self._deterministic, self._layout = dict(deterministic), layout
        self._opened: Opened[tuple[WriteKeys, RecordEncryptor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the data keys behind: only configuration travels."""
        return {**self.__dict__, "_opened": None}

    def settings(self) -> dict[str, Any]:
        """Return the keys, the names of the columns, and the names in the context."""
        return {
            "key": ", ".join(map(str, self._keys.keys)),
            "cells": ", ".join(self._columns),
            "deterministic": ", ".join(self._deterministic),
            "keys": self._keys.store.place,
            "layout": self._layout,
            "context": ", ".join(name for name, _ in self._keys.context),
        }

    def start_bundle(self) -> None:
        """Get ready to ask for the data key of the bundle."""
        self._opened = Opened(self._open, lambda opened: self._keys.release(opened[1]))

    def _open(self, values: Values) -> tuple[WriteKeys, RecordEncryptor]:
        keys = self._keys.filled(values)
        return keys, keys.encryptor()

    def finish_bundle(self) -> None:
        """Erase it; that of the process lives on."""
        if self._opened is not None:
            self._opened.close()
        self._opened = None

    def teardown(self) -> None:
        """Erase it, also after an error."""
        self.finish_bundle()

    def key_choices(self, source: str) -> tuple[KeyChoice, ...]:
        """Return the one."""
        keys = self._keys.filled(self._fields(source))
        return (KeyChoice(keys.keys, keys.context),)

    def sealed_schema(self, schema: pa.Schema) -> pa.Schema:
        """Return the schema with binary columns for those that are encrypted."""
        encryptor = replace(self._keys, policy=None).encryptor()  # an empty table needs no key
        sealed = encrypt_columns(
            schema.empty_table(), self._columns, encryptor, deterministic=self._deterministic, layout=self._layout
        )
        return sealed.schema

    def seal(self, table: pa.Table, values: Values, progress: Progress) -> pa.Table:
        """Return the table with encrypted cells."""
        counts = Counts()
        keys, encryptor = self._opened(values)  # type: ignore[misc]  # set by start_bundle
        sealed = encrypt_columns(
            table,
            self._columns,
            encryptor,
            deterministic=self._deterministic,
            dataset_key=keys.deterministic() if self._deterministic else None,
            layout=self._layout,
            policy=self._keys.policy,
            counts=counts,
        )
        progress.add("cells_encrypted", counts.of["cells_encrypted"])
        return sealed

    def writer(
        self, output: CountingOutput, schema: pa.Schema, options: Mapping[str, Any], n_bytes: int, values: Values
    ) -> Writer:
        """Start a plain file."""
        return PlainParquetWriter(output, schema, options)

    def finished(self, task: Task) -> tuple[str, str] | None:
        """Return empty ids, if a whole file is there in which these columns are encrypted."""
        size = store_of(task.target).size(task.target) or 0
        try:
            with ParquetSource(task.target, size) as found:
                return ("", "") if set(self._columns) <= set(encrypted_columns(found.schema)) else None
        except FormatError:
            return None


def _magic(path: str) -> bytes:
    """Return the last bytes of a file, if they are a Parquet file's."""
    with store_of(path).open(path) as stream:
        if stream.seek(0, os.SEEK_END) < len(MAGIC):
            return b""
        stream.seek(-len(MAGIC), os.SEEK_END)
        return stream.read(len(MAGIC))
