"""What is wrong with what the jobs of `kill_jobs.py` wrote: nothing, if a kill has done no harm."""

from collections import Counter
from pathlib import Path

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from beam_envelope import VerifyShards, jobs
from beam_envelope.formats.keyfile import MANIFEST_NAME, TEMPORARY_PREFIX, is_key_file, key_file_name
from tests.engines.kill_jobs import CONTEXT, JOBS, all_lines

_kept = []


def problems_of(names, place):
    """Return what is wrong with what jobs wrote."""
    problems = []
    for name in names:
        problems += _problems_of_names(name, Path(place, name))
        try:
            problems += _problems_of_content(name, Path(place, name))
        except Exception as error:  # noqa: BLE001  # a reader's refusal is what is looked for
            problems.append(f"{name}: {type(error).__name__}: {error}"[:2000])
    return problems


def _problems_of_names(name, here):
    sealed = here / "sealed"
    below = [path for path in sorted(sealed.rglob("*")) if path.is_file()]
    # Beam's own WriteToText, which the records are written by, calls its unfinished folders otherwise.
    prefixes = (TEMPORARY_PREFIX,) if JOBS[name].shards else (TEMPORARY_PREFIX, "beam-temp-")
    unfinished = [path for path in below if any(part.startswith(prefixes) for part in path.parts)]
    data = [p for p in below if p not in unfinished and p.name != MANIFEST_NAME and not is_key_file(p.name)]
    problems = [f"{name}: {path.relative_to(here)} would be taken for data" for path in data if path.parent != sealed]
    if JOBS[name].shards:
        problems += [f"{name}: {path.name} has no key file" for path in data if not _key_file(path).exists()]
        if (sealed / MANIFEST_NAME) not in below:
            problems.append(f"{name}: no manifest")
    return problems


def _key_file(path):
    return path.with_name(key_file_name(path.name))


def _problems_of_content(name, here):
    job, problems = JOBS[name], []
    _kept.clear()
    with jobs.make_pipeline(PipelineOptions([]), 1, 0) as pipeline:
        lines = job.read(pipeline, str(here), job.key)
        _ = lines | "Keep lines" >> beam.Map(_keep, "line")
        if job.shards:
            verify = VerifyShards(key=job.key, context=CONTEXT, manifest="require")
            verified = pipeline | "Folder" >> beam.Create([f"{here}/sealed/"]) | verify
            _ = verified | "Keep rows" >> beam.Map(_keep, "row")
    rows = [row for kind, row in _kept if kind == "row"]
    problems += [f"{name}: verify says {row.path} {row.kind}: {row.problem}" for row in rows if not row.ok]
    found, expected = Counter(line for kind, line in _kept if kind == "line"), Counter(all_lines())
    if lost := expected - found:
        problems.append(f"{name}: {lost.total()} lines are lost, such as {min(lost)}")
    if more := found - expected:
        problems.append(f"{name}: {more.total()} lines are there more than once, such as {min(more)}")
    return problems


def _keep(element, kind):
    _kept.append((kind, element))
