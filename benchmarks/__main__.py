"""`python -m benchmarks`: runs the measurements, prints the report, and ends with status 1 if a target is missed."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from rich.console import Console

from beam_envelope.transforms.lines import parse_size
from benchmarks import chart, machine, report
from benchmarks.columns import measure_columns
from benchmarks.files import measure_files
from benchmarks.jobs import measure_jobs
from benchmarks.memory import measure_peak
from benchmarks.parquet import measure_parquet
from benchmarks.records import measure_record_pipeline, measure_records
from benchmarks.results import Measurement
from benchmarks.settings import FULL, MIB, QUICK, Say, Settings
from benchmarks.shards import measure_memory, measure_random
from benchmarks.text import measure_text

_RESULTS: Final = Path(__file__).parent / "results"
_PEERS: Final = ("aws_encryption_sdk", "pyrage")

MEASUREMENTS: Final[dict[str, Callable[[Settings, Say], Measurement]]] = {
    "shards": measure_memory,
    "files": measure_files,
    "jobs": measure_jobs,
    "memory": measure_peak,
    "random": measure_random,
    "text": measure_text,
    "records": measure_records,
    "pipeline": measure_record_pipeline,
    "columns": measure_columns,
    "parquet": measure_parquet,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurements; return the exit status.

    Raises:
        SystemExit: an argument is wrong, there is no room on the disk, a peer is missing or gave wrong output.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    names: list[str] = arguments.only or list(MEASUREMENTS)
    missing = [name for name in _PEERS if importlib.util.find_spec(name) is None]
    if missing and not {"files", "records"}.isdisjoint(names):
        verb = "is" if len(missing) == 1 else "are"
        parser.error(f"{' and '.join(missing)} {verb} not installed; run: pip install -e '.[bench]', or make bench")
    try:
        settings = settings_of(arguments)
    except ValueError as error:
        parser.error(str(error))

    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    start = time.monotonic()
    facts = machine.describe()
    progress = Console(stderr=True, highlight=False, soft_wrap=True, file=sys.stderr)
    measurements = []
    for name in names:

        def say(text: str, name: str = name) -> None:
            progress.print(f"[{time.monotonic() - start:4.0f} s] {name}: {text}", markup=False)

        measurements.append(MEASUREMENTS[name](settings, say))
    seconds = time.monotonic() - start
    found = report.Report(facts, started, seconds, quick=arguments.quick, measurements=measurements)
    screen = Console(highlight=False)
    report.show(found, screen)
    report.write_json(found, arguments.json)
    chart.write_svg(found, arguments.svg)
    screen.print(f"Written: {arguments.json}, {arguments.svg}", soft_wrap=True)
    return 1 if found.missed and not arguments.quick else 0


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the settings that the arguments ask for. Raises ValueError."""
    if arguments.folder is not None and not arguments.folder.is_dir():
        msg = f"--folder is a folder that exists, not {arguments.folder}"
        raise ValueError(msg)
    settings = dataclasses.replace(QUICK if arguments.quick else FULL, folder=arguments.folder)
    if arguments.size is not None:
        size = parse_size(arguments.size)
        if size % MIB:
            msg = f"--size is a whole number of MiB, not {arguments.size}"
            raise ValueError(msg)
        settings = dataclasses.replace(settings, size=size, slow_size=min(size, settings.slow_size))
    if arguments.rounds is not None:
        if arguments.rounds < 1:
            msg = f"--rounds is 1 or more, not {arguments.rounds}"
            raise ValueError(msg)
        settings = dataclasses.replace(settings, rounds=arguments.rounds, job_rounds=arguments.rounds)
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure beam_envelope beside its peers.", allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds; a missed target is no failure")
    parser.add_argument(
        "--only", action="append", choices=list(MEASUREMENTS), help="one measurement; may be given again"
    )
    parser.add_argument("--size", help="bytes of the random data, as 256MiB (the default)")
    parser.add_argument("--rounds", type=int, help="how often each contender is measured")
    parser.add_argument("--folder", type=Path, help="where to make files; default: in memory if there is room")
    parser.add_argument("--json", type=Path, default=_RESULTS / "latest.json", help="the report; default: %(default)s")
    parser.add_argument("--svg", type=Path, default=_RESULTS / "latest.svg", help="the chart; default: %(default)s")
    return parser


if __name__ == "__main__":
    # A run that is told to stop removes its files first: they may be gigabytes of memory.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
