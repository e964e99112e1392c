"""WriteEncryptedText of an unbounded input: a shard for each window and number, written whole where its lines are.

Beam's own expansion passes temporary names on as side inputs, which its portable Flink runner cannot put into a
checkpoint (each one fails the job, with "[B cannot be cast to class WindowedValue"), and loses a pane where two of a
window are in one bundle. Here nothing is passed on: a shard is written under its final name, which appears at once when
it is whole, so that a second try puts the same lines in its place.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam import typehints
from apache_beam.io import iobase

from beam_envelope.io.filesystem import inner_path


class WriteTextByWindow(beam.PTransform["beam.PCollection[Any]", "beam.PCollection[str]"]):
    """Writes the lines of each window and pane into `num_shards` shards. Output: the paths of the shards.

    Args:
        sink: of Beam's WriteToText; its files are opened by `open`.

    Raises:
        ValueError: one of its options does not hold here.
    """

    def __init__(self, sink: Any) -> None:
        super().__init__()
        if sink.max_records_per_shard or sink.max_bytes_per_shard:
            raise ValueError(
                "max_records_per_shard and max_bytes_per_shard do not hold for an unbounded input: each window has "
                "num_shards shards. Take more of them, or shorter windows"
            )
        if "%(window" not in sink.shard_name_format:
            raise ValueError(
                f"shard_name_template={sink.shard_name_template!r} does not say the window, so each window would "
                "overwrite the shards of the last one. Leave it out, or take '-W-SSSSS-of-NNNNN'"
            )
        self._sink, self._num_shards = sink, max(1, sink.num_shards)

    def expand(self, lines: beam.PCollection[Any]) -> beam.PCollection[str]:
        """Return the paths. Raises ValueError: there are no windows, and no triggering_frequency to make some."""
        windowed = iobase.WriteImpl(self._sink)._apply_windowing(lines)  # noqa: SLF001  # what triggering_frequency is
        number = beam.ParDo(_NumberDoFn(self._num_shards))
        numbered = windowed | "Number" >> number.with_output_types(typehints.KV[int, lines.element_type])
        grouped = numbered | "Group" >> beam.GroupByKey()
        return grouped | "Write" >> beam.ParDo(_WriteShardDoFn(self._sink, self._num_shards)).with_output_types(str)


class _NumberDoFn(beam.DoFn):
    """Deals elements out to shards; each worker begins with another one."""

    def __init__(self, num_shards: int) -> None:
        self._num_shards = num_shards

    def setup(self) -> None:
        self._numbers = itertools.count(random.randrange(self._num_shards))  # noqa: S311  # no secret

    def process(self, element: Any) -> Iterator[tuple[int, Any]]:
        yield next(self._numbers) % self._num_shards, element


class _WriteShardDoFn(beam.DoFn):
    def __init__(self, sink: Any, num_shards: int) -> None:
        self._sink, self._num_shards = sink, num_shards

    def process(
        self,
        element: tuple[int, Iterable[Any]],
        in_window: Any = beam.DoFn.WindowParam,
        pane: Any = beam.DoFn.PaneInfoParam,
    ) -> Iterator[str]:
        number, lines = element
        path = self._path(number, in_window, pane.index)
        shard = self._sink.open(path)
        for line in lines:  # what fails here leaves a shard that was not closed, and so is none
            self._sink.write_record(shard, line)
        self._sink.close(shard)
        yield inner_path(path)

    def _path(self, number: int, in_window: Any, pane: int) -> str:
        path: str = self._sink._get_final_name(number, self._num_shards, in_window)  # noqa: SLF001  # as Beam names them
        if pane > 0:  # late or early lines of a window that has shards already
            suffix = self._sink.file_name_suffix.get()
            path = f"{path.removesuffix(suffix)}-pane-{pane}{suffix}"
        return path
