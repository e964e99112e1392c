"""The commands that work on files: encrypt, decrypt, cat; others have modules of their own."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineState
from rich.filesize import decimal
from rich.markup import escape

from beam_envelope import console, inspect_command, jobs, manifest_command, preflight, rotate_command, verify_command
from beam_envelope.arguments import context_of
from beam_envelope.errors import KeyAccessError, KmsUnavailableError
from beam_envelope.io.manifest_reader import ManifestReader, check_shard_id
from beam_envelope.io.shards import open_shard_at
from beam_envelope.keys.provider import kms_calls
from beam_envelope.settings import PathSettings
from beam_envelope.transforms.file_work import FilesTransform
from beam_envelope.transforms.plan import DecryptPlan, Task

_COPY_BYTES: Final = 1 << 20


def run(command: str, parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Run one command; return its exit status. Raises what the transforms raise."""
    arguments, options = jobs.parse(parser, words)
    if command == "encrypt":
        transform = jobs.encrypt_transform(arguments)
        tasks = jobs.plan_tasks(transform.plan, arguments.patterns)
        transform.work.check(tasks[0])
        with console.checking(arguments):
            sources = [task.source for task in tasks]
            preflight.check_encrypt(arguments, transform, options, sources, tell=console.tell, **_size(tasks))
        return _run_job("Encrypt", transform, tasks, arguments, options)
    if command == "decrypt":
        reader = jobs.decrypt_transform(arguments)
        tasks = _plan_decrypt(arguments, reader)
        _check_decrypt(arguments, reader, tasks, options)
        return _run_job("Decrypt", reader, tasks, arguments, options)
    if command == "rotate":
        return rotate_command.run(arguments, options)
    if command == "verify":
        return verify_command.run(arguments, options)
    if command == "manifest":
        return manifest_command.run(arguments)
    return inspect_command.run(arguments) if command == "inspect" else _cat(arguments)


def _plan_decrypt(arguments: argparse.Namespace, reader: FilesTransform) -> list[Task]:
    """Plan, which asks the KMS to authenticate manifests; where that fails, look at all keys."""
    plan: Any = reader.plan
    if arguments.no_check:  # this process may not be allowed to ask; the workers plan by themselves
        return jobs.plan_tasks(replace(plan, manifest=None), arguments.patterns)
    try:
        return jobs.plan_tasks(plan, arguments.patterns)
    except (KeyAccessError, KmsUnavailableError) as error:
        key_files = preflight.key_files_at(arguments.patterns)  # there are no tasks whose they could be
        with console.checking(arguments):
            preflight.explain(error, preflight.uses_of_reader(preflight.fixed_keys(arguments), key_files))
        raise


def _check_decrypt(
    arguments: argparse.Namespace, reader: FilesTransform, tasks: Sequence[Task], options: PipelineOptions
) -> None:
    """Open the first file, which asks the KMS as the job will; where that fails, or with workers, look at all keys."""
    key_files = preflight.key_files_for(arguments, [task.source for task in tasks])  # read when it is needed
    with console.checking(arguments):
        if not arguments.no_check and not arguments.check_workers:
            try:
                reader.work.check(tasks[0])
            except (KeyAccessError, KmsUnavailableError) as error:
                preflight.explain(error, preflight.uses_of_reader(preflight.fixed_keys(arguments), key_files))
                raise
        if arguments.check_workers:
            preflight.check_read(arguments, options, key_files, tell=console.tell, **_size(tasks))
    if arguments.check_workers and not arguments.no_check:
        reader.work.check(tasks[0])


def _size(tasks: Sequence[Task]) -> dict[str, int]:
    return {"n_tasks": len(tasks), "n_bytes": sum(task.end - task.start for task in tasks)}


def _run_job(
    verb: str,
    transform: FilesTransform,
    tasks: Sequence[Task],
    arguments: argparse.Namespace,
    options: PipelineOptions,
) -> int:
    n_bytes = sum(task.end - task.start for task in tasks)
    checks = dict(kms_calls.counts)  # what this thread, the launcher, has asked so far
    start = time.monotonic()
    pipeline = jobs.make_pipeline(options, len(tasks), n_bytes)
    _ = pipeline | "Files" >> beam.Create(arguments.patterns) | f"{verb}Files" >> transform
    quiet = contextlib.nullcontext() if arguments.verbose else console.quiet_workers()
    with quiet, jobs.fail_when_a_worker_dies(), console.JobProgress(f"{verb}ing", len(tasks), n_bytes):
        result = pipeline.run()
        state = result.wait_until_finish() or result.state
    if state != PipelineState.DONE:
        console.errors.print(f"The job ended as {state}. Run it again with --if-exists=skip to finish it.")
        return 1
    jobs.check_landed(tasks, arguments.output)
    seconds = time.monotonic() - start
    summary = jobs.summary(result)
    if not jobs.counters(result):
        return _tell_without_metrics(verb, len(tasks), arguments, seconds)
    if arguments.json:
        figures = {"output": arguments.output, **summary, "kms_calls_to_check": checks, "seconds": round(seconds, 3)}
        print(json.dumps(figures))
        return 0
    files = _count(summary["files"], "file")
    skipped = f", {summary['files_skipped']} skipped" if summary["files_skipped"] else ""
    skipped += f", {_count(summary['rows'], 'row')}" if "rows" in summary else ""
    calls = ", ".join(f"{count} {name}" for name, count in summary["kms_calls"].items()) or "none"
    checked = f", and {sum(checks.values())} to check the key first" if checks else ""
    console.output.print(
        f"{verb}ed {files}{skipped}, {decimal(summary['plaintext_bytes'])} in {seconds:.1f} s "
        f"({decimal(int(summary['plaintext_bytes'] / seconds))}/s) into {escape(arguments.output)}. "
        f"KMS calls: {calls}{checked}.",
        soft_wrap=True,
    )
    return 0


def _tell_without_metrics(verb: str, n_tasks: int, arguments: argparse.Namespace, seconds: float) -> int:
    """Say what is known of a job on a runner that counts nothing: that its files are there."""
    if arguments.json:
        print(json.dumps({"output": arguments.output, "files": n_tasks, "seconds": round(seconds, 3)}))
        return 0
    console.output.print(
        f"{verb}ed {_count(n_tasks, 'file')} in {seconds:.1f} s into {escape(arguments.output)}. This runner reports "
        "no metrics, so bytes and KMS calls are not known.",
        soft_wrap=True,
    )
    return 0


def _cat(arguments: argparse.Namespace) -> int:
    settings = PathSettings.of(arguments.key, context_of(arguments), None)
    listed = ManifestReader(arguments.manifest, settings.keys, settings.choice.pairs)
    plan = DecryptPlan(os.devnull, "overwrite", manifest=listed)
    for task in [task for pattern in arguments.patterns for task in plan.tasks(pattern)]:
        chosen = settings.for_path(task.source)
        key_file, shard = open_shard_at(task.source, chosen.keys, chosen.expected_context)
        with shard:
            check_shard_id(task.source, key_file, task.shard_id)
            shutil.copyfileobj(shard, sys.stdout.buffer, _COPY_BYTES)
    sys.stdout.buffer.flush()
    return 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
