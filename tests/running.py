"""Runs transforms in this process: from files to results in one line."""

from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from beam_envelope import DecryptFiles, EncryptFiles, jobs
from beam_envelope.formats.keyfile import MANIFEST_NAME, key_file_name

_results = []


class Job(NamedTuple):
    """What a job gave: the transform's output, and our metrics."""

    results: list
    counters: dict[str, int]


def _keep(result):
    """Keep a result; a function of a module is pickled by its name, so the list is this process's own."""
    _results.append(result)


def run(transform, *sources):
    """Run a transform on sources with Beam's FnApiRunner, in memory."""
    _results.clear()
    pipeline = jobs.make_pipeline(PipelineOptions([]), 1, 0)
    _ = pipeline | beam.Create(list(sources)) | "Files" >> transform | "Keep" >> beam.Map(_keep)
    result = pipeline.run()
    result.wait_until_finish()
    return Job(sorted(_results), jobs.counters(result))


def encrypt(source, output, key, **settings):
    """Encrypt one source: a path, a pattern or a folder."""
    return run(EncryptFiles(str(output), key=key, **settings), str(source))


def decrypt(source, output, key, **settings):
    """Decrypt one source: a path, a pattern or a folder."""
    return run(DecryptFiles(str(output), key=key, **settings), str(source))


def fails(transform, *sources):
    """Run a transform that must fail; return the error's class and its message, without what the runner adds."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  # the caller compares both
        run(transform, *sources)
    message = str(caught.value).partition(" [while running")[0]
    if isinstance(caught.value, RuntimeError):  # the runner's, for exceptions that it cannot make anew
        name, _, message = message.partition(": ")
        return name, message
    return type(caught.value).__name__, message


def write_files(folder, contents):
    """Write files below a folder: a dict of relative paths and bytes. Return the folder."""
    for name, content in contents.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return Path(folder)


def read_files(folder):
    """Return the files below a folder: a dict of relative paths and bytes."""
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def listing(folder):
    """Return the relative paths of all files below a folder, or nothing where there is no folder."""
    folder = Path(folder)  # they are not read: a job that runs may take one away
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]


def with_key_files(*names):
    """Return the listing of a folder that holds these shards and their key files, and nothing else."""
    folders = [name.rpartition("/") for name in names]
    key_files = [folder + separator + key_file_name(name) for folder, separator, name in folders]
    return sorted([*names, *key_files])


def with_manifest(*names, folder=""):
    """Return the listing after a job wrote these shards to `folder`: key files, the manifest there, nothing else."""
    return sorted([*with_key_files(*names), folder + MANIFEST_NAME])
