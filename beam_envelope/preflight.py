"""Before a job starts: may this process, and may the workers, use the keys as the job will? `check_workers` for yours.

`worker_check` asks the workers.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from apache_beam.options.pipeline_options import PipelineOptions

from beam_envelope import jobs
from beam_envelope.errors import EnvelopeError, KeyAccessError, KmsUnavailableError
from beam_envelope.formats.keyfile import KeyFile
from beam_envelope.formats.rotation import Rotation, Rotator
from beam_envelope.io.keyfiles import find_key_files, read_key_file
from beam_envelope.io.store import key_file_path
from beam_envelope.keys.preflight import Finding, KeyUse, examine, for_writer, raise_problems, table
from beam_envelope.keys.provider import NOTHING, KeyProvider, Need
from beam_envelope.keys.template import KeyTemplate
from beam_envelope.keys.uri import Key, open_keys
from beam_envelope.transforms.files import EncryptFiles
from beam_envelope.transforms.tables import EncryptTables
from beam_envelope.worker_check import look_on_workers

_SAMPLES: Final = 20  # key files that are looked at for one that tells what is needed

_logger: Final = logging.getLogger(__name__)


def check_workers(
    keys: Key | Sequence[Key],
    options: PipelineOptions | None = None,
    *,
    context: Mapping[str, str] | None = None,
    needs: Iterable[Need] = (Need.GENERATE,),
    extras: Iterable[str] = (),
) -> list[Finding]:
    """Find out, by a small job, whether the workers of a runner may use KMS keys as your pipeline will.

    Each key is tried for each need, with the credentials that a worker has. The versions of Python, Beam and this
    package there have to be those of here.

    Args:
        keys: the KMS keys, as URIs or providers.
        options: the options of your pipeline, with its runner.
        context: the encryption context that policies may demand.
        needs: what for. A writer needs `Need.GENERATE`, a reader `Need.UNWRAP`.
        extras: extras of this package that the workers must have: `fsspec`, `vault`. Keys say so themselves.

    Returns:
        What was found, on each worker that was met.

    Raises:
        KeyAccessError, KmsUnavailableError, EnvelopeError: what is missing, all of it in one table.

    Example:
        >>> check_workers("aws-kms://alias/etl", PipelineOptions(), needs=[Need.GENERATE, Need.UNWRAP])
    """
    pairs = tuple((context or {}).items())
    uses = [KeyUse(key, need, pairs) for key in open_keys(keys) for need in needs]
    findings = look_on_workers(uses, options or PipelineOptions(), extras=tuple(extras))
    raise_problems(findings)
    return findings


def before_job(
    uses: Sequence[KeyUse],
    arguments: argparse.Namespace,
    options: PipelineOptions,
    *,
    n_tasks: int | None = None,
    n_bytes: int | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> None:
    """Check what a job needs, as `--check-workers` and `--no-check` say, before anything is written.

    Args:
        uses: what the job does with keys.
        arguments: with those of `arguments.add_check_arguments`.
        options: of the job.
        n_tasks: of the job, as `jobs.make_pipeline` takes it, so that the same workers are asked.
        n_bytes: likewise.
        tell: is given the table, where all is well and the workers were asked.

    Raises:
        KeyAccessError, KmsUnavailableError, EnvelopeError: what is missing, all of it in one table.
    """
    findings: list[Finding] = []
    if not arguments.no_check:
        findings += examine(uses, who=arguments.check_workers)
    if arguments.check_workers:
        findings += look_on_workers(uses, options, n_tasks, n_bytes)
    hint = "" if arguments.check_workers else " Where only workers may use the keys, give --no-check --check-workers."
    raise_problems(findings, hint)
    if arguments.check_workers:
        tell(table(findings))


def explain(error: EnvelopeError, uses: Sequence[KeyUse]) -> None:
    """Raise, instead of what one use of a key met, all that can be found out; returns if that is no more.

    Raises:
        KeyAccessError, KmsUnavailableError: several things are missing.
    """
    if len(uses) > 1:
        _logger.info("looking at all keys, since one failed: %s", error)
        raise_problems(examine(uses))


def uses_of_reader(keys: Sequence[KeyProvider], key_files: Iterable[tuple[str, KeyFile]]) -> list[KeyUse]:
    """Return what a reading job needs: to open each data key of the first key file, by any of its keys that may.

    With no key file, each of the keys is looked at, and one of them suffices.
    """
    for _, key_file in key_files:
        pairs = tuple(key_file.context.items())
        uses = [
            KeyUse(key, Need.UNWRAP, pairs, form, choice=data_key.key_id.hex())
            for data_key in key_file.data_keys
            for form in data_key.wrapped_keys
            for key in keys
            if key.may_open(form)
        ]
        return list(dict.fromkeys(uses))
    return [KeyUse(key, Need.UNWRAP, choice="any") for key in keys]


def uses_of_rotation(
    rotation: Rotation, key_files: Iterable[tuple[str, KeyFile]], *, dry_run: bool = False
) -> list[KeyUse]:
    """Return what a rotation needs: of the first key file that it changes, and to learn the keys' names.

    What concerns one key file alone is left for the rotation to tell. A dry run needs the names only.
    """
    uses = [KeyUse(key, Need.NAME) for key in rotation.keys if key.permission(Need.NAME) != NOTHING]
    if dry_run:
        return list(dict.fromkeys(uses))
    rotator = Rotator(rotation)
    for path, key_file in key_files:
        try:
            steps = [step for step in rotator.plan(key_file, path) if step.origin is not None]
        except (KeyAccessError, KmsUnavailableError):
            break  # the names say what is missing
        except EnvelopeError:
            continue
        pairs = tuple(key_file.context.items())
        for step in steps:
            key, form = step.origin  # type: ignore[misc]  # those without one are left out
            if not step.make:
                uses.append(KeyUse(key, Need.UNWRAP, pairs, form))
            for to in step.make:
                if key.rewraps_inside(to):
                    uses.append(KeyUse(key, Need.REWRAP, pairs, form, to))
                else:
                    uses += [KeyUse(key, Need.UNWRAP, pairs, form), KeyUse(to, Need.WRAP, pairs)]
        if steps:
            break
    return list(dict.fromkeys(uses))


def check_encrypt(
    arguments: argparse.Namespace,
    transform: EncryptFiles | EncryptTables,
    options: PipelineOptions,
    sources: Iterable[str] | None = None,
    **how: Any,
) -> None:
    """Check, as `before_job`, what an encrypting job needs; `how` goes to it. Of many keys, the first few are tried.

    Args:
        arguments: of the job.
        transform: of the job.
        options: of the job.
        sources: the files, which choose the keys of templates. None: they are looked for if need be.
        **how: as `before_job` has them.

    Raises:
        FormatError: a path does not say what fills a template.
        As `before_job`.
    """
    if sources is None:
        choose = any(isinstance(key, KeyTemplate) for key in open_keys(arguments.key, templates=True))
        sources = (task.source for task in jobs.plan_tasks(transform.plan, arguments.patterns)) if choose else ("",)
    choices = dict.fromkeys(choice for source in sources for choice in transform.key_choices(source))
    uses: dict[KeyUse, None] = {}
    for choice in list(choices)[:_SAMPLES]:
        context: Any = choice.pairs  # a writer's is never ANY_CONTEXT
        uses |= dict.fromkeys(for_writer([choice.keys], context))
    before_job(list(uses), arguments, options, **how)


def fixed_keys(arguments: argparse.Namespace) -> tuple[KeyProvider, ...]:
    """Return the keys of a reading job that no path chooses: those are tried by opening a file."""
    keys = open_keys(arguments.key, templates=True)
    return tuple(key for key in keys if not isinstance(key, KeyTemplate))


def check_read(
    arguments: argparse.Namespace, options: PipelineOptions, key_files: Iterable[tuple[str, KeyFile]], **how: Any
) -> None:
    """Check, as `before_job`, what a decrypting or verifying job needs; `how` goes to it."""
    before_job(uses_of_reader(fixed_keys(arguments), key_files), arguments, options, **how)


def check_rotate(
    arguments: argparse.Namespace, options: PipelineOptions, key_files: Iterable[tuple[str, KeyFile]], **how: Any
) -> None:
    """Check, as `before_job`, what a rotation needs; `how` goes to it."""
    if arguments.no_check and not arguments.check_workers:
        return
    rotation = jobs.rotate_transform(arguments).rotation
    uses = uses_of_rotation(rotation, key_files, dry_run=arguments.dry_run)
    before_job(uses, arguments, options, **how)


def key_files_for(arguments: argparse.Namespace, paths: Iterable[str]) -> Iterator[tuple[str, KeyFile]]:
    """Yield key files that tell what a decrypting job needs, if there are any: of cells, those of their key store."""
    if arguments.cells:
        return key_files_at([f"{arguments.keys.rstrip('/')}/"] if arguments.keys else [])
    return key_files_of(paths)


def key_files_of(paths: Iterable[str]) -> Iterator[tuple[str, KeyFile]]:
    """Yield the first key files that can be read of these files, with their paths."""
    return readable_key_files(key_file_path(path) for path in paths)


def key_files_at(patterns: Iterable[str]) -> Iterator[tuple[str, KeyFile]]:
    """Yield the first key files that can be read of these patterns, with their paths."""
    for pattern in patterns:
        try:
            found = find_key_files(pattern)
        except OSError:
            continue
        yield from readable_key_files(found)


def readable_key_files(paths: Iterable[str]) -> Iterator[tuple[str, KeyFile]]:
    """Yield the first of these key files that can be read, with their paths."""
    for _, path in zip(range(_SAMPLES), paths, strict=False):
        try:
            yield path, KeyFile.from_bytes(read_key_file(path), path)
        except (OSError, EnvelopeError):
            continue  # the job tells of it
