"""`beam-envelope verify`: the job, and what it says of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.runner import PipelineResult, PipelineState
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from beam_envelope import console, jobs, preflight
from beam_envelope.console import printable
from beam_envelope.errors import EnvelopeError
from beam_envelope.io.store import store_of
from beam_envelope.transforms.verify_find import find_files
from beam_envelope.transforms.verify_plan import RANGE_BYTES, UNFINISHED

MANY_ON_DISK: Final = 20_000
MANY_ELSEWHERE: Final = 200
"""Below these numbers of files, starting worker processes takes longer than a quick look at them."""
_AGAIN: Final = "by running it again"
_SHOWN: Final = 20
_NOTES: Final = {UNFINISHED: "unfinished; delete it if no job is running"}


class Outcome(NamedTuple):
    """How a verification went: how many files there were, and how many of them are not well."""

    files: int
    problems: int


def run(arguments: argparse.Namespace, options: PipelineOptions) -> int:
    """Verify; return the exit status. Raises what the transform raises."""
    jobs.check_no_log(arguments.log)
    jobs.verify_transform(arguments)
    found: dict[str, int | None] = {}
    for pattern in arguments.patterns:
        found = {**find_files(pattern), **{path: size for path, size in found.items() if size is not None}}
    with console.checking(arguments):
        preflight.check_read(arguments, options, preflight.key_files_of(found), n_bytes=0, tell=console.tell)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="beam-envelope-") as folder:
        # The workers of this machine write the log where this process reads it, also if nobody else wants it.
        local = not options.view_as(StandardOptions).runner
        log = arguments.log or (f"{folder}/log" if local else None)
        result = _run_job(arguments, options, found, log)
        if result is None:
            return 1
        outcome = outcome_of(result, log)
        rows = None if log is None else list(_rows(log))
    if outcome.files < len(found):
        msg = f"the runner reports success, but {len(found) - outcome.files} of {len(found)} files were passed over"
        raise EnvelopeError(f"{msg}. Run the verification again")
    return _tell(arguments, outcome, jobs.counters(result), rows, time.monotonic() - start)


def outcome_of(result: PipelineResult, log: str | None) -> Outcome:
    """Return how a finished job went, from its metrics or, where the runner has none, from its log.

    Raises:
        EnvelopeError: there is neither, so nobody can tell.
        OSError: the log cannot be read.
    """
    counts = jobs.counters(result)
    if counts.get("files"):
        return Outcome(counts["files"], counts.get("files_with_problems", 0))
    if log is None:
        raise EnvelopeError("the runner reports no metrics, so nobody knows how it went. Run it again with --log FILE")
    rows = list(_rows(log))
    return Outcome(len(rows), sum(not row["ok"] for row in rows))


def _run_job(
    arguments: argparse.Namespace, options: PipelineOptions, found: dict[str, int | None], log: str | None
) -> Any:
    sizes = [size or 0 for size in found.values()]
    if arguments.quick:
        on_disk = not any("://" in pattern for pattern in arguments.patterns)
        many = len(sizes) >= (MANY_ON_DISK if on_disk else MANY_ELSEWHERE)
        pipeline = jobs.make_pipeline(options, None, None if many else 0)
    else:
        pipeline = jobs.make_pipeline(options, sum(size // RANGE_BYTES + 1 for size in sizes), sum(sizes))
    jobs.add_verification(pipeline, arguments, log)
    quiet = contextlib.nullcontext() if arguments.verbose else console.quiet_workers()
    verb = "Looking at" if arguments.quick else "Verifying"
    with quiet, jobs.fail_when_a_worker_dies(_AGAIN), console.JobProgress(verb, len(sizes), sum(sizes)):
        result = pipeline.run()
        state = result.wait_until_finish() or result.state
    if state != PipelineState.DONE:
        console.errors.print(f"The job ended as {state}. Run it again.")
        return None
    return result


def _tell(
    arguments: argparse.Namespace,
    outcome: Outcome,
    counts: dict[str, int],
    rows: list[dict[str, Any]] | None,
    seconds: float,
) -> int:
    n_bytes = counts.get("bytes_authenticated", 0)
    calls = {name.removeprefix("kms_"): n for name, n in sorted(counts.items()) if name.startswith("kms_")}
    if arguments.json:
        figures: dict[str, Any] = {"files": outcome.files, "problems": outcome.problems, "quick": arguments.quick}
        figures |= {"bytes_authenticated": n_bytes, "kms_calls": calls, "seconds": round(seconds, 3)}
        if rows is not None:
            figures["problem_files"] = [_short(row) for row in rows if not row["ok"]]
            figures["not_checked"] = [_short(row) for row in rows if row["kind"] in _NOTES]
        print(json.dumps(figures))  # noqa: T201  # what the command is asked for
    else:
        if rows is not None:
            _show([row for row in rows if not row["ok"]], [row for row in rows if row["kind"] in _NOTES], arguments.log)
        asked = ", ".join(f"{n} {name}" for name, n in calls.items()) or "none"
        done = (
            "key files, commitments and lengths checked"
            if arguments.quick
            else f"{decimal(n_bytes)} authenticated ({decimal(int(n_bytes / seconds))}/s)"
        )
        console.output.print(
            f"{'Looked at' if arguments.quick else 'Verified'} {_count(outcome.files)} in {seconds:.1f} s, {done}: "
            f"{outcome.problems or 'no'} problem{'' if outcome.problems == 1 else 's'}. KMS calls: {asked}.",
            soft_wrap=True,
        )
    if outcome.problems:
        has = "has a problem" if outcome.problems == 1 else "have problems"
        where = "" if rows is not None else "; --log FILE, or the log of the workers, tells of each"
        console.errors.print(
            f"[bold red]beam-envelope verify:[/] {outcome.problems} of {_count(outcome.files)} {has}{where}",
            soft_wrap=True,
        )
    return 1 if outcome.problems else 0


def _show(problems: list[dict[str, Any]], notes: list[dict[str, Any]], log: str | None) -> None:
    if problems:
        table = Table(box=None, pad_edge=False)
        for heading in ("file", "kind", "problem"):
            table.add_column(heading, overflow="fold")
        for row in problems[:_SHOWN]:
            text = row["problem"].removeprefix(f"{row['path']} ").removeprefix(f"{row['path']}: ")
            table.add_row(*(escape(printable(cell)) for cell in (row["path"], row["kind"], text)))
        console.output.print(table)
    if len(problems) > _SHOWN:
        more = f"{len(problems) - _SHOWN} more with problems; {log or '--json, or --log FILE,'} tells of each."
        console.output.print(escape(more), soft_wrap=True)
    for row in notes[:_SHOWN]:
        text = escape(printable(f"{row['path']}: {_NOTES[row['kind']]}"))
        console.output.print(f"[yellow]{text}[/]", soft_wrap=True)
    if len(notes) > _SHOWN:
        console.output.print(f"[yellow]{len(notes) - _SHOWN} more like these.[/]", soft_wrap=True)


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {"path": row["path"], "kind": row["kind"], "problem": row["problem"] or _NOTES[row["kind"]]}


def _rows(path: str) -> Iterator[dict[str, Any]]:
    if path.startswith("/") and not Path(path).exists():
        return  # of a job that found nothing to say
    with store_of(path).open(path) as stream:
        yield from sorted(map(json.loads, stream.read().splitlines()), key=lambda row: str(row["path"]))


def _count(number: int) -> str:
    return f"{number} file{'' if number == 1 else 's'}"
