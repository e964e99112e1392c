"""Lines through Beam: encrypted text against Beam's own text IO, the whole pipeline, by processor time."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from beam_envelope import KeyProvider
from benchmarks.data import check, new_key
from benchmarks.machine import work_folder
from benchmarks.measure import Sample, interleave, timed
from benchmarks.peers import OURS
from benchmarks.results import Measurement, Target, speed_rows
from benchmarks.settings import MIB, Say, Settings

BEAM: Final = "Beam's text IO"
MAX_TIMES_BEAM: Final = 1.10
_LINE_BYTES: Final = 100
_LINES: Final = 10_000


def measure_text(settings: Settings, say: Say) -> Measurement:
    """Measure writing and reading of the same lines, plain and encrypted."""
    repeats = max(1, settings.text_bytes // (_LINE_BYTES * _LINES))
    size = repeats * _LINES * _LINE_BYTES
    with work_folder(8 * size, settings.folder) as folder:
        key = new_key(folder)
        write = interleave(
            {
                BEAM: lambda: timed(partial(_write, folder / "plain", repeats, None)),
                OURS: lambda: timed(partial(_write, folder / "sealed", repeats, key)),
            },
            settings.job_rounds,
            before_round=lambda number: say(f"writing, round {number} of {settings.job_rounds}"),
        )
        for name, of_key in (("plain", None), ("sealed", key)):
            check(_read(folder / name, of_key) == repeats * _LINES, f"lines of {name} are missing")
        read = interleave(
            {
                BEAM: lambda: timed(partial(_read, folder / "plain", None)),
                OURS: lambda: timed(partial(_read, folder / "sealed", key)),
            },
            settings.job_rounds,
            before_round=lambda number: say(f"reading, round {number} of {settings.job_rounds}"),
        )
    return Measurement(
        "text",
        f"Lines through Beam, {size / MIB:.4g} MiB in lines of {_LINE_BYTES} bytes",
        "MB/s",
        "A whole pipeline in Beam's in-memory runner: WriteEncryptedText against WriteToText on the same lines, and "
        "ReadEncryptedText against ReadFromText. The targets compare processor time, by rounds.",
        (*speed_rows("write", write, size, [OURS]), *speed_rows("read", read, size, [OURS])),
        (
            Target(
                "WriteEncryptedText, processor time of WriteToText", _cpu(write), MAX_TIMES_BEAM, "x", at_least=False
            ),
            Target(
                "ReadEncryptedText, processor time of ReadFromText", _cpu(read), MAX_TIMES_BEAM, "x", at_least=False
            ),
        ),
    )


def _cpu(samples: dict[str, list[Sample]]) -> float:
    """Return our processor time as a multiple of Beam's: the median over the rounds."""
    pairs: Sequence[tuple[Sample, Sample]] = list(zip(samples[OURS], samples[BEAM], strict=True))
    return statistics.median((ours.cpu_s or 0) / (beams.cpu_s or 1) for ours, beams in pairs)


def _lines(number: int) -> list[str]:
    return [f"{number:08}-{line:08}-".ljust(_LINE_BYTES - 1, "x") for line in range(_LINES)]


def _write(folder: Path, repeats: int, key: KeyProvider | None) -> None:
    import apache_beam as beam  # noqa: PLC0415  # it takes seconds to import, and other measurements need none of it

    from beam_envelope import WriteEncryptedText  # noqa: PLC0415

    prefix = str(folder / "part")
    sink: Any = beam.io.WriteToText(prefix) if key is None else WriteEncryptedText(prefix, key=key)
    with _pipeline() as pipeline:
        _ = pipeline | beam.Create(range(repeats)) | beam.FlatMap(_lines) | sink


def _read(folder: Path, key: KeyProvider | None) -> int:
    import apache_beam as beam  # noqa: PLC0415

    from beam_envelope import ReadEncryptedText  # noqa: PLC0415

    pattern = str(folder / "part*")
    source: Any = beam.io.ReadFromText(pattern) if key is None else ReadEncryptedText(pattern, key=key)
    with _pipeline() as pipeline:
        counts = pipeline | source | beam.combiners.Count.Globally()
        _ = counts | beam.Map(lambda count: (folder / "count").write_text(str(count)))
    return int((folder / "count").read_text())


def _pipeline() -> Any:
    import apache_beam as beam  # noqa: PLC0415
    from apache_beam.options.pipeline_options import PipelineOptions  # noqa: PLC0415

    logging.getLogger("apache_beam").setLevel(logging.ERROR)  # it warns that it overwrites the files of the last round
    return beam.Pipeline("FnApiRunner", options=PipelineOptions([]))
