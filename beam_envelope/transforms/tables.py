"""EncryptTables and DecryptTables: whole datasets of Parquet, CSV and JSON lines, column by column, file by file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, cast

from apache_beam import typehints

from beam_envelope.formats.dataset_key import DATASET_KEY
from beam_envelope.formats.keyfile import MAX_KEY_FILE_BYTES, PARQUET_CIPHER, RAW_CELL_CIPHER, RECORD_CIPHER, KeyFile
from beam_envelope.formats.keystore import KeyStore
from beam_envelope.formats.parquet_keys import ColumnChoice, ColumnKeys
from beam_envelope.formats.parquet_reader import OnDenied
from beam_envelope.formats.table import Layout
from beam_envelope.io.manifest_reader import ManifestMode, ManifestReader, checked_mode
from beam_envelope.io.store import key_file_path, read_small
from beam_envelope.io.table_source import CsvTypes, TextTypes
from beam_envelope.keys.cache import DataKeyPolicy
from beam_envelope.keys.choice import KeyChoice, PathFields
from beam_envelope.keys.context import AnyContext
from beam_envelope.keys.uri import Key
from beam_envelope.settings import chosen_keys, read_choice, written_context
from beam_envelope.transforms.elements import read_keys, write_keys
from beam_envelope.transforms.file_work import FileDoFn, FilesTransform
from beam_envelope.transforms.files import DecryptFiles, ShardReaderDoFn
from beam_envelope.transforms.metrics import Progress
from beam_envelope.transforms.plan import DecryptPlan, IfExists, Task, as_folder, checked_if_exists
from beam_envelope.transforms.table_decrypt import DecryptCellsDoFn, DecryptDoFn, DecryptParquetDoFn
from beam_envelope.transforms.table_encrypt import EncryptCellsDoFn, EncryptDoFn, EncryptParquetDoFn
from beam_envelope.transforms.table_plan import Form, TablesPlan

Columns: TypeAlias = "Mapping[str, Key | Sequence[Key] | None] | Iterable[str]"
Codec: TypeAlias = Literal["none", "snappy", "zstd", "gzip", "lz4", "brotli"]

CODECS: Final = ("none", "snappy", "zstd", "gzip", "lz4", "brotli")


class EncryptTables(FilesTransform):
    """Encrypts the files of a tabular dataset: each becomes encrypted Parquet below `output`, with its key file.

    Input: file patterns, paths, folders or Beam's `FileMetadata`, of Parquet (`.parquet`), CSV (`.csv`, `.tsv`) and
    JSON lines (`.jsonl`, `.ndjson`, `.json`), text also packed (`.gz`, `.bz2`, `.zst`). Paths are kept relative to the
    fixed part of their pattern, and partition folders with them; `part.csv.gz` becomes `part.parquet`. Files and
    folders whose names begin with `_` or a dot are passed over. Rows, types and metadata stay as they are. Output: an
    `EncryptedTable` for each file.

    Args:
        output: the folder, on any Beam filesystem.
        key: the KMS key, as URI or provider, or several, any one of which opens the files: for the footer, and for all
            columns that have no key of their own.
        columns: KMS keys of columns: the name of a column (`ssn`) or the path of what is in one (`address.zip`), and
            its key or keys; None: as `key`. With `cells`: the names of the columns to encrypt.
        context: the encryption context, which a reader has to give again. Nothing secret.
        cells: write plain Parquet and encrypt each value of `columns` on its own, as `EncryptColumns` does, for engines
            that know no encrypted Parquet.
        keys: with `cells`: the key store, a folder that all readers can read.
        deterministic: with `cells`: which of `columns` are encrypted such that equal values stay equal; or a mapping of
            those to scopes, within which they do.
        layout: with `cells`: `compact`, or `raw` for the decrypting functions of SQL engines.
        csv_types: the types of CSV columns: `text` for all, or `inferred` from the first 4 MiB of each file, alone.
        column_types: Arrow types of columns of CSV and JSON lines, by name: `{"age": "int64"}`.
        row_group_rows: how many rows a row group has. Default: row groups of Parquet input are kept, unless they are
            larger than 256 MiB in memory; of text they have 64 MiB.
        compression: the codec of all columns. Default: those of Parquet input are kept; text gets snappy.
        if_exists: what to do when an output exists: "error", "skip" it if it is whole, or "overwrite" it.
        policy: when to ask the KMS for new data keys.
        relative_to: keep paths relative to this folder instead.
        manifest: list the files in the manifest at or above `output`, under a data key of its own; a new one is made
            where there is none. Results come when that is done. With `cells` there is none: the files are plain.
        path_fields: where in a path is what fills templates in keys and context: `{tenant}/*.csv`. Default: folders say
            it (`tenant=acme/`); docs/key-choice.md.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form. While it runs: FormatError for a file
            that is no table, or that lacks a column, and as `EncryptFiles`.

    Example:
        >>> with beam.Pipeline() as p:
        ...     p | beam.Create(["people/"]) | EncryptTables(
        ...         "sealed/", key="aws-kms://alias/etl", columns={"ssn": "aws-kms://alias/pii"})
    """

    def __init__(  # noqa: PLR0913  # plain keyword arguments
        self,
        output: str,
        *,
        key: Key | Sequence[Key] | None = None,
        columns: Columns | None = None,
        context: Mapping[str, str] | None = None,
        cells: bool = False,
        keys: str | os.PathLike[str] | KeyStore | None = None,
        deterministic: Iterable[str] | Mapping[str, str] = (),
        layout: Layout = "compact",
        csv_types: CsvTypes = "text",
        column_types: Mapping[str, str] | None = None,
        row_group_rows: int | None = None,
        compression: Codec | None = None,
        if_exists: IfExists = "error",
        policy: DataKeyPolicy | None = None,
        relative_to: str | None = None,
        manifest: bool = True,
        path_fields: str | None = None,
    ) -> None:
        """Check the arguments; nothing is called yet."""
        plan = TablesPlan(
            as_folder(output),
            checked_if_exists(if_exists),
            relative_to=None if relative_to is None else as_folder(relative_to),
        )
        form, types = _form(row_group_rows, compression), TextTypes.of(csv_types, column_types)
        named = _columns(columns)
        scopes = _scopes(deterministic)
        work: EncryptDoFn
        if cells:
            _check_cells(named, keys, scopes)
            if layout not in {"compact", "raw"}:
                raise ValueError(f"layout is 'compact' or 'raw', not {layout!r}")
            if layout == "raw" and scopes:
                raise ValueError("raw cells are not deterministic: leave deterministic out, or take layout='compact'")
            cipher = RAW_CELL_CIPHER if layout == "raw" else RECORD_CIPHER
            kept = write_keys(key, cast("str", keys), context, policy or DataKeyPolicy(), DATASET_KEY, cipher)
            fields = PathFields(kept.names, path_fields)
            work = EncryptCellsDoFn(kept, tuple(named), scopes, layout, types, form, if_exists, fields)
        else:
            _refuse_for_cells(keys=keys, deterministic=scopes, layout=None if layout == "compact" else layout)
            key = chosen_keys(key, templates=True, lists=False)
            each = {name: key if own is None else own for name, own in named.items()}
            column_keys = ColumnKeys.of(key, each, templates=True)
            chosen = ColumnChoice(column_keys, written_context(context), policy or DataKeyPolicy())
            work = EncryptParquetDoFn(chosen, types, form, if_exists, PathFields(chosen.names, path_fields))
        super().__init__(plan, work)
        self.lists = manifest and not cells

    def key_choices(self, source: str) -> tuple[KeyChoice, ...]:
        """Return the keys and the context that generate data keys for a source. Raises FormatError."""
        return cast("EncryptDoFn", self.work).key_choices(source)


class DecryptTables(FilesTransform):
    """Decrypts what EncryptTables wrote: each file becomes plain Parquet of the same name below `output`.

    Input: patterns, paths or folders, or Beam's `FileMetadata`; key files among them are passed over. Output: a
    `DecryptedTable` for each file.

    Args:
        output: the folder, on any Beam filesystem.
        key: the KMS keys that this reader may use, as URIs or providers.
        context: the encryption context that the files were written with, or `ANY_CONTEXT`.
        columns: which columns to write. Default: all. With `cells`: in which to decrypt the cells, which needs names
            only where other software dropped the metadata that say so; all columns are written.
        cells: the files are plain Parquet with encrypted cells.
        keys: with `cells`: the key store.
        deterministic: with `cells`: the scopes of deterministic columns that have another than their own name.
        on_denied: what becomes of columns whose KMS keys this reader may not use: `error`, `null` or `drop`.
        row_group_rows: how many rows a row group has. Default: row groups are kept, as EncryptTables keeps them.
        compression: the codec of all columns. Default: snappy, and with `cells`, those of the input.
        if_exists: what to do when a file exists: "error", "skip" it if it is whole, or "overwrite" it.
        relative_to: keep paths relative to this folder instead of the fixed part of the pattern.
        manifest: "use": where a manifest is at or above the files, it has to list them; "require": there has to be one;
            "ignore" it. With `cells` there is none.
        path_fields: as `EncryptTables` has it, of the encrypted files' paths.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form. While it runs, see `DecryptPlan`,
            `formats.parquet.open_parquet` and `formats.table.decrypt_columns`.

    Example:
        >>> with beam.Pipeline() as p:
        ...     p | beam.Create(["sealed/"]) | DecryptTables("opened/", key="aws-kms://alias/etl", on_denied="null")
    """

    def __init__(  # noqa: PLR0913
        self,
        output: str,
        *,
        key: Key | Sequence[Key] | None = None,
        context: Mapping[str, str] | AnyContext | None = None,
        columns: Iterable[str] | None = None,
        cells: bool = False,
        keys: str | os.PathLike[str] | KeyStore | None = None,
        deterministic: Mapping[str, str] | None = None,
        on_denied: OnDenied = "error",
        row_group_rows: int | None = None,
        compression: Codec | None = None,
        if_exists: IfExists = "error",
        relative_to: str | None = None,
        manifest: ManifestMode = "use",
        path_fields: str | None = None,
    ) -> None:
        """Check the arguments; nothing is called yet."""
        form = _form(row_group_rows, compression)
        names = None if columns is None else tuple(_columns(columns))
        scopes = _scopes(deterministic or {})
        if on_denied not in {"error", "null", "drop"}:
            raise ValueError(f"on_denied is 'error', 'null' or 'drop', not {on_denied!r}")
        work: DecryptDoFn
        if cells:
            if on_denied != "error":
                raise ValueError("on_denied is for the columns of encrypted Parquet; name the cells to decrypt instead")
            if keys is None:
                raise ValueError("cells need their key store: pass keys= (--keys), the folder that it is in")
            kept = read_keys(key, keys, context)
            work = DecryptCellsDoFn(kept, names, scopes, form, if_exists, PathFields(kept.names, path_fields))
            if checked_mode(manifest) == "require":
                raise ValueError("cells are in plain Parquet, which no manifest lists: leave manifest out")
            listed = None
        else:
            _refuse_for_cells(keys=keys, deterministic=scopes)
            choice = read_choice(key, context)
            fields = PathFields(choice.names, path_fields)
            work = DecryptParquetDoFn(choice, fields, names, on_denied, form, if_exists)
            listed = ManifestReader(checked_mode(manifest), choice.keys, choice.pairs, path_fields)
        base = None if relative_to is None else as_folder(relative_to)
        super().__init__(DecryptPlan(as_folder(output), checked_if_exists(if_exists), base, listed), work)


class DecryptAny(FilesTransform):
    """Decrypts shards as `DecryptFiles` and encrypted Parquet as `DecryptTables`: each by its key file's cipher."""

    def __init__(self, files: DecryptFiles, tables: DecryptTables) -> None:
        """Take both, of the same output."""
        super().__init__(files.plan, _AnyDoFn(files, tables))


@typehints.with_output_types(Any)
class _AnyDoFn(FileDoFn):
    label = "Decrypt"

    def __init__(self, files: DecryptFiles, tables: DecryptTables) -> None:
        self._files, self._tables = cast("ShardReaderDoFn", files.work), tables.work

    def settings(self) -> dict[str, Any]:
        return self._tables.settings()

    def check(self, task: Task) -> None:
        (self._files if self._raw_unless_table(task) else self._tables).check(task)

    def do(self, task: Task, progress: Progress) -> Any:
        raw = self._raw_unless_table(task)
        if raw is None:
            return self._tables.do(task, progress)
        return self._files.decrypt(task, progress, raw or None)

    @staticmethod
    def _raw_unless_table(task: Task) -> bytes | None:
        """Return the bytes of the key file, empty if there is none; or None if it is that of encrypted Parquet."""
        try:
            raw = read_small(key_file_path(task.source), MAX_KEY_FILE_BYTES + 1)
        except FileNotFoundError:
            return b""
        cipher = KeyFile.from_bytes(raw, f"the key file of {task.source}").cipher
        return None if cipher == PARQUET_CIPHER else raw


def _form(row_group_rows: int | None, compression: str | None) -> Form:
    if row_group_rows is not None and row_group_rows <= 0:
        raise ValueError(f"row_group_rows is above 0, not {row_group_rows}")
    if compression is not None and compression not in CODECS:
        raise ValueError(f"compression is one of {', '.join(CODECS)}, not {compression!r}")
    return Form(row_group_rows, compression)


def _columns(columns: Columns | None) -> dict[str, Key | Sequence[Key] | None]:
    if isinstance(columns, str):
        raise TypeError(f"columns are several names, or a mapping of names to keys: give [{columns!r}]")
    return dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(columns or ())


def _scopes(deterministic: Iterable[str] | Mapping[str, str]) -> dict[str, str]:
    if isinstance(deterministic, str):
        raise TypeError(f"deterministic are several columns, or a mapping to scopes: give [{deterministic!r}]")
    if isinstance(deterministic, Mapping):
        return dict(deterministic)
    return {name: name for name in deterministic}


def _check_cells(columns: Mapping[str, Any], keys: object, deterministic: Mapping[str, str]) -> None:
    if not columns:
        raise ValueError("cells need columns= (--columns): the names of the columns to encrypt")
    if keys is None:
        raise ValueError("cells need a key store: pass keys= (--keys), a folder that all readers can read")
    with_key = [name for name, key in columns.items() if key is not None]
    if with_key:
        raise ValueError(f"the cells of all columns are under key= (--key); give {with_key[0]!r} no key of its own")
    extra = [name for name in deterministic if name not in columns]
    if extra:
        raise ValueError(
            f"{extra[0]!r} is to be deterministic, but is not one of the columns to encrypt. Name it there"
        )


def _refuse_for_cells(**settings: object) -> None:
    for name, value in settings.items():
        if value:
            raise ValueError(f"{name}= (--{name}) goes with cells=True (--cells)")
