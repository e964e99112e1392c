"""Asks workers, by a small job of the same runner and options, whether they can use the keys as a job will.

What they find comes back in its metrics.
"""

from __future__ import annotations

import base64
import copy
import importlib.util
import json
import os
import platform
import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import apache_beam as beam
from apache_beam import typehints
from apache_beam.metrics import Metrics
from apache_beam.metrics.metric import MetricResults, MetricsFilter
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions
from apache_beam.runners.runner import PipelineState

import beam_envelope
from beam_envelope import jobs
from beam_envelope.errors import EnvelopeError
from beam_envelope.keys.preflight import FINE, Finding, KeyUse, examine

WORKERS: Final = "workers"

_NAMESPACE: Final = "beam_envelope_preflight"
_METRIC: Final = "findings"
_LOOKS: Final = 8  # elements of the job, spread over the workers that there are
_MARK: Final = re.compile(r"beam-envelope-findings:([A-Za-z0-9+/=]+):")
_EXTRAS: Final = {"fsspec": "fsspec", "vault": "hvac"}


def software(extras: Iterable[str] = ()) -> dict[str, str]:
    """Return what has to be the same on workers: versions, and for each extra whether it is there."""
    python = ".".join(platform.python_version_tuple()[:2])
    found = {"Python": python, "apache-beam": beam.__version__, "beam-envelope": beam_envelope.__version__}
    return found | {f"[{extra}]": "yes" if importlib.util.find_spec(_EXTRAS[extra]) else "no" for extra in extras}


def compare_software(here: Mapping[str, str], there: Mapping[str, str], where: str) -> Finding:
    """Return a finding on the software of a worker: `here` is the launcher's."""
    listed = ", ".join(f"{name} {version}" for name, version in there.items())
    finding = Finding(where, "software", listed, "ok", principal="-")
    other = [
        f"{name} is {there.get(name, 'not there')}, and {version} on the launcher"
        for name, version in here.items()
        if there.get(name) != version
    ]
    if not other:
        return finding
    text = f"{'; '.join(other)}. Give the workers the same (--requirements_file, --extra_package, or their container)"
    return replace(finding, state="mismatch", message=text)


def look_on_workers(
    uses: Sequence[KeyUse],
    options: PipelineOptions,
    n_tasks: int | None = None,
    n_bytes: int | None = None,
    extras: Sequence[str] = (),
) -> list[Finding]:
    """Run the small job and return what the workers found; nothing that they found is raised.

    A runner that brings back no metrics of this kind is asked again, by a job that fails if something is missing.
    """
    here = software(extras) | {f"[{extra}]": "yes" for extra in extras}
    for raises in (False, True):
        look = _LookDoFn(uses, here, extras, uuid.uuid4().hex, raises=raises)
        own = copy.deepcopy(options)  # to choose workers changes them
        google = own.view_as(GoogleCloudOptions)
        google.job_name = f"{google.job_name}-check" if google.job_name else None
        pipeline = jobs.make_pipeline(own, n_tasks, n_bytes)
        _ = pipeline | beam.Create(range(_LOOKS)) | beam.Reshuffle() | "CheckWorkers" >> beam.ParDo(look)
        try:
            with jobs.fail_when_a_worker_dies("by running it again"):
                result = pipeline.run()
                state = result.wait_until_finish() or result.state
        except Exception as error:  # noqa: BLE001  # each runner has its own for a job that failed
            return _findings_in(str(error)) or [_failed(error)]
        found = _findings_of(result)
        if found:
            return found
        if state != PipelineState.DONE:
            return [Finding(WORKERS, "job", "-", "refused", f"the job that checks them ended as {state}; see its log")]
    return [Finding(WORKERS, "all", "-", "ok", "nothing is missing; this runner brings back no details", "?")]


@typehints.with_input_types(int)
@typehints.with_output_types(int)
class _LookDoFn(beam.DoFn):
    """Looks once in each worker process; what it finds goes into a metric, or into an error."""

    def __init__(
        self, uses: Sequence[KeyUse], here: Mapping[str, str], extras: Sequence[str], run: str, *, raises: bool
    ) -> None:
        self._uses, self._here, self._extras = tuple(uses), dict(here), tuple(extras)
        self._run, self._raises = run, raises

    def process(self, element: int) -> Iterator[int]:
        found = _once(self._run, self._look)
        if self._raises:
            if any(finding.state not in FINE for finding in found):
                text = json.dumps([finding.as_dict() for finding in found])
                raise EnvelopeError(f"beam-envelope-findings:{base64.b64encode(text.encode()).decode()}:")
        else:
            metric = Metrics.string_set(_NAMESPACE, _METRIC)
            for finding in found:
                metric.add(json.dumps(finding.as_dict()))
        yield element

    def _look(self) -> list[Finding]:
        where = f"worker {socket.gethostname()}/{os.getpid()}"
        return [compare_software(self._here, software(self._extras), where), *examine(self._uses, where, who=True)]


_looked: dict[str, list[Finding]] = {}
_lock: Final = threading.Lock()


def _once(run: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """Return what the first look of a run found in this process."""
    with _lock:
        if run not in _looked:
            _looked.clear()
            _looked[run] = look()
        return _looked[run]


def _findings_of(result: Any) -> list[Finding]:  # a runner's result
    """Return the findings in a job's metrics, each once."""
    try:
        sets = result.metrics().query(MetricsFilter().with_namespace(_NAMESPACE))[MetricResults.STRINGSETS]
    except (NotImplementedError, AttributeError, KeyError):
        return []
    texts = {text for metric in sets for text in (metric.result or ())}
    return _ordered(json.loads(text) for text in texts)


def _findings_in(text: str) -> list[Finding]:
    """Return the findings that an error carries."""
    mark = _MARK.search(text)
    return _ordered(json.loads(base64.b64decode(mark[1]))) if mark else []


def _ordered(rows: Iterable[dict[str, Any]]) -> list[Finding]:
    found = [Finding(**row) for row in rows]
    return sorted(
        found, key=lambda finding: (finding.where, finding.key != "software", finding.key, finding.permission)
    )


def _failed(error: Exception) -> Finding:
    from beam_envelope.console import describe  # noqa: PLC0415  # it brings rich, which programs without it do without

    said = describe(error)
    if "ModuleNotFoundError" in str(error) or "No module named" in str(error):
        said = (
            f"{said}. The workers have no beam-envelope, or another version of it: install the one of here there "
            "(--requirements_file, --extra_package, or their container)"
        )
    return Finding(WORKERS, "job", "-", "refused", f"the job that checks the workers failed: {said}", "?")
