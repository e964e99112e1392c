"""WriteRotationLog: what RotateKeys did, for auditors: one JSON object a line, one line for each key file."""

from __future__ import annotations

import json
from typing import Any

import apache_beam as beam

from beam_envelope.transforms.job_log import WriteLog, now
from beam_envelope.transforms.plan import FailedFile
from beam_envelope.transforms.rotate import RotatedFile


class WriteRotationLog(beam.PTransform[Any, Any]):
    """Writes a log file, whole, at the end of the job. Nothing in it is secret.

    Input: a tuple of two PCollections: the `RotatedFile`s of `RotateKeys`, and the `FailedFile`s of its error handler.

    Args:
        path: the file, on any filesystem of Beam; one that is there is replaced.
        dry_run: say on each line that nothing was changed.
    """

    def __init__(self, path: str, *, dry_run: bool = False) -> None:
        """Write nothing yet."""
        super().__init__()
        self._path, self._dry_run = path, dry_run

    def expand(self, results: tuple[beam.PCollection[Any], beam.PCollection[Any]]) -> beam.PCollection[Any]:
        """Return a PCollection of the path."""
        note = {"dry_run": True} if self._dry_run else {}
        # The time is taken where a file was rotated, in the same stage, and not where the log is written.
        lines = [
            results[0] | "Rotated" >> beam.Map(_rotated_line, note).with_output_types(str),
            results[1] | "Failed" >> beam.Map(_failed_line, note).with_output_types(str),
        ]
        return lines | beam.Flatten() | "Log" >> WriteLog(self._path)


def _rotated_line(row: RotatedFile, note: dict[str, bool]) -> str:
    keys = {"before": list(row.before), "after": list(row.after), "changed": row.changed}
    return json.dumps({"time": now(), "key_file": row.key_file, **keys, **note})


def _failed_line(row: FailedFile, note: dict[str, bool]) -> str:
    return json.dumps({"time": now(), "key_file": row.source, "error": row.error, "message": row.message, **note})
