"""WriteEncryptedText with templates that lines fill: a shard for each bundle and key, in folders that say the key.

Beam's text sink has one file for each bundle, so this is its file sink with destinations: `tenant=acme/part-...`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO, Final

import apache_beam as beam
from apache_beam import coders
from apache_beam.coders import coders as coder_classes
from apache_beam.io import fileio

from beam_envelope.io.fileio import WriteEncryptedFiles
from beam_envelope.io.filesystem import inner_path
from beam_envelope.io.store import split_path
from beam_envelope.keys.choice import ElementFields, KeyChoice, KeyFields

MAX_OPEN_SHARDS: Final = 100
"""How many shards a bundle holds open; Beam sends lines of further keys through its shuffle, as plaintext."""
_OPTIONS: Final = ("append_trailing_newlines", "coder", "file_name_suffix", "header")


class WriteTextByKey(beam.PTransform["beam.PCollection[Any]", "beam.PCollection[str]"]):
    """Writes each line into a shard under the key that it chooses. Output: the paths of the shards.

    Args:
        prefix: the folder and the start of the files' names.
        choice: the keys and the encryption context, templates among them.
        key_fields: a function of the line that returns what fills them.
        options: those of WriteToText that hold here.
        manifest: list the shards of a bounded input.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form.
    """

    def __init__(
        self,
        prefix: str,
        choice: KeyChoice,
        key_fields: KeyFields,
        options: Mapping[str, Any],
        *,
        manifest: bool = True,
    ) -> None:
        super().__init__()
        if unknown := sorted(options.keys() - set(_OPTIONS)):
            raise ValueError(
                f"{', '.join(unknown)}: not where lines choose their keys, since each bundle writes a shard for each "
                f"key then. These options hold: {', '.join(_OPTIONS)}"
            )
        folder, name = split_path(inner_path(prefix))
        fields = ElementFields(choice.names, key_fields)
        self._write = WriteEncryptedFiles(
            folder,
            key=choice.keys,
            context=choice.pairs,  # type: ignore[arg-type]  # a writer's is never ANY_CONTEXT
            manifest=manifest,
            destination=_Destination(fields),
            sink=_LinesOf(options.get("coder"), options.get("header"), options.get("append_trailing_newlines", True)),
            file_naming=_Naming(name or "part", options.get("file_name_suffix", "")),
            max_writers_per_bundle=MAX_OPEN_SHARDS,
        )

    def expand(self, lines: beam.PCollection[Any]) -> beam.PCollection[str]:
        """Return the paths of the shards."""
        return lines | "Write" >> self._write | "Paths" >> beam.Map(_path).with_output_types(str)

    def display_data(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown."""
        return self._write.display_data()


class _Destination:
    """Names the folders of an element as Hive does; that is also where the sink takes the key from."""

    def __init__(self, fields: ElementFields) -> None:
        self._fields = fields

    def __call__(self, element: Any) -> str:
        values = zip(self._fields.names, self._fields(element), strict=True)
        return "/".join(f"{name}={value}" for name, value in values)


class _Naming:
    """Names a shard: `tenant=acme/part-00000-of-00002.csv`; with its window, where there is one."""

    def __init__(self, start: str, suffix: str) -> None:
        self._start, self._suffix = start, suffix

    def __call__(self, window: Any, pane: Any, index: Any, total: Any, compression: Any, destination: str) -> str:
        named: Any = fileio.destination_prefix_naming(self._suffix)
        return f"{destination}/{named(window, pane, index, total, compression, self._start)}"


class _LinesOf:
    """Makes the sink of a shard."""

    def __init__(self, coder: coders.Coder | None, header: str | None, newlines: bool) -> None:  # noqa: FBT001
        self._coder, self._header, self._newlines = coder, header, newlines

    def __call__(self, _destination: str) -> fileio.FileSink:
        return _Lines(self._coder or coder_classes.ToBytesCoder(), self._header, self._newlines)


class _Lines(fileio.FileSink):
    """Lines, as Beam's text sink writes them."""

    def __init__(self, coder: coders.Coder, header: str | None, newlines: bool) -> None:  # noqa: FBT001
        self._coder, self._header, self._end = coder, header, b"\n" if newlines else b""

    def open(self, fh: BinaryIO) -> None:
        self._file = fh
        if self._header is not None:
            fh.write(self._header.encode() + self._end)

    def write(self, record: Any) -> None:
        self._file.write(self._coder.encode(record) + self._end)

    def flush(self) -> None:
        self._file.flush()


def _path(result: Any) -> str:
    return str(result.file_name)
