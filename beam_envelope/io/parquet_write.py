"""WriteEncryptedParquet: rows and tables into encrypted Parquet files, each whole and once, however often Beam tries.

A bundle writes its files into a temporary folder beside the output. Only the files of the try that Beam took are named
in what it passes on, and they alone are moved to their final names, each with its key file before it.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import apache_beam as beam
import pyarrow as pa
from apache_beam import typehints
from apache_beam.transforms import window
from apache_beam.utils.windowed_value import WindowedValue

from beam_envelope.formats.keyfile import TEMPORARY_PREFIX, is_internal
from beam_envelope.formats.manifest import ManifestEntry
from beam_envelope.formats.parquet_columns import leaf_paths
from beam_envelope.formats.parquet_keys import ColumnKeys
from beam_envelope.io.filesystem import PREFIX
from beam_envelope.io.manifest import WrittenShard
from beam_envelope.io.manifest_write import WithManifest
from beam_envelope.io.options import Settings
from beam_envelope.io.parquet_bundle import (
    BundleKeys,
    BundleWriter,
    EncryptedParquetFile,
    FileSettings,
    Limits,
    OpenFile,
    seal,
    unseal,
)
from beam_envelope.io.parquet_names import clean, named_alone, named_together, publish, window_name
from beam_envelope.io.parquet_rows import TableMaker, schema_of
from beam_envelope.io.store import split_path
from beam_envelope.keys.cache import DataKeyPolicy
from beam_envelope.keys.choice import ElementFields, KeyFields
from beam_envelope.keys.uri import Key
from beam_envelope.settings import chosen_keys, written_context
from beam_envelope.transforms.metrics import Progress
from beam_envelope.transforms.runner_limits import refuse_on_dask

_ROW_GROUP_ROWS: Final = 1 << 20
_ROW_GROUP_BYTES: Final = 64 << 20
_SEAL_BYTES: Final = 8 << 20
_TEMPLATE: Final = "-SSSSS-of-NNNNN"
_NO_FIELDS: Final = ElementFields(())


class WriteEncryptedParquet(beam.PTransform["beam.PCollection[Any]", "beam.PCollection[EncryptedParquetFile]"]):
    """Writes rows or tables into encrypted Parquet files, each with a key file beside it.

    Input: dicts (with `schema`); NamedTuples or beam.Rows, if the PCollection's type has a schema or `schema` is given;
    `pyarrow.Table`s or `RecordBatch`es. Output: an `EncryptedParquetFile` for each file.

    Each bundle writes files of its own, those of each window apart, under one data key for each KMS key. A bounded
    input becomes files named as Beam names them, which replace files of the same names; without rows, one file without
    rows, if the schema is known. The files of an unbounded input have random names, since nobody knows how many there
    will be. Beam has no windows in what comes of a bounded input; `EncryptedParquetFile.window` says which it was.

    Args:
        prefix: the folder and the start of the files' names, on any Beam filesystem.
        schema: the Arrow schema; default: that of the elements.
        key: the KMS key, as URI or provider, or several, any one of which opens the files: for the footer and all
            columns that `columns` does not name. Or templates (`aws-kms://alias/data-{tenant}`; docs/key-choice.md),
            here and in `columns`, which each row fills: then each bundle writes a file for each key.
        columns: KMS keys of columns, as `create_parquet` takes them.
        context: the encryption context, which a reader has to give again. Nothing secret. Its values may be templates.
        num_shards: group the rows of each window into so many files, or more where a limit is met. They pass the
            runner's shuffle encrypted under `key`, so the workers need `kms:Decrypt` as well. 0: a file for each
            bundle, without a shuffle. For an unbounded input 0 means 1.
        row_group_rows: the most rows in a row group.
        row_group_bytes: a row group ends when its rows take so many bytes in memory.
        max_rows_per_file: the most rows in a file.
        max_bytes_per_file: a file ends with the row group that brings it to so many bytes (give or take 256 KiB).
        file_name_suffix: the end of the files' names.
        shard_name_template: what comes between, for a bounded input: S is for the file's number, N for how many there
            are. "" means one file (`num_shards` is 1 then).
        policy: when to ask the KMS for new data keys; default: once in a bundle, for an unbounded input once in ten
            minutes on each worker.
        manifest: list the files of a bounded input in the manifest at or above their folder, under a data key of its
            own; a new one is made where there is none. The results come when that is done.
        key_fields: a function of the row that returns a dict of what fills the templates. Default: the row's fields.
        **writer_options: any of those that `create_parquet` takes.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form, or names an unknown column. While it
            runs: a row does not fit.
        KeyAccessError, KmsUnavailableError, OSError, EnvelopeError: (while it runs) from the KMS, or from the store.

    Example:
        >>> rows | WriteEncryptedParquet("s3://sealed/people/part", schema, key="aws-kms://alias/etl",
        ...                              columns={"ssn": "aws-kms://alias/pii"}, compression="zstd")
    """

    def __init__(  # noqa: PLR0913  # as Beam's WriteToParquet
        self,
        prefix: str,
        schema: pa.Schema | None = None,
        *,
        key: Key | Sequence[Key] | None = None,
        columns: Mapping[str, Key | Sequence[Key]] | None = None,
        context: Mapping[str, str] | None = None,
        num_shards: int = 0,
        row_group_rows: int = _ROW_GROUP_ROWS,
        row_group_bytes: int = _ROW_GROUP_BYTES,
        max_rows_per_file: int | None = None,
        max_bytes_per_file: int | None = None,
        file_name_suffix: str = ".parquet",
        shard_name_template: str = _TEMPLATE,
        policy: DataKeyPolicy | None = None,
        manifest: bool = True,
        key_fields: KeyFields = None,
        **writer_options: Any,
    ) -> None:
        """Check the arguments; nothing is called yet."""
        super().__init__()
        limits = Limits(row_group_rows, row_group_bytes, max_rows_per_file, max_bytes_per_file)
        if num_shards < 0:
            raise ValueError(f"num_shards is 0 or above, not {num_shards}")
        if not shard_name_template:
            if max_rows_per_file or max_bytes_per_file or num_shards > 1:
                raise ValueError("a shard_name_template of '' means one file, which cannot have a limit. Leave it out")
            num_shards = 1
        elif "S" not in shard_name_template:
            raise ValueError(f"shard_name_template has an S, for the file's number; {shard_name_template!r} has none")
        self._prefix = _checked_prefix(prefix)
        self._template, self._num_shards, self._policy = shard_name_template, num_shards, policy
        self._lists = manifest
        self._settings = FileSettings(
            ColumnKeys.of(
                key if key is not None or columns else chosen_keys(None, templates=True, lists=False),
                columns,
                templates=True,
            ),
            written_context(context),
            policy or DataKeyPolicy(),
            schema,
            limits,
            file_name_suffix,
            writer_options,
        )
        self._fields = ElementFields(self._settings.names, key_fields)
        if self._fields.names and num_shards:
            raise ValueError(
                "num_shards puts rows of different keys together, so it does not go with a template: each bundle "
                "writes a file for each key. Leave it out, or group the rows beforehand"
            )
        # Without a schema this refuses the options only.
        leaves = leaf_paths(pa.schema([]) if schema is None else schema, writer_options)
        if schema is not None:
            self._settings.column_keys.assign(leaves)

    def expand(self, elements: beam.PCollection[Any]) -> beam.PCollection[EncryptedParquetFile]:
        """Return the files."""
        refuse_on_dask(
            elements,
            "WriteEncryptedParquet",
            "DaskRunner drops what a bundle gives at its end, so the files would have no rows",
            "Rows that are in files already: EncryptTables. Others: take another runner",
        )
        settings = self._settings
        if settings.schema is None:
            schema = schema_of(elements.element_type)
            if schema is not None:
                settings.column_keys.assign(leaf_paths(schema, settings.options))
                settings = replace(settings, schema=schema)
        if self._policy is None and not elements.is_bounded:
            settings = replace(settings, policy=DataKeyPolicy("worker"))
        folder = f"{split_path(self._prefix)[0]}{TEMPORARY_PREFIX}{uuid.uuid4().hex}/"
        by_key = bool(self._fields.names)
        num_shards = self._num_shards or (0 if elements.is_bounded or by_key else 1)
        if num_shards:
            sealed = elements | "Seal" >> beam.ParDo(_SealDoFn(settings, num_shards))
            written = sealed | "Group" >> beam.GroupByKey() | "Write" >> beam.ParDo(_WriteGroupDoFn(settings, folder))
        else:
            written = elements | "Write" >> beam.ParDo(_WriteDoFn(settings, folder, self._fields))
        if not elements.is_bounded:
            named = written | "Name" >> beam.Map(named_alone, self._prefix, settings.suffix).with_output_types(
                tuple[EncryptedParquetFile, str]
            )
            return self._publish(named)
        names = _NameDoFn(settings, folder, self._prefix, self._template, 0 if by_key else max(1, num_shards))
        # One more element, so that there is a group without results too.
        start = elements.pipeline | "Start" >> beam.Create([None])
        results = (
            (start | "No file" >> beam.Map(_pair_nothing).with_output_types(tuple[None, list[EncryptedParquetFile]])),
            written
            | "Rewindow" >> beam.WindowInto(window.GlobalWindows())
            | "A file" >> beam.Map(_pair).with_output_types(tuple[None, list[EncryptedParquetFile]]),
        )
        named = results | beam.Flatten() | "Gather" >> beam.GroupByKey() | "Name" >> beam.ParDo(names)
        files = self._publish(named)
        moved = files | "Moved" >> beam.Map(_pair_nothing).with_output_types(tuple[None, list[EncryptedParquetFile]])
        _ = moved | "All moved" >> beam.GroupByKey() | "Clean" >> beam.Map(_clean, folder).with_output_types(None)
        if self._lists:
            return files | "Manifest" >> WithManifest(split_path(self._prefix)[0], _Listed(settings))
        return files

    @staticmethod
    def _publish(named: beam.PCollection[Any]) -> beam.PCollection[EncryptedParquetFile]:
        """Move the files, on any worker."""
        files: beam.PCollection[EncryptedParquetFile] = (
            named
            | "Spread" >> beam.Reshuffle()
            | "Move" >> beam.MapTuple(publish).with_output_types(EncryptedParquetFile)
        )
        return files

    def display_data(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown."""
        keys = self._settings.column_keys
        return {
            "prefix": self._prefix,
            "key": ", ".join(map(str, keys.groups[0])),
            "columns": ", ".join(name for name, _ in keys.named),
            "context": ", ".join(self._settings.context),
            "num_shards": self._num_shards,
        }


class _BundleDoFn(beam.DoFn):
    """What the DoFns share that write: a writer for each bundle, which never travels."""

    def __init__(self, settings: FileSettings, folder: str, fields: ElementFields = _NO_FIELDS) -> None:
        self._settings, self._folder, self._fields = settings, folder, fields
        self._bundle: BundleWriter | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bundle": None}

    def start_bundle(self) -> None:
        self.teardown()  # what a bundle left that failed
        self._bundle = BundleWriter(self._settings, self._folder, self._fields)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        bundle = self._bundle
        for in_window, file in bundle.finish():  # type: ignore[union-attr]  # set by start_bundle
            yield WindowedValue(file, in_window.max_timestamp(), (in_window,))
        self._bundle = None
        with Progress() as progress:
            for name, count in bundle.counts.items():  # type: ignore[union-attr]
                progress.add(name, count)

    def teardown(self) -> None:
        if self._bundle is not None:
            self._bundle.abort()
        self._bundle = None


@typehints.with_output_types(EncryptedParquetFile)
class _WriteDoFn(_BundleDoFn):
    """Writes elements."""

    def process(self, element: Any, in_window: Any = beam.DoFn.WindowParam) -> Iterator[EncryptedParquetFile]:
        yield from self._bundle.add(in_window, window_name(in_window), element)  # type: ignore[union-attr]


@typehints.with_input_types(tuple[int, Iterable[tuple[bytes, bytes]]])
@typehints.with_output_types(EncryptedParquetFile)
class _WriteGroupDoFn(_BundleDoFn):
    """Writes what was sealed and grouped, each group into files of its own."""

    def process(
        self, element: tuple[int, Iterable[tuple[bytes, bytes]]], in_window: Any = beam.DoFn.WindowParam
    ) -> Iterator[EncryptedParquetFile]:
        bundle = self._bundle
        keys, context = self._settings.column_keys.groups[0], self._settings.context
        for sealed in element[1]:
            with Progress():
                table = unseal(sealed, keys, context)
            yield from bundle.add(in_window, window_name(in_window), table)  # type: ignore[union-attr]
        yield from bundle.finish_window(in_window)  # type: ignore[union-attr]  # set by start_bundle


@typehints.with_output_types(tuple[int, tuple[bytes, bytes]])
class _SealDoFn(beam.DoFn):
    """Encrypts tables for the runner's shuffle, with the numbers of the files that they go to."""

    def __init__(self, settings: FileSettings, num_shards: int) -> None:
        self._settings, self._num_shards = settings, num_shards
        self._keys: BundleKeys | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_keys": None, "_makers": None, "_pending": None}

    def start_bundle(self) -> None:
        self._keys = BundleKeys(self._settings)
        self._next = random.randrange(self._num_shards)  # noqa: S311  # it only spreads
        self._makers: dict[Any, TableMaker] = {}
        self._pending: dict[Any, list[pa.Table]] = {}

    def process(self, element: Any, in_window: Any = beam.DoFn.WindowParam) -> Iterator[Any]:
        if in_window not in self._makers:
            self._makers[in_window] = TableMaker(self._settings.schema)
        pending = self._pending.setdefault(in_window, [])
        pending.extend(self._makers[in_window].add(element))
        if sum(table.nbytes for table in pending) >= _SEAL_BYTES:
            yield from self._seal(pending)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        for in_window, maker in self._makers.items():
            pending = self._pending[in_window]
            pending.extend(maker.flush())
            for sealed in self._seal(pending):
                yield WindowedValue(sealed, in_window.max_timestamp(), (in_window,))
        self._keys.close()  # type: ignore[union-attr]  # set by start_bundle

    def teardown(self) -> None:
        if self._keys is not None:
            self._keys.close()

    def _seal(self, pending: list[pa.Table]) -> Iterator[tuple[int, tuple[bytes, bytes]]]:
        """Cut tables into a part for each file."""
        if not pending:
            return
        table = pa.concat_tables(pending)
        pending.clear()
        for part in range(self._num_shards):
            start, end = (table.num_rows * number // self._num_shards for number in (part, part + 1))
            if start < end:
                (data_key,) = self._keys.take(1)  # type: ignore[union-attr]  # set by start_bundle
                with data_key:
                    sealed = seal(table.slice(start, end - start), data_key, self._settings.context)
                yield (self._next + part) % self._num_shards, sealed
        self._next = (self._next + 1) % self._num_shards


@typehints.with_output_types(tuple[EncryptedParquetFile, str])
class _NameDoFn(beam.DoFn):
    """Gives all files of a bounded input their names, and writes empty files where there are too few."""

    def __init__(self, settings: FileSettings, folder: str, prefix: str, template: str, at_least: int) -> None:
        self._settings, self._folder, self._at_least = settings, folder, at_least
        self._prefix, self._template = prefix, template

    def process(
        self, element: tuple[None, Iterable[list[EncryptedParquetFile]]]
    ) -> Iterator[tuple[EncryptedParquetFile, str]]:
        files = [file for results in element[1] for file in results]
        in_windows = any(file.window for file in files)
        if self._settings.schema is not None and not in_windows and len(files) < self._at_least:
            files += self._empty_files(self._at_least - len(files))
        yield from named_together(files, self._prefix, self._template, self._settings.suffix)

    def _empty_files(self, count: int) -> list[EncryptedParquetFile]:
        keys = BundleKeys(self._settings)
        try:
            files = [OpenFile(self._settings, self._folder, keys, self._settings.schema) for _ in range(count)]
            return [file.close("") for file in files]
        finally:
            keys.close()


class _Listed:
    """What the manifest says of a file; its section is under the keys of the footer."""

    def __init__(self, settings: FileSettings) -> None:
        self._settings = settings

    def __call__(self, file: EncryptedParquetFile) -> tuple[WrittenShard, Settings]:
        entry = ManifestEntry(file.shard_id, file.stored_bytes, records=file.rows)
        chosen = self._settings.filled(tuple(file.key_fields))
        return WrittenShard(file.path, entry), Settings(chosen.column_keys.groups[0], chosen.context)


def _clean(_moved: Any, folder: str) -> None:
    clean(folder)


def _pair(file: EncryptedParquetFile) -> tuple[None, list[EncryptedParquetFile]]:
    return None, [file]


def _pair_nothing(_element: Any) -> tuple[None, list[EncryptedParquetFile]]:
    return None, []


def _checked_prefix(prefix: str) -> str:
    if not isinstance(prefix, str):
        raise TypeError(f"prefix is a path, not a {type(prefix).__name__}")
    if prefix.startswith(PREFIX):
        raise ValueError(
            f"Parquet files are encrypted by themselves, so they go to plain paths: leave {PREFIX} out of {prefix!r}"
        )
    prefix = f"{prefix}part" if prefix.endswith("/") or not prefix else prefix
    if is_internal(split_path(prefix)[1]):
        raise ValueError(f"{prefix!r} would make names that key files and unfinished files have; choose another")
    return prefix
