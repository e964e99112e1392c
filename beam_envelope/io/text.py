"""WriteEncryptedText and ReadEncryptedText: Beam's text IO with a key and a context of its own.

They are Beam's own transforms on `envelope+...` paths. Each carries its settings to the filesystem, so that one
pipeline can have two datasets under two keys.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import apache_beam as beam
from apache_beam.io import textio
from apache_beam.io.filebasedsink import DEFAULT_SHARD_NAME_TEMPLATE, DEFAULT_WINDOW_SHARD_NAME_TEMPLATE
from apache_beam.io.filebasedsource import ReadAllFiles
from apache_beam.io.filesystems import FileSystems

from beam_envelope.errors import FormatError
from beam_envelope.formats.keyfile import TEMPORARY_PREFIX, KeyFile
from beam_envelope.io.filesystem import inner_path, outer_path
from beam_envelope.io.keyfiles import read_key_file
from beam_envelope.io.manifest import WrittenShard, shard_on_store
from beam_envelope.io.manifest_reader import ManifestMode, ManifestReader, check_shard_id, checked_mode, may_be_listed
from beam_envelope.io.manifest_write import WithManifest
from beam_envelope.io.options import PathSettings, Settings, use_settings
from beam_envelope.io.store import expand, key_file_path, split_path
from beam_envelope.io.text_by_key import WriteTextByKey
from beam_envelope.io.text_by_window import WriteTextByWindow
from beam_envelope.keys.choice import KeyChoice, KeyFields, PathFields, Values
from beam_envelope.keys.context import AnyContext
from beam_envelope.keys.uri import Key
from beam_envelope.settings import write_choice
from beam_envelope.transforms.runner_limits import check_on_dask, refuse_on_dask


class WriteEncryptedText(beam.PTransform["beam.PCollection[Any]", "beam.PCollection[str]"]):
    """Writes elements as lines into encrypted shards, each with a key file beside it.

    Each file that a bundle writes has a data key of its own, so without `num_shards` and size limits each bundle that
    writes makes one GenerateDataKey. Output: the paths of the shards.

    Args:
        file_path_prefix: as Beam's WriteToText, on any filesystem (`s3://bucket/part`), also with `envelope+`.
        key: the KMS key, as URI or provider, or several: any one of them opens the shards. Or templates
            (`aws-kms://alias/data-{tenant}`; docs/key-choice.md), which folders in the prefix fill (`tenant=a/part`),
            or each line by `key_fields`.
        context: the encryption context, which a reader has to give again. Nothing secret. Its values may be templates.
        key_fields: a function of the line that returns a dict of what fills the templates. Then each bundle writes a
            shard for each key, `tenant=acme/part-...` below the folder of the prefix, and of the options only
            file_name_suffix, header, coder and append_trailing_newlines hold.
        **options: all else that WriteToText takes: file_name_suffix, num_shards, shard_name_template, header,
            compression_type, max_records_per_shard, max_bytes_per_shard, triggering_frequency, ...
        manifest: list the shards of a bounded input in the manifest at or above their folder, under a data key of its
            own; a new one is made where there is none. The paths come when that is done.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form.

    Example:
        >>> lines | WriteEncryptedText("s3://sealed/lines", key="aws-kms://alias/etl", file_name_suffix=".txt")
    """

    def __init__(
        self,
        file_path_prefix: str,
        *,
        key: Key | Sequence[Key] | None = None,
        context: Mapping[str, str] | None = None,
        manifest: bool = True,
        key_fields: KeyFields = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._folder = split_path(inner_path(file_path_prefix))[0] if manifest else None
        choice = write_choice(key, context)
        self._by_key = None
        if key_fields is not None:
            self._by_key = WriteTextByKey(file_path_prefix, choice, key_fields, options, manifest=manifest)
            return
        filled: Any = choice.filled(_prefix_fields(choice, file_path_prefix))
        self._settings = Settings(filled.keys, filled.pairs)
        self._write = textio.WriteToText(_enveloped(file_path_prefix), **options)
        self._write._sink = _carry(self._write._sink, _TextSink, self._settings)  # noqa: SLF001  # where WriteToText has it

    def expand(self, lines: beam.PCollection[Any]) -> beam.PCollection[str]:
        """Return the paths of the shards."""
        refuse_on_dask(
            lines,
            "WriteEncryptedText",
            "DaskRunner drops what a bundle gives at its end, so the shards would be empty",
            "Lines that are in files already: EncryptFiles(split_lines=...). Others: take another runner",
        )
        if self._by_key is not None:
            return lines | "ByKey" >> self._by_key
        if not lines.is_bounded:
            sink: Any = copy.copy(self._write._sink)  # noqa: SLF001  # where WriteToText has it
            sink.say_window()
            return lines | "Write" >> WriteTextByWindow(sink)
        paths: beam.PCollection[str] = (
            lines | "Write" >> self._write | "Paths" >> beam.Map(inner_path).with_output_types(str)
        )
        if self._folder is None:
            return paths
        # Beam names all of them in one bundle, and each is looked at.
        spread = paths | "Spread" >> beam.Reshuffle()
        return spread | "Manifest" >> WithManifest(self._folder, _ListedShard(self._settings))

    def display_data(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown."""
        if self._by_key is not None:
            return self._by_key.display_data()
        return {**self._write._sink.display_data(), **_display(self._settings)}  # noqa: SLF001


class ReadEncryptedText(beam.PTransform["beam.pvalue.PBegin", "beam.PCollection[Any]"]):
    """Reads the lines of encrypted shards, split into ranges that workers read in parallel.

    Args:
        file_pattern: as Beam's ReadFromText, on any filesystem; key files are passed over.
        key: the KMS key, as URI or provider, or several, any of which may open a shard; `AllowedKeys`; or templates,
            which the path of each shard fills.
        context: the encryption context that the shards were written with, or `ANY_CONTEXT`.
        path_fields: as `DecryptFiles`, of the shards' paths.
        with_filename: give pairs of a shard's path and a line.
        manifest: "use": where a manifest is at or above the shards, it has to list them; "require": there has to be
            one; "ignore" it.
        **options: all else that ReadFromText takes: strip_trailing_newlines, skip_header_lines, coder, delimiter, ...

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form.
        OSError: no shard matches, unless `validate=False`.

    Example:
        >>> p | ReadEncryptedText("s3://sealed/lines*", key="aws-kms://alias/etl")
    """

    def __init__(
        self,
        file_pattern: str,
        *,
        key: Key | Sequence[Key] | None = None,
        context: Mapping[str, str] | AnyContext | None = None,
        with_filename: bool = False,
        manifest: ManifestMode = "use",
        path_fields: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._settings = PathSettings.of(key, context, path_fields)
        self._with_filename = with_filename
        self._read = (textio.ReadFromTextWithFilename if with_filename else textio.ReadFromText)(
            _enveloped(file_pattern), **options
        )
        kind = _TextSourceWithFilename if with_filename else _TextSource
        source = _carry(self._read._source, kind, self._settings)  # noqa: SLF001  # where ReadFromText has it
        source.envelope_manifest = _manifest_reader(manifest, self._settings)
        self._read._source = source  # noqa: SLF001

    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection[Any]:
        """Return the lines, or pairs of path and line."""
        refuse_on_dask(
            begin,
            "ReadEncryptedText",
            "DaskRunner cannot read sources",
            "Give the paths to ReadAllEncryptedText: beam.Create([pattern]) | ReadAllEncryptedText(...)",
        )
        return _with_inner_paths(begin | "Read" >> self._read, self._with_filename)

    def display_data(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown."""
        return {**self._read._source.display_data(), **_display(self._settings)}  # noqa: SLF001


class ReadAllEncryptedText(beam.PTransform["beam.PCollection[str]", "beam.PCollection[Any]"]):
    """Reads the lines of the encrypted shards that a PCollection of paths or patterns names.

    Args:
        key, context, with_filename, manifest, path_fields: as `ReadEncryptedText`.
        **options: all else that Beam's ReadAllFromText takes: desired_bundle_size, min_bundle_size, ...
    """

    def __init__(
        self,
        *,
        key: Key | Sequence[Key] | None = None,
        context: Mapping[str, str] | AnyContext | None = None,
        with_filename: bool = False,
        manifest: ManifestMode = "use",
        path_fields: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._settings = PathSettings.of(key, context, path_fields)
        self._manifest = _manifest_reader(manifest, self._settings)
        self._with_filename = with_filename
        beams = textio.ReadAllFromText(with_filename=with_filename, **options)
        self._read = ReadAllFiles(
            True,  # noqa: FBT003  # splittable, as ReadAllFromText has it
            beams._compression_type,  # noqa: SLF001
            beams._desired_bundle_size,  # noqa: SLF001
            beams._min_bundle_size,  # noqa: SLF001
            partial(_source_of, beams._source_from_file, self._settings),  # noqa: SLF001
            with_filename,
        )

    def expand(self, paths: beam.PCollection[str]) -> beam.PCollection[Any]:
        """Return the lines, or pairs of path and line."""
        check_on_dask(paths, "ReadAllEncryptedText")
        checked = paths | "Manifest" >> beam.Map(_checked, self._manifest).with_output_types(str)
        enveloped = checked | "Envelope" >> beam.Map(_enveloped).with_output_types(str)
        return _with_inner_paths(enveloped | "Read" >> self._read, self._with_filename)

    def display_data(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown."""
        return _display(self._settings)


class _TextSink(textio._TextSink):  # noqa: SLF001  # Beam's text sink has no public name
    """Beam's text sink, whose files are opened under settings of its own, in a folder that no reader looks into."""

    envelope_settings: Settings

    def say_window(self) -> None:
        """Have the window in the shards' names, unless a template was given."""
        if self.shard_name_template == DEFAULT_SHARD_NAME_TEMPLATE:
            self.shard_name_template = DEFAULT_WINDOW_SHARD_NAME_TEMPLATE
            self.shard_name_format = self._template_to_format(self.shard_name_template)

    def _create_temp_dir(self, file_path_prefix: str) -> str:
        folder, _ = FileSystems.split(super()._create_temp_dir(file_path_prefix))
        return str(FileSystems.join(folder, TEMPORARY_PREFIX + uuid.uuid4().hex))

    def open(self, temp_path: str) -> Any:
        with use_settings(self.envelope_settings):
            return super().open(temp_path)

    def write_encoded_record(self, file_handle: Any, encoded_value: bytes) -> None:
        """Write a line at once; Beam makes two writes of it, and each costs more here than on a plain file."""
        file_handle.write(encoded_value + b"\n" if self._append_trailing_newlines else encoded_value)


class _TextSource(textio._TextSource):  # noqa: SLF001  # Beam's text source has no public name
    """Beam's text source, whose files are opened under settings of its own, each as the shard that a manifest lists."""

    envelope_settings: PathSettings
    envelope_manifest: ManifestReader | None = None
    envelope_shard_id = ""

    def _get_concat_source(self) -> Any:
        new = self._concat_source is None
        concat = super()._get_concat_source()
        if new and self.envelope_manifest is not None:
            shard_ids = _find_listed(inner_path(self._pattern.get()), self.envelope_manifest)
            for source in concat.sources:
                of_file = copy.copy(source._file_based_source)  # noqa: SLF001  # Beam's, of which each is pickled alone
                of_file.envelope_shard_id = shard_ids.get(inner_path(source._file_name), "")  # noqa: SLF001
                source._file_based_source = of_file  # noqa: SLF001
        return concat

    def open_file(self, file_name: str) -> Any:
        settings = self.envelope_settings.for_path(inner_path(file_name))
        with use_settings(replace(settings, shard_id=self.envelope_shard_id)):
            return super().open_file(file_name)


class _TextSourceWithFilename(_TextSource, textio._TextSourceWithFilename):  # noqa: SLF001  # as above
    """The same, giving pairs of name and line."""


def _carry(of_beam: Any, kind: type, settings: Settings | PathSettings) -> Any:
    """Return Beam's sink or source as our subclass of it: the same state, and the settings."""
    ours: Any = object.__new__(kind)
    ours.__dict__.update(of_beam.__dict__)
    ours.envelope_settings = settings
    return ours


class _ListedShard:
    """What the manifest says of the shard at a path."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __call__(self, path: str) -> tuple[WrittenShard, Settings]:
        return shard_on_store(path), self._settings


def _manifest_reader(mode: ManifestMode, settings: PathSettings) -> ManifestReader:
    return ManifestReader(checked_mode(mode), settings.keys, settings.choice.pairs, settings.fields.pattern)


def _find_listed(pattern: str, manifest: ManifestReader) -> Mapping[str, str]:
    """Return the shards that a pattern finds and a manifest lists, with their ids. Raises as `ManifestReader.check`."""
    try:
        glob, found = expand(pattern)
    except FileNotFoundError:  # Beam tells of it, unless nobody wants to know
        return manifest.check(pattern, [])
    return manifest.check(glob, [shard.path for shard in found if may_be_listed(shard.path)])


def _checked(pattern: str, manifest: ManifestReader) -> str:
    """Look at the key files of listed shards now: Beam passes nothing but paths on to where they are opened."""
    for path, shard_id in _find_listed(inner_path(pattern), manifest).items():
        key_file = KeyFile.from_bytes(read_key_file(key_file_path(path)), f"the key file of {path}")
        check_shard_id(path, key_file, shard_id)
    return pattern


def _source_of(make: Callable[[str], Any], settings: PathSettings, file_name: str) -> _TextSource:
    source: _TextSource = _carry(make(file_name), _TextSource, settings)
    return source


def _enveloped(path: str) -> str:
    return outer_path(inner_path(path))


def _prefix_fields(choice: KeyChoice, prefix: str) -> Values:
    """Return what the folders of a prefix say for templates. Raises ValueError."""
    try:
        return PathFields(choice.names)(inner_path(prefix))
    except FormatError as error:
        raise ValueError(f"{error}. Where lines choose their keys, give key_fields=, a function of the line") from None


def _with_inner_paths(lines: beam.PCollection[Any], with_filename: bool) -> beam.PCollection[Any]:  # noqa: FBT001
    if not with_filename:
        return lines
    return lines | "Paths" >> beam.MapTuple(lambda path, line: (inner_path(path), line))


def _display(settings: Settings | PathSettings) -> dict[str, Any]:
    names = "any" if settings.any_context else ", ".join(settings.context)
    return {"key": ", ".join(map(str, settings.keys)), "context": names}
