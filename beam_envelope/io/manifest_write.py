"""WithManifest: the last step of every bounded write, which lists what was written."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Generic, TypeVar

import apache_beam as beam
from apache_beam import typehints
from apache_beam.transforms import window

from beam_envelope.io.manifest import WrittenShard, add_to_manifest
from beam_envelope.io.options import Settings
from beam_envelope.transforms.metrics import Progress

Sections = Callable[[Any], "tuple[WrittenShard, Settings]"]
"""What tells of a result which shard it is of, and under which keys and context the shard's section goes."""

_T = TypeVar("_T")
_ONE: Final = 0
_BLOCK: Final = 500

Listed = tuple[Any, WrittenShard, Settings]
"""A result, its shard, and under which keys and context the shard's section goes."""


class WithManifest(beam.PTransform["beam.PCollection[Any]", "beam.PCollection[Any]"]):
    """Adds the shards of a bounded write to the manifest of its folder, and passes the results on when that is done.

    The results of an unbounded write pass as they are: nobody knows when they would be complete.

    Args:
        folder: the output folder, with a slash at its end.
        section_of: as `Sections`; runs in parallel.
    """

    def __init__(self, folder: str, section_of: Sections) -> None:
        """Take what to list where."""
        super().__init__()
        self._folder, self._section_of = folder, section_of

    def expand(self, results: beam.PCollection[Any]) -> beam.PCollection[Any]:
        """Return the results."""
        if not results.is_bounded:
            return results
        listed = (
            results
            | "List" >> beam.ParDo(_ListDoFn(self._section_of))
            | "Rewindow" >> beam.WindowInto(window.GlobalWindows())
            | "Gather" >> beam.CombinePerKey(_GatherFn())
        )
        kind = results.element_type
        passed: beam.PCollection[Any] = listed | "Write" >> beam.ParDo(_WriteDoFn(self._folder)).with_output_types(kind)
        return passed


@typehints.with_output_types(tuple[int, Any])
class _ListDoFn(beam.DoFn):
    def __init__(self, section_of: Sections) -> None:
        self._section_of = section_of

    def process(self, result: Any) -> Iterator[tuple[int, Listed]]:
        yield _ONE, (result, *self._section_of(result))


class _Gathered(Generic[_T]):
    """Many results in little memory, since one worker has those of a whole job: blocks of them, compressed."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._open: list[_T] = []

    def add(self, one: _T) -> None:
        self._open.append(one)
        if len(self._open) == _BLOCK:
            self.close()

    def close(self) -> None:
        """Compress what is left. Pickles are how Beam itself sends such values; here one has many."""
        if self._open:
            self._blocks.append(zlib.compress(pickle.dumps(self._open, pickle.HIGHEST_PROTOCOL)))
            self._open = []

    def extend(self, other: _Gathered[_T]) -> None:
        self._blocks += other._blocks
        for one in other._open:
            self.add(one)

    def __iter__(self) -> Iterator[_T]:
        for block in self._blocks:
            yield from pickle.loads(zlib.decompress(block))  # noqa: S301  # from the job itself
        yield from self._open


class _GatherFn(beam.CombineFn):
    """Compresses results where they are made, before they are sent to the one worker."""

    def create_accumulator(self) -> _Gathered[Listed]:
        return _Gathered()

    def add_input(self, gathered: _Gathered[Listed], listed: Listed) -> _Gathered[Listed]:
        gathered.add(listed)
        return gathered

    def merge_accumulators(self, parts: Iterable[_Gathered[Listed]]) -> _Gathered[Listed]:
        whole: _Gathered[Listed] = _Gathered()
        for part in parts:
            whole.extend(part)
        return whole

    def compact(self, gathered: _Gathered[Listed]) -> _Gathered[Listed]:
        gathered.close()
        return gathered

    def extract_output(self, gathered: _Gathered[Listed]) -> _Gathered[Listed]:
        return gathered


@typehints.with_input_types(tuple[int, Any])
class _WriteDoFn(beam.DoFn):
    def __init__(self, folder: str) -> None:
        self._folder = folder

    def process(self, element: tuple[int, Iterable[Listed]]) -> Iterator[Any]:
        sections: dict[tuple[Any, ...], tuple[Settings, _Gathered[WrittenShard]]] = {}
        for _, shard, settings in element[1]:
            of_section = (settings.keys, *sorted(settings.context.items()))
            sections.setdefault(of_section, (settings, _Gathered()))[1].add(shard)
        with Progress():
            for settings, shards in sections.values():
                add_to_manifest(self._folder, shards, settings.keys, settings.context)
        del sections
        for result, _, _ in element[1]:
            yield result
