"""EncryptFiles and DecryptFiles in worker processes of their own, and what those leave behind."""

import contextlib
import os
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability import local_job_service
from apache_beam.runners.worker import worker_pool_main

from beam_envelope import DecryptFiles, EncryptFiles, jobs
from beam_envelope.testing import FakeKms, find_plaintext
from beam_envelope.transforms import files
from tests.running import listing, read_files, with_manifest, write_files

CANARY = b"CANARY-7f3a-4111111111111111"
CONTENTS = {f"{number}/x.csv": CANARY + os.urandom(50_000) for number in range(8)}
OPTIONS = ["--direct_running_mode=multi_processing", "--direct_num_workers=2", "--default_sdk_harness_log_level=DEBUG"]


class SharedRun(NamedTuple):
    """What one job of two worker processes left."""

    folder: Path
    counters: dict
    kms_calls: Counter
    log: str
    temporary_leaks: list
    data_keys_leaked: list


class NotingDoFn(files._EncryptDoFn):
    """Encrypts, and leaves a note of which process made which shard under which data key."""

    folder = None

    def do(self, task, progress):
        result = super().do(task, progress)
        (self.folder / f"{os.getpid()}-{result.key_id}-{result.source.replace('/', '+')}").touch()
        return result


@contextlib.contextmanager
def stderr_in(path):
    """Send what this process and its children write to stderr into a file."""
    saved = os.dup(2)
    with path.open("wb") as stream:
        os.dup2(stream.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@contextlib.contextmanager
def watch(look):
    """Call a function again and again on a thread of its own, and once more at the end."""
    done = threading.Event()

    def watching():
        while not done.wait(0.05):
            look()

    thread = threading.Thread(target=watching)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        look()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One job on two worker processes: encrypt, note who did what, decrypt."""
    folder = tmp_path_factory.mktemp("shared")
    write_files(folder / "data", CONTENTS)
    for name in ("tmp", "notes"):
        (folder / name).mkdir()
    leaks = []

    def look():
        with contextlib.suppress(FileNotFoundError):  # temporary files come and go
            leaks.extend(find_plaintext([folder / "tmp", folder / "sealed"], CANARY))

    with pytest.MonkeyPatch.context() as patch, FakeKms() as kms:
        for name, value in kms.environment().items():
            patch.setenv(name, value)
        patch.setenv("TMPDIR", str(folder / "tmp"))
        patch.setattr(tempfile, "tempdir", None)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        given_out = record_data_keys(patch)
        key = f"aws-kms://{kms.create_key('etl')}"
        pipeline = jobs.make_pipeline(PipelineOptions(OPTIONS))
        sealing = EncryptFiles(f"{folder}/sealed", key=key, context={"dataset": "flights"})
        sealing.work.__class__, sealing.work.folder = NotingDoFn, folder / "notes"
        sealed = pipeline | beam.Create([f"{folder}/data"]) | sealing | beam.Map(lambda result: result.shard)
        opening = DecryptFiles(
            f"{folder}/opened", key=key, context={"dataset": "flights"}, relative_to=f"{folder}/sealed"
        )
        _ = sealed | opening
        with stderr_in(folder / "log"), watch(look):
            result = pipeline.run()
            result.wait_until_finish()
        log = (folder / "log").read_text()
        leaked = [key for key in given_out if key in log or key.encode() in pipeline_bytes(pipeline)]
        return SharedRun(folder, jobs.counters(result), kms.calls, log, leaks, leaked)


def record_data_keys(patch):
    """Return a list that fills with the data keys that FakeKms gives out, in base64."""
    given_out = []
    answer = FakeKms._answer

    def remember(self, *arguments):
        response = answer(self, *arguments)
        given_out.extend([response["Plaintext"]] if "Plaintext" in response else [])
        return response

    patch.setattr(FakeKms, "_answer", remember)
    return given_out


def pipeline_bytes(pipeline):
    """Return the serialised pipeline."""
    return pipeline.to_runner_api().SerializeToString()


def test_two_worker_processes_share_the_files_and_all_come_back(shared):
    assert listing(shared.folder / "sealed") == with_manifest(*CONTENTS)
    assert read_files(shared.folder / "opened") == CONTENTS


def test_each_worker_process_encrypts_under_a_data_key_of_its_own(shared):
    notes = [path.name.split("-", 2) for path in (shared.folder / "notes").iterdir()]
    processes, key_ids = ({note[index] for note in notes} for index in (0, 1))
    assert len(notes) == len(CONTENTS)
    assert len(processes) == len(key_ids) == len({(pid, key_id) for pid, key_id, _ in notes}) == 2
    assert str(os.getpid()) not in processes


def test_kms_calls_are_counted_in_all_processes_and_are_few(shared):
    assert shared.kms_calls["GenerateDataKey"] == shared.counters["kms_GenerateDataKey"] == 2 + 1  # the manifest's
    assert shared.kms_calls["Decrypt"] == shared.counters["kms_Decrypt"]
    assert 2 + 1 <= shared.kms_calls["Decrypt"] <= 4 + 1  # one for each data key in each process, and the manifest's
    assert shared.counters["files"] == 2 * len(CONTENTS)


def test_nothing_secret_is_in_the_logs_of_worker_processes_or_in_the_pipeline(shared):
    assert "DEBUG" in shared.log
    assert CANARY.decode() not in shared.log
    assert shared.data_keys_leaked == []


def test_no_plaintext_is_in_temporary_files_and_in_the_output_at_any_time(shared):
    assert shared.temporary_leaks == []
    assert find_plaintext([shared.folder / "opened"], CANARY)  # the search does find it where it may be


@pytest.fixture
def worker_pool(monkeypatch):
    """The address of a pool that starts workers for anyone, as on a cluster: no option reaches them."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    address, server = worker_pool_main.BeamFnExternalWorkerPoolServicer.start(use_process=True)
    yield address.removeprefix("localhost:")
    server.stop(None).wait()


def test_a_job_service_runs_them_on_workers_of_a_pool(tmp_path, local_key, worker_pool):
    data = write_files(tmp_path / "data", {"a": b"1", "sub/b": b"2"})
    service = local_job_service.LocalJobServicer(str(tmp_path / "staging"))
    options = [
        "--runner=PortableRunner",
        f"--job_endpoint=localhost:{service.start_grpc_server(0)}",
        "--environment_type=EXTERNAL",
        f"--environment_config=localhost:{worker_pool}",
    ]
    try:
        pipeline = jobs.make_pipeline(PipelineOptions(options))
        sealed = pipeline | beam.Create([str(data)]) | EncryptFiles(f"{tmp_path}/sealed", key=local_key)
        opening = DecryptFiles(f"{tmp_path}/opened", key=local_key, relative_to=f"{tmp_path}/sealed")
        _ = sealed | beam.Map(lambda result: result.shard) | opening
        result = pipeline.run()
        result.wait_until_finish()
        counted = jobs.counters(result)
    finally:
        service.stop()
    assert read_files(tmp_path / "opened") == {"a": b"1", "sub/b": b"2"}
    assert listing(tmp_path / "sealed") == with_manifest("a", "sub/b")
    assert counted["files"] == 4
