"""Logs of jobs, for auditors: one JSON object a line, in one file that is written whole at the end of the job."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any

import apache_beam as beam

from beam_envelope.io.store import store_of


class WriteLog(beam.PTransform[Any, Any]):
    """Writes lines into one file, in no order. Output: its path, or nothing if there were no lines.

    Args:
        path: the file, on any filesystem of Beam; one that is there is replaced.
    """

    def __init__(self, path: str) -> None:
        """Write nothing yet."""
        super().__init__()
        self._path = path

    def expand(self, lines: beam.PCollection[str]) -> beam.PCollection[str]:
        """Return a PCollection of the path."""
        together = lines | beam.Map(_with_no_key).with_output_types(tuple[None, str]) | beam.GroupByKey()
        return together | "Write" >> beam.Map(_write, self._path).with_output_types(str)


def now() -> str:
    """Return the time for a line: UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _with_no_key(line: str) -> tuple[None, str]:
    return None, line


def _write(lines: tuple[None, Iterable[str]], path: str) -> str:
    output = store_of(path).create(path, overwrite=True, size_hint=0)
    try:
        for line in lines[1]:
            output.write(line.encode() + b"\n")
        output.commit()
    except BaseException:
        output.abort()
        raise
    return path
