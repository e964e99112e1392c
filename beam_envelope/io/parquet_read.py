"""ReadEncryptedParquet and its kin: encrypted Parquet files, read in parallel by ranges of row groups."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import apache_beam as beam
import pyarrow as pa
from apache_beam import typehints
from apache_beam.io.filesystems import FileSystems

from beam_envelope.formats.keyfile import MANIFEST_NAME, MAX_KEY_FILE_BYTES, KeyFile, is_internal
from beam_envelope.formats.parquet import missing_parquet_key_file, open_sealed_parquet
from beam_envelope.formats.parquet_reader import EncryptedParquetReader, Filter, OnDenied
from beam_envelope.formats.shard_layout import HEADER_BYTES
from beam_envelope.io.filesystem import PREFIX
from beam_envelope.io.manifest_reader import ManifestMode, ManifestReader, check_shard_id, checked_mode
from beam_envelope.io.parquet_rows import row_type, to_rows
from beam_envelope.io.store import LocalStore, expand, key_file_path, read_small, split_glob, split_path, store_of
from beam_envelope.keys.context import AnyContext
from beam_envelope.keys.uri import Key, open_keys
from beam_envelope.settings import PathSettings
from beam_envelope.transforms.metrics import Progress
from beam_envelope.transforms.runner_limits import check_on_dask

_RANGE_ROWS: Final = 1 << 20
_BATCH_ROWS: Final = 1 << 16


def open_parquet_at(
    path: str,
    key: Key | Sequence[Key],
    context: Mapping[str, str] | AnyContext | None,
    *,
    on_denied: OnDenied = "error",
    shard_id: str = "",
) -> EncryptedParquetReader:
    """Open an encrypted Parquet file on any Beam filesystem.

    Raises:
        ManifestError: it is not the one with the `shard_id` that a manifest lists.
        As `open_parquet`.
    """
    store = store_of(path)
    stream = pa.OSFile(path) if isinstance(store, LocalStore) else store.open(path)
    try:
        try:
            raw = read_small(key_file_path(path), MAX_KEY_FILE_BYTES + 1)
        except FileNotFoundError:
            raise missing_parquet_key_file(path, stream.read(HEADER_BYTES)) from None
        if shard_id:
            check_shard_id(path, KeyFile.from_bytes(raw, f"the key file of {path}"), shard_id)
        return open_sealed_parquet(stream, raw, open_keys(key), context, path, on_denied=on_denied, own=True)
    except BaseException:
        stream.close()
        raise


def find_parquet(pattern: str) -> tuple[str, list[str]]:
    """Find the files that a pattern, path or folder names; key files and unfinished files are passed over.

    Returns:
        A glob for what the user named, and the files.

    Raises:
        FileNotFoundError: there is none.
        OSError: from the store.
    """
    return _find(pattern)[:2]


def _find(pattern: str) -> tuple[str, list[str], list[str]]:
    """Return what `find_parquet` does, and the manifests beside the files. Raises as it."""
    glob, found = expand(pattern)
    below = len(split_glob(glob)[0])
    paths = [metadata.path for metadata in found]
    files = [path for path in paths if not any(map(is_internal, path[below:].split("/")))]
    if not files:
        raise FileNotFoundError(errno.ENOENT, "only key files and unfinished files match, no Parquet file", pattern)
    return glob, files, [path for path in paths if split_path(path)[1] == MANIFEST_NAME]


@dataclass(frozen=True)
class ReadSettings:
    """What is read and by whom. Configuration only, so it travels. Attributes as the arguments of the transforms."""

    paths: PathSettings
    columns: tuple[str, ...] | None
    filter: Any
    on_denied: OnDenied
    batch_rows: int
    with_filename: bool
    validate: bool
    manifest: ManifestReader

    @classmethod
    def of(
        cls,
        *,
        key: Key | Sequence[Key] | None = None,
        context: Mapping[str, str] | AnyContext | None = None,
        columns: Sequence[str] | None = None,
        filter: Filter = None,  # noqa: A002  # as pyarrow
        on_denied: OnDenied = "error",
        batch_rows: int = _BATCH_ROWS,
        with_filename: bool = False,
        validate: bool = True,
        manifest: ManifestMode = "use",
        path_fields: str | None = None,
    ) -> ReadSettings:
        """Check the arguments that all readers have. Raises ValueError, TypeError, FormatError."""
        if isinstance(columns, str):
            raise TypeError(f"columns is a list of names, not the text {columns!r}")
        if on_denied not in {"error", "null", "drop"}:
            raise ValueError(f"on_denied is 'error', 'null' or 'drop', not {on_denied!r}")
        if batch_rows <= 0:
            raise ValueError(f"batch_rows is above 0, not {batch_rows}")
        paths = PathSettings.of(key, context, path_fields)
        chosen = None if columns is None else tuple(columns)
        listed = ManifestReader(checked_mode(manifest), paths.keys, paths.choice.pairs, path_fields)
        return cls(paths, chosen, filter, on_denied, batch_rows, with_filename, validate, listed)

    def open(self, path: str, shard_id: str = "") -> EncryptedParquetReader:
        """Open a file. Raises as `open_parquet_at`."""
        settings = self.paths.for_path(path)
        return open_parquet_at(
            path, settings.keys, settings.expected_context, on_denied=self.on_denied, shard_id=shard_id
        )

    def find(self, pattern: str) -> tuple[str, list[str], list[str]]:
        """Return a glob, the files and the manifests. Raises as `find_parquet`; none is no error without `validate`."""
        try:
            return _find(pattern)
        except FileNotFoundError:
            if self.validate:
                raise
            return pattern, [], []

    def find_listed(self, pattern: str) -> list[tuple[str, str]]:
        """Return the files, each with the shard id that a manifest lists, or "". Raises as `ManifestReader.check`."""
        glob, paths, manifests = self.find(pattern)
        with Progress():
            shard_ids = self.manifest.check(glob, [*paths, *manifests])
        return [(path, shard_ids.get(path, "")) for path in paths]

    def schema(self, path: str) -> pa.Schema:
        """Return the schema of what is read of a file. Raises as `open_parquet`, and for denied columns."""
        with self.open(path) as reader:
            return reader._plan(self.columns, self.filter).schema  # noqa: SLF001  # of the same package

    def display(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown, nor what a filter compares with."""
        names = "any" if self.paths.any_context else ", ".join(self.paths.context)
        columns = "all" if self.columns is None else ", ".join(self.columns)
        return {
            "key": ", ".join(map(str, self.paths.keys)),
            "context": names,
            "columns": columns,
            "on_denied": self.on_denied,
        }


_As = Literal["tables", "dicts", "rows"]


class _Read(beam.PTransform["beam.PCollection[str]", "beam.PCollection[Any]"]):
    """From paths or patterns to elements: what all readers share."""

    def __init__(self, settings: ReadSettings, kind: _As, element_type: Any) -> None:
        super().__init__()
        self._settings, self._kind, self._element_type = settings, kind, element_type

    def expand(self, patterns: beam.PCollection[str]) -> beam.PCollection[Any]:
        check_on_dask(patterns, "reading encrypted Parquet")
        read = beam.ParDo(_ReadDoFn(self._settings, self._kind))
        output_type: Any = self._element_type
        if self._settings.with_filename:
            output_type = typehints.Tuple[str, output_type]
        elements: beam.PCollection[Any] = (
            patterns
            | "Match" >> beam.FlatMap(self._settings.find_listed).with_output_types(tuple[str, str])
            | "Spread files" >> beam.Reshuffle()
            | "Split" >> beam.ParDo(_SplitDoFn(self._settings))
            | "Spread ranges" >> beam.Reshuffle()
            | "Read" >> read.with_output_types(output_type)
        )
        return elements


@typehints.with_input_types(tuple[str, str])
@typehints.with_output_types(tuple[str, str, int, int])
class _SplitDoFn(beam.DoFn):
    """Cuts a file into ranges of row groups, of about a million rows each."""

    def __init__(self, settings: ReadSettings) -> None:
        self._settings = settings

    def process(self, element: tuple[str, str]) -> Iterator[tuple[str, str, int, int]]:
        path, shard_id = element
        with Progress(), self._settings.open(path, shard_id) as reader:
            groups, rows = reader.num_row_groups, reader.num_rows
        FileSystems.report_source_lineage(path)
        step = max(1, groups * _RANGE_ROWS // max(1, rows))
        for start in range(0, groups, step):
            yield path, shard_id, start, min(start + step, groups)


@typehints.with_input_types(tuple[str, str, int, int])
class _ReadDoFn(beam.DoFn):
    """Reads a range of row groups."""

    def __init__(self, settings: ReadSettings, kind: _As) -> None:
        self._settings, self._kind = settings, kind

    def process(self, element: tuple[str, str, int, int]) -> Iterator[Any]:
        path, shard_id, start, end = element
        settings = self._settings
        # The calls to the KMS are counted before anything is passed on: steps behind this one count their own.
        with Progress():
            reader = settings.open(path, shard_id)
        with reader:
            with Progress():
                batches = reader.iter_batches(range(start, end), settings.columns, settings.batch_rows, settings.filter)
            for batch in batches:
                table = pa.Table.from_batches([batch])
                with Progress() as progress:
                    progress.add("rows_decrypted", table.num_rows)
                    progress.add("bytes_plaintext", table.nbytes)
                for result in self._elements(table):
                    yield (path, result) if settings.with_filename else result

    def _elements(self, table: pa.Table) -> Iterator[Any]:
        if self._kind == "tables":
            yield table
        elif self._kind == "rows":
            yield from to_rows(table)
        else:
            yield from table.to_pylist()


class ReadAllEncryptedParquetBatched(beam.PTransform["beam.PCollection[str]", "beam.PCollection[pa.Table]"]):
    """Reads the encrypted Parquet files that a PCollection of paths, patterns or folders names, as `pyarrow.Table`s.

    Args:
        **settings: as `ReadEncryptedParquet`, without `as_rows` and `schema`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._settings = ReadSettings.of(**settings)

    def expand(self, patterns: beam.PCollection[str]) -> beam.PCollection[pa.Table]:
        """Return the tables, or pairs of path and table."""
        return patterns | "Read" >> _Read(self._settings, "tables", pa.Table)

    def display_data(self) -> dict[str, Any]:
        """Describe the settings."""
        return self._settings.display()


class ReadAllEncryptedParquet(beam.PTransform["beam.PCollection[str]", "beam.PCollection[Any]"]):
    """Reads the rows of the encrypted Parquet files that a PCollection of paths, patterns or folders names.

    Args:
        as_rows: give beam.Rows instead of dicts; needs `schema`.
        schema: with `as_rows`: the Arrow schema of what is read.
        **settings: as `ReadEncryptedParquet`.
    """

    def __init__(self, *, as_rows: bool = False, schema: pa.Schema | None = None, **settings: Any) -> None:
        super().__init__()
        self._settings = ReadSettings.of(**settings)
        if as_rows and schema is None:
            raise ValueError("as_rows needs schema=, the Arrow schema of what is read: the files are not known yet")
        self._type = row_type(schema) if as_rows else dict[str, Any]
        self._kind: _As = "rows" if as_rows else "dicts"

    def expand(self, patterns: beam.PCollection[str]) -> beam.PCollection[Any]:
        """Return the rows, or pairs of path and row."""
        return patterns | "Read" >> _Read(self._settings, self._kind, self._type)

    def display_data(self) -> dict[str, Any]:
        """Describe the settings."""
        return self._settings.display()


class ReadEncryptedParquetBatched(beam.PTransform["beam.pvalue.PBegin", "beam.PCollection[pa.Table]"]):
    """Reads encrypted Parquet files as `pyarrow.Table`s of at most `batch_rows` rows.

    Args:
        pattern: a pattern, path or folder.
        **settings: as `ReadEncryptedParquet`, without `as_rows` and `schema`.
    """

    def __init__(self, pattern: str, **settings: Any) -> None:
        super().__init__()
        self._pattern = _checked_pattern(pattern)
        ReadSettings.of(**settings).find(pattern)
        self._read = ReadAllEncryptedParquetBatched(**settings)

    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection[pa.Table]:
        """Return the tables, or pairs of path and table."""
        return begin | "Pattern" >> beam.Create([self._pattern]) | "All" >> self._read

    def display_data(self) -> dict[str, Any]:
        """Describe the settings."""
        return {"pattern": self._pattern, **self._read.display_data()}


class ReadEncryptedParquet(beam.PTransform["beam.pvalue.PBegin", "beam.PCollection[Any]"]):
    """Reads the rows of encrypted Parquet files, in ranges of row groups that workers read in parallel.

    Each worker process asks the KMS once for each data key. Output: dicts, or beam.Rows.

    Args:
        pattern: a pattern, path or folder, on any Beam filesystem; key files are passed over.
        key: the KMS keys that this reader may use, as URIs or providers. One of them has to open the footer. Or
            `AllowedKeys`, or templates, which the path of each file fills.
        context: the encryption context that the files were written with, or `ANY_CONTEXT`.
        columns: names of columns, or paths of what is in them; default: all.
        filter: a pyarrow expression, or a list of tuples as `pyarrow.parquet.read_table` takes; only the rows that
            fulfil it are returned. The pipeline carries it, so it is no place for a secret.
        on_denied: what becomes of columns whose KMS keys this reader may not use: `error` fails the job, `null` reads
            nulls in their place, `drop` leaves them out.
        as_rows: give beam.Rows, in a PCollection with a schema, instead of dicts. The schema is that of the first file,
            which is opened when the pipeline is built, with the keys of whoever builds it; or `schema`.
        schema: with `as_rows`: the Arrow schema of what is read.
        batch_rows: how many rows are decoded at once.
        with_filename: give pairs of a file's path and a row.
        validate: fail if no file matches, at once and on the worker.
        manifest: "use": where a manifest is at or above the files, it has to list them; "require": there has to be one;
            "ignore" it.
        path_fields: as `DecryptFiles`, of the files' paths.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form.
        FileNotFoundError, OSError: no file matches.
        As `open_parquet`, while it runs, and at once with `as_rows`.

    Example:
        >>> p | ReadEncryptedParquet("s3://sealed/people/*.parquet", key="aws-kms://alias/etl", on_denied="null")
    """

    def __init__(
        self, pattern: str, *, as_rows: bool = False, schema: pa.Schema | None = None, **settings: Any
    ) -> None:
        super().__init__()
        self._pattern = _checked_pattern(pattern)
        reads = ReadSettings.of(**settings)
        _, found, _ = reads.find(pattern)
        if as_rows and schema is None:
            if not found:
                raise ValueError(f"as_rows needs schema=, since no file matches {pattern} yet")
            schema = reads.schema(found[0])
        self._read = ReadAllEncryptedParquet(as_rows=as_rows, schema=schema, **settings)

    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection[Any]:
        """Return the rows, or pairs of path and row."""
        return begin | "Pattern" >> beam.Create([self._pattern]) | "All" >> self._read

    def display_data(self) -> dict[str, Any]:
        """Describe the settings."""
        return {"pattern": self._pattern, **self._read.display_data()}


def _checked_pattern(pattern: str) -> str:
    if not isinstance(pattern, str):
        raise TypeError(f"pattern is a path, pattern or folder, not a {type(pattern).__name__}")
    if pattern.startswith(PREFIX):
        raise ValueError(
            f"Parquet files are encrypted by themselves, so they are at plain paths: leave {PREFIX} out of {pattern!r}"
        )
    return pattern
