"""WriteEncryptedText and ReadEncryptedText: Beam's text IO with a key and a context of its own.

They are Beam's own transforms on `envelope+...` paths. Each carries its settings to the filesystem, so that one
pipeline can have two datasets under two keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import apache_beam as beam
from apache_beam.io import textio
from apache_beam.io.filebasedsource import ReadAllFiles

from beam_envelope.io.filesystem import inner_path, outer_path
from beam_envelope.io.options import Settings, use_settings
from beam_envelope.keys.context import AnyContext, checked_context
from beam_envelope.keys.uri import Key, open_keys


class WriteEncryptedText(beam.PTransform["beam.PCollection[Any]", "beam.PCollection[str]"]):
    """Writes elements as lines into encrypted shards, each with a key file beside it.

    Each file that a bundle writes has a data key of its own, so without `num_shards` and size limits each bundle that
    writes makes one GenerateDataKey. Output: the paths of the shards.

    Args:
        file_path_prefix: as Beam's WriteToText, on any filesystem (`s3://bucket/part`), also with `envelope+`.
        key: the KMS key, as URI or provider, or several: any one of them opens the shards.
        context: the encryption context, which a reader has to give again. Nothing secret.
        **options: all else that WriteToText takes: file_name_suffix, num_shards, shard_name_template, header,
            compression_type, max_records_per_shard, max_bytes_per_shard, triggering_frequency, ...

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form.

    Example:
        >>> lines | WriteEncryptedText("s3://sealed/lines", key="aws-kms://alias/etl", file_name_suffix=".txt")
    """

    def __init__(
        self,
        file_path_prefix: str,
        *,
        key: Key | Sequence[Key],
        context: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._settings = Settings(open_keys(key), checked_context(context))
        self._write = textio.WriteToText(_enveloped(file_path_prefix), **options)
        self._write._sink = _carry(self._write._sink, _TextSink, self._settings)  # noqa: SLF001  # where WriteToText has it

    def expand(self, lines: beam.PCollection[Any]) -> beam.PCollection[str]:
        """Return the paths of the shards."""
        paths: beam.PCollection[str] = (
            lines | "Write" >> self._write | "Paths" >> beam.Map(inner_path).with_output_types(str)
        )
        return paths

    def display_data(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown."""
        return {**self._write._sink.display_data(), **_display(self._settings)}  # noqa: SLF001


class ReadEncryptedText(beam.PTransform["beam.pvalue.PBegin", "beam.PCollection[Any]"]):
    """Reads the lines of encrypted shards, split into ranges that workers read in parallel.

    Args:
        file_pattern: as Beam's ReadFromText, on any filesystem; key files are passed over.
        key: the KMS key, as URI or provider, or several, any of which may open a shard.
        context: the encryption context that the shards were written with, or `ANY_CONTEXT`.
        with_filename: give pairs of a shard's path and a line.
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
        key: Key | Sequence[Key],
        context: Mapping[str, str] | AnyContext | None = None,
        with_filename: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self._settings = _reader_settings(key, context)
        self._with_filename = with_filename
        self._read = (textio.ReadFromTextWithFilename if with_filename else textio.ReadFromText)(
            _enveloped(file_pattern), **options
        )
        kind = _TextSourceWithFilename if with_filename else _TextSource
        self._read._source = _carry(self._read._source, kind, self._settings)  # noqa: SLF001  # where ReadFromText has it

    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection[Any]:
        """Return the lines, or pairs of path and line."""
        return _with_inner_paths(begin | "Read" >> self._read, self._with_filename)

    def display_data(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown."""
        return {**self._read._source.display_data(), **_display(self._settings)}  # noqa: SLF001


class ReadAllEncryptedText(beam.PTransform["beam.PCollection[str]", "beam.PCollection[Any]"]):
    """Reads the lines of the encrypted shards that a PCollection of paths or patterns names.

    Args:
        key, context, with_filename: as `ReadEncryptedText`.
        **options: all else that Beam's ReadAllFromText takes: desired_bundle_size, min_bundle_size, ...
    """

    def __init__(
        self,
        *,
        key: Key | Sequence[Key],
        context: Mapping[str, str] | AnyContext | None = None,
        with_filename: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self._settings = _reader_settings(key, context)
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
        enveloped = paths | "Envelope" >> beam.Map(_enveloped).with_output_types(str)
        return _with_inner_paths(enveloped | "Read" >> self._read, self._with_filename)

    def display_data(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown."""
        return _display(self._settings)


class _TextSink(textio._TextSink):  # noqa: SLF001  # Beam's text sink has no public name
    """Beam's text sink, whose files are opened under settings of its own."""

    envelope_settings: Settings

    def open(self, temp_path: str) -> Any:
        with use_settings(self.envelope_settings):
            return super().open(temp_path)

    def write_encoded_record(self, file_handle: Any, encoded_value: bytes) -> None:
        """Write a line at once; Beam makes two writes of it, and each costs more here than on a plain file."""
        file_handle.write(encoded_value + b"\n" if self._append_trailing_newlines else encoded_value)


class _TextSource(textio._TextSource):  # noqa: SLF001  # Beam's text source has no public name
    """Beam's text source, whose files are opened under settings of its own."""

    envelope_settings: Settings

    def open_file(self, file_name: str) -> Any:
        with use_settings(self.envelope_settings):
            return super().open_file(file_name)


class _TextSourceWithFilename(_TextSource, textio._TextSourceWithFilename):  # noqa: SLF001  # as above
    """The same, giving pairs of name and line."""


def _carry(of_beam: Any, kind: type, settings: Settings) -> Any:
    """Return Beam's sink or source as our subclass of it: the same state, and the settings."""
    ours: Any = object.__new__(kind)
    ours.__dict__.update(of_beam.__dict__)
    ours.envelope_settings = settings
    return ours


def _source_of(make: Callable[[str], Any], settings: Settings, file_name: str) -> _TextSource:
    source: _TextSource = _carry(make(file_name), _TextSource, settings)
    return source


def _enveloped(path: str) -> str:
    return outer_path(inner_path(path))


def _reader_settings(key: Key | Sequence[Key], context: Mapping[str, str] | AnyContext | None) -> Settings:
    if isinstance(context, AnyContext):
        return Settings(open_keys(key), {}, any_context=True)
    return Settings(open_keys(key), checked_context(context))


def _with_inner_paths(lines: beam.PCollection[Any], with_filename: bool) -> beam.PCollection[Any]:  # noqa: FBT001
    if not with_filename:
        return lines
    return lines | "Paths" >> beam.MapTuple(lambda path, line: (inner_path(path), line))


def _display(settings: Settings) -> dict[str, Any]:
    names = "any" if settings.any_context else ", ".join(settings.context)
    return {"key": ", ".join(map(str, settings.keys)), "context": names}
