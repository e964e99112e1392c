"""`beam-envelope rotate`: the job, and what it says of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.runner import PipelineState
from rich.markup import escape
from rich.table import Table

from beam_envelope import console, jobs, preflight
from beam_envelope.console import printable
from beam_envelope.errors import EnvelopeError
from beam_envelope.io.manifest import find_to_rotate
from beam_envelope.io.store import store_of

MANY_ON_DISK: Final = 20_000
MANY_ELSEWHERE: Final = 2_000
"""Below these numbers of key files, starting worker processes takes longer than the work itself."""
_AGAIN: Final = "by running it again"
_SHOWN: Final = 20


@dataclass
class _Report:
    """What the lines of a rotation's log add up to."""

    changes: Counter[tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=Counter)
    failed: list[tuple[str, str]] = field(default_factory=list)


def run(arguments: argparse.Namespace, options: PipelineOptions) -> int:
    """Rotate; return the exit status. Raises what the transform raises."""
    jobs.check_no_log(arguments.log)
    jobs.rotate_transform(arguments)
    found = [find_to_rotate(pattern) for pattern in arguments.patterns]
    paths = dict.fromkeys(path for ours, _ in found for path in ours)
    left = sorted({path for _, others in found for path in others if path not in paths})
    n_files = len(paths)
    with console.checking(arguments):
        preflight.check_rotate(arguments, options, preflight.readable_key_files(paths), n_bytes=0, tell=console.tell)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="beam-envelope-") as folder:
        # The workers of this machine write the log where this process reads it, also if nobody else wants it.
        local = not options.view_as(StandardOptions).runner
        log = arguments.log or (f"{folder}/log" if local else None)
        result = _run_job(arguments, options, n_files, log)
        if result is None:
            return 1
        counts = jobs.counters(result)
        report = None if log is None else _read_log(log)
    status = _tell(arguments, counts, report, n_files, time.monotonic() - start)
    for path in left:
        console.errors.print(
            f"[yellow]{escape(printable(path))} lists more shards than these, and stays as it is: who reads them needs "
            "a key that opens it. Rotate its folder, or add the new key to it (--add)[/]",
            soft_wrap=True,
        )
    return status


def _run_job(arguments: argparse.Namespace, options: PipelineOptions, n_files: int, log: str | None) -> Any:
    on_disk = not any("://" in pattern for pattern in arguments.patterns)
    many = n_files >= (MANY_ON_DISK if on_disk else MANY_ELSEWHERE)
    pipeline = jobs.make_pipeline(options, None, None if many else 0)
    jobs.add_rotation(pipeline, arguments, log)
    quiet = contextlib.nullcontext() if arguments.verbose else console.quiet_workers()
    verb = "Looking at" if arguments.dry_run else "Rotating"
    with quiet, jobs.fail_when_a_worker_dies(_AGAIN), console.JobProgress(verb, n_files, None):
        result = pipeline.run()
        state = result.wait_until_finish() or result.state
    if state != PipelineState.DONE:
        console.errors.print(f"The job ended as {state}. Run it again to finish it.")
        return None
    return result


def _tell(
    arguments: argparse.Namespace, counts: dict[str, int], report: _Report | None, n_files: int, seconds: float
) -> int:
    done, changed = counts.get("key_files", 0), counts.get("key_files_changed", 0)
    failed = counts.get("key_files_failed", 0)
    if counts and done + failed < n_files:
        msg = f"the runner reports success, but {n_files - done - failed} of {n_files} key files were passed over"
        raise EnvelopeError(f"{msg}. Run the rotation again")
    calls = {name.removeprefix("kms_"): n for name, n in sorted(counts.items()) if name.startswith("kms_")}
    if arguments.json:
        figures: dict[str, Any] = {"key_files": done + failed, "changed": changed, "unchanged": done - changed}
        figures |= {"failed": failed, "dry_run": arguments.dry_run, "kms_calls": calls, "seconds": round(seconds, 3)}
        if report is not None:
            figures["changes"] = [
                {"before": before, "after": after, "key_files": n} for (before, after), n in report.changes.items()
            ]
            figures["failures"] = [{"key_file": path, "message": message} for path, message in report.failed]
        print(json.dumps(figures))  # noqa: T201  # what the command is asked for
    else:
        if report is not None and report.changes:
            _show_changes(report, dry_run=arguments.dry_run)
        verb = "Would change" if arguments.dry_run else "Changed"
        asked = ", ".join(f"{n} {name}" for name, n in calls.items()) or "none"
        console.output.print(
            f"{verb} {changed} of {_count(done + failed)} in {seconds:.1f} s; {done - changed} need"
            f"{'s' if done - changed == 1 else ''} no change, {failed} failed. KMS calls: {asked}.",
            soft_wrap=True,
        )
    if failed:
        _show_failures(failed, report, arguments.log)
    return 1 if failed else 0


def _show_changes(report: _Report, *, dry_run: bool) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("opened by", overflow="fold")
    table.add_column("would be opened by" if dry_run else "now opened by", overflow="fold")
    table.add_column("key files", justify="right", no_wrap=True)
    for (before, after), n in report.changes.most_common():
        table.add_row(escape(printable("\n".join(before))), escape(printable("\n".join(after))), str(n))
    console.output.print(table)


def _show_failures(failed: int, report: _Report | None, log: str | None) -> None:
    shown = [] if report is None else report.failed[:_SHOWN]
    for path, message in shown:
        text = message if path in message else f"{path}: {message}"
        console.errors.print(f"[yellow]{escape(printable(text))}[/]", soft_wrap=True)
    more = failed - len(shown)
    where = f"{log} has them all" if log else "--log FILE tells of each"
    rest = f" {_count(more)} more; {where}." if more else ""
    console.errors.print(
        f"[bold red]beam-envelope rotate:[/] {_count(failed)} could not be rotated, and {_are(failed)} as "
        f"{'it was' if failed == 1 else 'they were'}.{escape(rest)} Mend what is wrong, and run it again",
        soft_wrap=True,
    )


def _read_log(path: str) -> _Report:
    report = _Report()
    for row in _rows(path):
        if "error" in row:
            report.failed.append((row["key_file"], row["message"]))
        elif row["changed"]:
            report.changes[tuple(row["before"]), tuple(row["after"])] += 1
    report.failed.sort()
    return report


def _rows(path: str) -> Iterator[dict[str, Any]]:
    if path.startswith("/") and not Path(path).exists():
        return  # of a job that found nothing to say
    with store_of(path).open(path) as stream:
        yield from map(json.loads, stream.read().splitlines())


def _count(number: int) -> str:
    return f"{number} key file{'' if number == 1 else 's'}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"
