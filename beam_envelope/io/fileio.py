"""WriteEncryptedFiles: Beam's fileio.WriteToFiles into encrypted shards, without its traps.

WriteToFiles puts plaintext into the pipeline's temp_location, takes a failed rename for success, and makes a sink anew
without its arguments. Here temporary files are shards too, and the final ones are checked.
"""

from __future__ import annotations

import contextlib
import copy
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import apache_beam as beam
from apache_beam import typehints
from apache_beam.io import fileio
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.value_provider import StaticValueProvider

from beam_envelope.errors import EnvelopeError
from beam_envelope.formats.keyfile import TEMPORARY_PREFIX
from beam_envelope.io.filesystem import SettingsMimeType, inner_path, outer_path
from beam_envelope.io.manifest import WrittenShard, shard_on_store
from beam_envelope.io.manifest_write import WithManifest
from beam_envelope.io.options import Settings
from beam_envelope.keys.choice import KeyChoice, PathFields, Values, fill_context
from beam_envelope.keys.context import checked_context
from beam_envelope.keys.uri import Key, fill_key, open_keys
from beam_envelope.settings import chosen_keys, written_context
from beam_envelope.transforms.runner_limits import refuse_on_dask


class WriteEncryptedFiles(beam.PTransform["beam.PCollection[Any]", "beam.PCollection[Any]"]):
    """Writes elements into encrypted shards, by destination, each with a key file beside it.

    Output: Beam's `FileResult` for each shard; its `file_name` is the shard's path.

    Args:
        path: the folder, on any filesystem; `envelope+` before it is allowed.
        key: the KMS key, as URI or provider, or several; or a function of the destination that returns them: one
            dataset for each tenant, each under its own KMS key. Or a template, `aws-kms://alias/data-{tenant}`, which
            the destination fills: a destination `acme` fills the one gap there is, `tenant=acme/year=2026` several.
        context: the encryption context, or a function of the destination that returns it. Its values may be templates.
        sink: a `fileio.FileSink`, its class, or a function of the destination that makes one. An instance must be
            copyable: each file gets a copy, arguments and all.
        manifest: list the shards of a bounded input in the manifest at or above `path`, each destination's under its
            own keys and a data key of its own; a new one is made where there is none. Results come when that is done.
        destination, file_naming, shards, max_writers_per_bundle: as WriteToFiles. Beam sends the records of
            destinations beyond `max_writers_per_bundle` through its shuffle, as plaintext.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form.
        EnvelopeError: (while it runs) a shard is not there at the end.

    Example:
        >>> events | WriteEncryptedFiles(
        ...     "s3://sealed/", destination=lambda e: e["tenant"], key=lambda tenant: f"aws-kms://alias/{tenant}"
        ... )
    """

    def __init__(
        self,
        path: str,
        *,
        key: Key | Sequence[Key] | Callable[[str], Key | Sequence[Key]] | None = None,
        context: Mapping[str, str] | Callable[[str], Mapping[str, str]] | None = None,
        sink: Any = None,
        destination: Any = None,
        manifest: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if "temp_directory" in options:
            msg = "WriteEncryptedFiles chooses its own temporary folder, inside path, so that no plaintext leaves it"
            raise TypeError(msg)
        self._path = outer_path(inner_path(path)).rstrip("/")
        self._lists = manifest
        self._settings_of = _SettingsOf(key, context)
        temporary = FileSystems.join(self._path, TEMPORARY_PREFIX + uuid.uuid4().hex)
        self._temporary = temporary
        self._write = fileio.WriteToFiles(
            self._path,
            destination=destination,
            sink=_SinkOf(_sink_maker(sink), self._settings_of),
            temp_directory=StaticValueProvider(str, temporary),
            **options,
        )

    def expand(self, elements: beam.PCollection[Any]) -> beam.PCollection[Any]:
        """Return the results of the shards that are there."""
        refuse_on_dask(
            elements,
            "WriteEncryptedFiles",
            "DaskRunner drops what a bundle gives at its end, so no shard would be there",
            "What is in files already: EncryptFiles. Elements: take another runner",
        )
        results: beam.PCollection[Any] = (
            elements | "Write" >> self._write | "Check" >> beam.ParDo(_CheckDoFn(self._path, self._temporary))
        )
        if not self._lists or not results.is_bounded:
            return results
        # What Beam moved in one bundle is looked at by many.
        spread = results | "Spread" >> beam.Reshuffle()
        folder = f"{inner_path(self._path)}/"
        return spread | "Manifest" >> WithManifest(folder, _Listed(self._settings_of))

    def display_data(self) -> dict[str, Any]:
        """Describe the settings."""
        return {"path": self._path, **self._settings_of.describe()}


class _SettingsOf:
    """The keys and the context of a destination."""

    def __init__(self, key: Any, context: Any) -> None:
        self._key = key if callable(key) else chosen_keys(key, templates=True, lists=False)
        self._context = context if callable(context) else written_context(context)
        fixed = KeyChoice(() if callable(key) else self._key, () if callable(context) else tuple(self._context.items()))
        self._names = fixed.names

    def __call__(self, destination: str) -> Settings:
        named = dict(zip(self._names, self._values(destination), strict=True))
        if callable(self._key):
            keys = open_keys(self._key(destination), lists=False)
        else:
            keys = tuple(fill_key(key, named) for key in self._key)
        if callable(self._context):
            return Settings(keys, checked_context(self._context(destination)))
        context: Any = fill_context(tuple(self._context.items()), named)
        return Settings(keys, dict(context))

    def _values(self, destination: str) -> Values:
        """Return what fills the gaps. Raises FormatError."""
        if len(self._names) == 1 and "=" not in destination:
            destination = f"{self._names[0]}={destination}"
        return PathFields(self._names)(f"{destination}/")

    def describe(self) -> dict[str, str]:
        key = "by destination" if callable(self._key) else ", ".join(map(str, self._key))
        return {"key": key, "context": "by destination" if callable(self._context) else ", ".join(self._context)}


class _Listed:
    """What the manifest says of the shard of a result."""

    def __init__(self, settings_of: _SettingsOf) -> None:
        self._settings_of = settings_of

    def __call__(self, result: Any) -> tuple[WrittenShard, Settings]:
        return shard_on_store(result.file_name), self._settings_of(result.destination)


class _SinkOf:
    """What WriteToFiles calls for each destination; a callable, since it re-makes an instance without arguments."""

    def __init__(self, make: Callable[[str], fileio.FileSink], settings_of: _SettingsOf) -> None:
        self._make, self._settings_of = make, settings_of

    def __call__(self, destination: str) -> fileio.FileSink:
        return _Sink(self._make(destination), self._settings_of)


class _Sink(fileio.FileSink):
    """The user's sink; its files are created under the settings of their destination."""

    def __init__(self, sink: fileio.FileSink, settings_of: _SettingsOf) -> None:
        self._sink, self._settings_of = sink, settings_of

    def create_metadata(self, destination: str, full_file_name: str) -> fileio.FileMetadata:
        metadata = self._sink.create_metadata(destination, full_file_name)
        return metadata._replace(mime_type=SettingsMimeType(metadata.mime_type, self._settings_of(destination)))

    def open(self, fh: BinaryIO) -> None:
        self._sink.open(fh)

    def write(self, record: Any) -> None:
        self._sink.write(record)

    def flush(self) -> None:
        self._sink.flush()


@typehints.with_output_types(fileio.FileResult)
class _CheckDoFn(beam.DoFn):
    """Looks whether each shard is there: WriteToFiles says nothing when a rename fails."""

    def __init__(self, path: str, temporary: str) -> None:
        self._path, self._temporary = path, temporary

    def process(self, result: Any) -> Iterator[Any]:
        path = FileSystems.join(self._path, result.file_name)
        if not FileSystems.exists(path):
            msg = (
                f"{inner_path(path)} is not there after Beam wrote it; a rename failed, which Beam passes over. "
                "Look for the reason in the worker's log at level DEBUG, and run the job again"
            )
            raise EnvelopeError(msg)
        with contextlib.suppress(OSError):  # not there on S3, and not empty before the last file has moved
            os.rmdir(inner_path(self._temporary))
        yield result._replace(file_name=inner_path(path))


def _sink_maker(sink: Any) -> Callable[[str], fileio.FileSink]:
    if sink is None:
        return _text_sink
    if isinstance(sink, fileio.FileSink):
        return _Copies(sink)
    if isinstance(sink, type):
        return _Instances(sink)
    return sink


def _text_sink(_destination: str) -> fileio.FileSink:
    return fileio.TextSink()


class _Copies:
    """Makes a copy of one sink for each file, with all that it was constructed with."""

    def __init__(self, sink: fileio.FileSink) -> None:
        self._sink = sink

    def __call__(self, _destination: str) -> fileio.FileSink:
        return copy.deepcopy(self._sink)


class _Instances:
    """Makes a new sink of one class for each file."""

    def __init__(self, kind: type[fileio.FileSink]) -> None:
        self._kind = kind

    def __call__(self, _destination: str) -> fileio.FileSink:
        return self._kind()
