"""What the command and the programs in pipelines/ share: the default runner, and checks before and after a job."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import gc
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions, _BeamArgumentParser
from apache_beam.portability.api import beam_provision_api_pb2
from apache_beam.runners.portability.fn_api_runner import fn_runner
from apache_beam.runners.portability.portable_runner import JobServiceHandle
from apache_beam.runners.runner import PipelineResult, create_runner
from apache_beam.transforms.error_handling import CollectingErrorHandler

from beam_envelope import table_arguments
from beam_envelope.arguments import context_of
from beam_envelope.errors import EnvelopeError, FormatError
from beam_envelope.io.store import existing, same_place, store_of
from beam_envelope.keys.context import AnyContext
from beam_envelope.settings import chosen_keys, expected_context, written_context
from beam_envelope.transforms.files import DecryptFiles, EncryptFiles
from beam_envelope.transforms.metrics import NAMESPACE
from beam_envelope.transforms.plan import DecryptPlan, EncryptPlan, FailedFile, Task, as_folder, unique_task
from beam_envelope.transforms.rotate import RotateKeys
from beam_envelope.transforms.rotation_log import WriteRotationLog
from beam_envelope.transforms.tables import DecryptAny, DecryptTables, EncryptTables
from beam_envelope.transforms.verify import VerifyShards, WriteVerificationLog
from beam_envelope.transforms.verify_plan import VerifiedFile

_WAKE_UP: Final = signal.SIGUSR1
_LATE_WORKERS_S: Final = 0.5

DASK_RUNNER: Final = "apache_beam.runners.dask.dask_runner.DaskRunner"

SMALL_JOB_BYTES: Final = 64 << 20
"""Below this, starting worker processes takes longer than the work itself."""


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, PipelineOptions]:
    """Parse our arguments, and Beam's behind them.

    An option that neither knows ends the program with status 2: Beam would ignore it, and a misspelt `--context` would
    encrypt without one. What our arguments do not say comes from our options (`--envelope_key`), then the environment.
    """
    arguments, rest = parser.parse_known_args(argv)
    _load_dask(rest)
    beam_parser = _BeamArgumentParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    for options in PipelineOptions.__subclasses__():
        options._add_argparse_args(beam_parser)  # noqa: SLF001  # as PipelineOptions itself does
    _, unknown = beam_parser.parse_known_args(rest)
    for word in unknown:
        if word.startswith("-"):
            names = [name for action in parser._actions for name in action.option_strings]  # noqa: SLF001  # no public list
            close = difflib.get_close_matches(word.partition("=")[0], names, n=1)
            hint = f"did you mean {close[0]}?" if close else "neither beam-envelope nor Beam has it"
            parser.error(f"unknown option {word}: {hint}")
        parser.error(f"{word!r} is left over: give all files and patterns together, before the options")
    given = PipelineOptions(rest)
    FileSystems.set_options(given)  # they hold from here on, also for keys
    _fill(parser, arguments)
    return arguments, given


def _fill(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Take key and context from where they are set, for commands that have them and were not given them."""
    if getattr(arguments, "key", "") is None:  # `inspect` goes without one, and has an empty list
        try:
            arguments.key = list(chosen_keys(None, templates=True))
        except (ValueError, FormatError) as error:
            parser.error(str(error))
    if getattr(arguments, "context", None) == [] and not getattr(arguments, "any_context", False):
        expected = expected_context(None) if hasattr(arguments, "any_context") else written_context(None)
        if isinstance(expected, AnyContext):
            arguments.any_context = True
        else:
            arguments.context = [f"{name}={value}" for name, value in expected.items()]


def _load_dask(words: Sequence[str]) -> None:
    """Import DaskRunner if it is asked for: unlike those of other runners, its options are known only then."""
    name = PipelineOptions(words).view_as(StandardOptions).runner or ""
    if "dask" in name.lower():
        try:
            create_runner(name)
        except ValueError:
            raise EnvelopeError(f"Beam knows no short name for Dask's runner: write --runner={DASK_RUNNER}") from None
        except ImportError as error:
            raise EnvelopeError(
                f"DaskRunner needs Dask: pip install 'apache-beam[dask]' here and on the workers ({error})"
            ) from None


def encrypt_transform(arguments: argparse.Namespace) -> EncryptFiles | EncryptTables:
    """Return the transform that the arguments describe. Raises ValueError, FormatError."""
    table_arguments.refuse_other_format(arguments)
    context: Any = context_of(arguments)  # encrypting has no --any-context
    if arguments.format == "parquet":
        return EncryptTables(
            arguments.output,
            key=arguments.key,
            context=context,
            if_exists=arguments.if_exists,
            relative_to=arguments.relative_to,
            manifest=arguments.manifest,
            path_fields=arguments.path_fields,
            **table_arguments.encrypt_settings(arguments),
        )
    return EncryptFiles(
        arguments.output,
        key=arguments.key,
        context=context,
        split_lines=arguments.split_lines,
        header_lines=arguments.header_lines,
        compression=arguments.compression or "none",
        if_exists=arguments.if_exists,
        relative_to=arguments.relative_to,
        manifest=arguments.manifest,
        path_fields=arguments.path_fields,
    )


def decrypt_transform(arguments: argparse.Namespace) -> DecryptTables | DecryptAny:
    """Return the transform that the arguments describe. Raises ValueError, FormatError."""
    common: dict[str, Any] = {
        "key": arguments.key,
        "context": context_of(arguments),
        "if_exists": arguments.if_exists,
        "relative_to": arguments.relative_to,
        "manifest": arguments.manifest,
        "path_fields": arguments.path_fields,
    }
    tables = DecryptTables(arguments.output, **common, **table_arguments.decrypt_settings(arguments))
    return tables if arguments.cells else DecryptAny(DecryptFiles(arguments.output, **common), tables)


def rotate_transform(arguments: argparse.Namespace) -> RotateKeys:
    """Return the transform that the arguments describe. Raises ValueError, FormatError."""
    return RotateKeys(
        arguments.source,
        to=arguments.to,
        add=arguments.add,
        remove=arguments.remove,
        dry_run=arguments.dry_run,
        max_requests_per_s=arguments.max_requests_per_s,
    )


def add_rotation(pipeline: beam.Pipeline, arguments: argparse.Namespace, log: str | None) -> None:
    """Add the steps of a rotation to a pipeline. Files that fail are in the log, or else in that of the workers."""
    with CollectingErrorHandler() as failures:
        rotate = rotate_transform(arguments).with_error_handler(failures)
        rotated = pipeline | "KeyFiles" >> beam.Create(arguments.patterns) | "RotateKeys" >> rotate
    if log is None:
        _ = failures.output() | "Tell" >> beam.Map(_tell)
    else:
        _ = (rotated, failures.output()) | "Log" >> WriteRotationLog(log, dry_run=arguments.dry_run)


def _tell(failed: FailedFile) -> None:
    logging.getLogger(__name__).error("%s: %s", failed.source, failed.message)


def verify_transform(arguments: argparse.Namespace) -> VerifyShards:
    """Return the transform that the arguments describe. Raises ValueError, FormatError."""
    return VerifyShards(
        key=arguments.key, context=context_of(arguments), quick=arguments.quick, manifest=arguments.manifest
    )


def add_verification(pipeline: beam.Pipeline, arguments: argparse.Namespace, log: str | None) -> None:
    """Add the steps of a verification to a pipeline. Problems are in the log, or else in that of the workers."""
    verify = verify_transform(arguments)
    verified = pipeline | "Files" >> beam.Create(arguments.patterns) | "VerifyShards" >> verify
    _ = verified | ("Tell" >> beam.Map(_tell_problem) if log is None else "Log" >> WriteVerificationLog(log))


def _tell_problem(file: VerifiedFile) -> None:
    if not file.ok:
        logging.getLogger(__name__).error("%s: %s", file.path, file.problem)


def check_no_log(log: str | None) -> None:
    """Keep the log of an earlier job. Raises FileExistsError, OSError."""
    if log is not None and store_of(log).size(log) is not None:
        raise FileExistsError(errno.EEXIST, "the log exists, and is kept; name another", log)


def plan_tasks(plan: EncryptPlan | DecryptPlan, patterns: Sequence[str]) -> list[Task]:
    """Work out on the launcher what the job will do, so that most mistakes stop it before it starts.

    Raises:
        ValueError: an output would replace one of the inputs.
        As `EncryptPlan.tasks`, `DecryptPlan.tasks` and `unique_task`.
    """
    by_target: dict[str, list[Task]] = {}
    for pattern in patterns:
        for task in plan.tasks(pattern):
            by_target.setdefault(task.target, []).append(task)
    sources = {same_place(task.source) for tasks in by_target.values() for task in tasks}
    for target in by_target:
        if same_place(target) in sources:
            msg = f"{target} is an input of this job and would be replaced by an output. Choose another output folder"
            raise ValueError(msg)
    return [unique_task(target, tasks) for target, tasks in by_target.items()]


def make_pipeline(options: PipelineOptions, n_tasks: int | None = None, n_bytes: int | None = None) -> beam.Pipeline:
    """Return a pipeline for the runner of the options, or else one that uses all cores of this machine.

    Beam's DirectRunner would first look for Prism on the network; its FnApiRunner needs nothing, and is given the
    options for its worker processes as DirectRunner does it.

    Args:
        options: Beam's options.
        n_tasks: how many files or parts there are, if known: more workers than that have nothing to do.
        n_bytes: how many bytes, if known: a small job runs in this process.
    """
    if options.view_as(StandardOptions).runner:
        return beam.Pipeline(options=options)
    direct = options.view_as(DirectOptions)
    chosen = {"direct_running_mode", "direct_num_workers"} & options.get_all_options(drop_default=True).keys()
    chosen |= {word for word in options._flags or () if word.startswith("--direct_")}  # noqa: SLF001  # given, though the default
    small = n_bytes is not None and n_bytes < SMALL_JOB_BYTES
    workers = 1 if small else min(_cores(), n_tasks or 1 << 16)
    if not chosen and workers > 1:
        direct.direct_running_mode = "multi_processing"
        direct.direct_num_workers = workers
    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    provision = fn_runner.ExtendedProvisionInfo(beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded))
    return beam.Pipeline(runner=fn_runner.FnApiRunner(provision_info=provision), options=options)


def _cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


@contextmanager
def fail_when_a_worker_dies(again: str = "with --if-exists=skip") -> Iterator[None]:
    """Let a local job end with an error when one of its worker processes dies; Beam's FnApiRunner would wait for ever.

    The runner notices, in a thread of its own that nobody waits for; what that thread raises interrupts this one.

    Args:
        again: how the job is finished, for the message.

    Raises:
        EnvelopeError: a worker died.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can be woken
        return
    hook_before = threading.excepthook
    died: list[str] = []
    over = threading.Event()

    def look(thread: threading.ExceptHookArgs) -> None:
        if "Worker subprocess exited" in str(thread.exc_value):
            died.append(str(thread.exc_value))
            _end_workers()  # the runner waits for each of them, also for one that has yet to start
            threading.Thread(target=_end_late_workers, args=(over,), daemon=True).start()
            os.kill(os.getpid(), _WAKE_UP)  # a flag would not end the main thread's wait
        else:
            hook_before(thread)

    def what_happened() -> EnvelopeError:
        return EnvelopeError(
            f"a worker process of this machine died ({died[0]}): killed, perhaps for want of memory. Finish the job "
            f"{again}, with fewer workers if need be (--direct_num_workers=1)"
        )

    def wake_up(_signal: int, _frame: object) -> None:
        raise what_happened()

    handler_before = signal.signal(_WAKE_UP, wake_up)
    threading.excepthook = look
    try:
        yield
    except EnvelopeError:
        raise
    except Exception as error:
        if not died:
            raise
        raise what_happened() from error  # the runner may notice too, and swallow what woke it up while it ends workers
    finally:
        over.set()
        threading.excepthook = hook_before
        signal.signal(_WAKE_UP, handler_before)


def _end_late_workers(over: threading.Event) -> None:
    """End workers again and again, until the job is over."""
    while not over.wait(_LATE_WORKERS_S):
        _end_workers()


def _end_workers() -> None:
    """End this process's local workers. Beam keeps no list of them; the objects that started them are all there is."""
    for process in gc.get_objects():
        if isinstance(process, subprocess.Popen) and "sdk_worker_main" in str(process.args):
            with contextlib.suppress(OSError):  # the worker is a child of the shell that Beam started; Linux lists it
                for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
            process.kill()


def counters(result: PipelineResult) -> dict[str, int]:
    """Return our metrics of a job by name, or nothing where the runner has none."""
    try:
        found = result.metrics().query(MetricsFilter().with_namespace(NAMESPACE))["counters"]
    except (NotImplementedError, AttributeError):
        return {}
    totals: dict[str, int] = {}
    for counter in found:
        value = counter.result
        totals[counter.key.metric.name] = totals.get(counter.key.metric.name, 0) + (value or 0)
    return totals


def check_landed(tasks: Sequence[Task], output: str) -> None:
    """Check that every file that was planned is there: a runner may drop work and say that it succeeded.

    Raises:
        EnvelopeError: names the first that is missing.
        OSError: the output cannot be listed.
    """
    there = existing([task.target for task in tasks], as_folder(output))
    missing = [task.target for task in tasks if task.target not in there]
    if missing:
        msg = (
            f"the runner reports success, but {len(missing)} of {len(tasks)} files are missing, first {missing[0]}. "
            "Run the job again with --if-exists=skip"
        )
        raise EnvelopeError(msg)


def summary(result: PipelineResult) -> dict[str, Any]:
    """Return what a job did, from its metrics."""
    totals = counters(result)
    return {
        "files": totals.get("files", 0),
        "files_skipped": totals.get("files_skipped", 0),
        **({"rows": totals["rows"]} if "rows" in totals else {}),
        "plaintext_bytes": totals.get("bytes_plaintext", 0),
        "ciphertext_bytes": totals.get("bytes_ciphertext", 0),
        "kms_calls": {
            name.removeprefix("kms_"): count for name, count in sorted(totals.items()) if name.startswith("kms_")
        },
    }
