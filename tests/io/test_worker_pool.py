"""Workers that pipeline options do not reach: Beam's pool of external workers without a boot program, in processes."""

import os
import socket
import subprocess
import sys
import threading

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms import environments

from beam_envelope import EncryptedPath, EncryptFiles, Vault, jobs, register_filesystem
from beam_envelope.formats.keyfile import KeyFile, key_file_name
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.testing import FakeKms
from tests.identities import Metadata, Sts
from tests.running import listing, with_key_files

ROLE = "arn:aws:iam::111122223333:role/etl"
LINES = ["CANARY-LINE-1", "CANARY-LINE-2"]


class Pool:
    """A worker pool in a process of its own, and what it and its workers wrote on stderr."""

    def __init__(self, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])  # it starts `python`
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "BEAM_ENVELOPE_"))}
        kept |= {"PATH": path, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
        command = [sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={self.port}"]
        self._process = subprocess.Popen(
            command, env=kept, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.lines = []
        for line in self._process.stderr:
            if "Started worker pool" in line:
                break
        self._thread = threading.Thread(target=lambda: self.lines.extend(self._process.stderr), daemon=True)
        self._thread.start()

    def pipeline(self, *words):
        """Return a pipeline whose work is done by workers of the pool."""
        runner = FnApiRunner(default_environment=environments.ExternalEnvironment(f"localhost:{self.port}"))
        return beam.Pipeline(runner=runner, options=register_filesystem(PipelineOptions(list(words))))

    def close(self):
        """End the pool with its workers."""
        os.killpg(self._process.pid, 9)
        self._process.wait()
        self._thread.join()
        self._process.stderr.close()


@pytest.fixture(scope="module")
def keyring(tmp_path_factory):
    key = LocalKms(tmp_path_factory.mktemp("keyring") / "keyring.json")
    generate_local_key(key)
    return key


@pytest.fixture(scope="module")
def pool(keyring):
    """A pool whose environment has the settings."""
    pool = Pool(BEAM_ENVELOPE_KEY=str(keyring), BEAM_ENVELOPE_CONTEXT="from=environment")
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def aws():
    """A KMS, an STS and a Google metadata server."""
    with FakeKms() as kms, Sts() as sts, Metadata() as metadata:
        kms.create_key("etl")
        yield kms, sts, metadata


@pytest.fixture(scope="module")
def bare_pool(aws):
    """A pool whose environment has no setting of ours; of AWS it has where its services are."""
    kms, sts, metadata = aws
    pool = Pool(**{**kms.environment(), **sts.environment, "GCE_METADATA_HOST": metadata.host})
    yield pool
    pool.close()


def fails(pipeline, transform, *elements):
    with pytest.raises(Exception) as caught, pipeline as p:  # noqa: PT011  # the caller compares
        _ = p | beam.Create(elements or LINES) | transform
    return str(caught.value)


def test_settings_come_from_the_workers_environment_and_paths_bring_the_filesystem_along(pool, tmp_path):
    path = EncryptedPath(f"{tmp_path}/part")
    with pool.pipeline("--envelope_key=local-kms:///nowhere.json") as p:
        _ = p | beam.Create(LINES) | beam.io.WriteToText(path, shard_name_template="")
    assert listing(tmp_path) == with_key_files("part")
    key_file = KeyFile.from_bytes((tmp_path / key_file_name("part")).read_bytes(), "it")
    assert key_file.context == {"from": "environment"}
    with pool.pipeline("--envelope_key=local-kms:///nowhere.json") as p:
        read = p | beam.io.ReadFromText(EncryptedPath(f"{tmp_path}/part"), validate=False)
        assert_that(read, equal_to(LINES))


def test_what_a_transform_was_made_with_goes_along(pool, keyring, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("hello")
    words = [f"--envelope_key={keyring}", "--envelope_context=from=option"]
    with pool.pipeline(*words) as p:
        _ = p | beam.Create([f"{tmp_path}/in/*"]) | EncryptFiles(f"{tmp_path}/sealed")
    key_file = KeyFile.from_bytes((tmp_path / "sealed" / key_file_name("a.txt")).read_bytes(), "it")
    assert key_file.context == {"from": "option"}


def test_a_role_of_the_options_goes_along_and_is_assumed_where_the_work_is(bare_pool, aws, tmp_path):
    _, sts, metadata = aws
    sts.requests.clear()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("hello")
    words = ["--envelope_key=aws-kms://alias/etl", f"--envelope_aws_role_arn={ROLE}"]
    words += ["--envelope_aws_web_identity=google", "--envelope_aws_audience=ours"]
    with bare_pool.pipeline(*words) as p:
        _ = p | beam.Create([f"{tmp_path}/in/*"]) | EncryptFiles(f"{tmp_path}/sealed")
    (request,) = sts.requests
    assert (request["Action"], request["RoleArn"]) == ("AssumeRoleWithWebIdentity", ROLE)
    assert [query["audience"] for _, query, _ in metadata.requests] == ["ours"]
    shown = "".join(bare_pool.lines)
    assert [secret for secret in (*sts.secrets, *metadata.tokens) if secret in shown] == []


def test_a_worker_without_a_key_says_so_once(bare_pool, tmp_path):
    before = len(bare_pool.lines)
    path = EncryptedPath(f"{tmp_path}/part")
    said = fails(bare_pool.pipeline(), beam.io.WriteToText(path, num_shards=5))
    wanted = (
        "no key is set for envelope+... paths: give --envelope_key=aws-kms://alias/NAME as a pipeline option, or set "
        "BEAM_ENVELOPE_KEY where options do not reach the workers"
    )
    assert wanted in said
    # Beam logs the error of the bundle; of the five files, nothing of ours is logged.
    assert [line for line in bare_pool.lines[before:] if ":beam_envelope" in line.partition(" ")[0]] == []


def test_a_worker_without_a_vault_address_says_so(bare_pool, tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    said = fails(bare_pool.pipeline(), EncryptFiles(f"{tmp_path}/sealed", key=Vault("etl")), f"{tmp_path}/a.txt")
    assert "no Vault address is set for hcvault://transit/keys/etl. Set VAULT_ADDR" in said


def test_options_reach_worker_processes_of_the_direct_runner(tmp_path, aws, monkeypatch):
    kms, sts, _ = aws
    sts.requests.clear()
    for name, value in (kms.environment() | sts.environment).items():
        monkeypatch.setenv(name, value)
    words = ["--envelope_key=aws-kms://alias/etl", "--envelope_context=from=option", f"--envelope_aws_role_arn={ROLE}"]
    words += ["--envelope_aws_session_name=nightly", "--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    with jobs.make_pipeline(register_filesystem(PipelineOptions(words))) as p:
        lines = p | beam.Create(LINES) | beam.Reshuffle()
        _ = lines | beam.io.WriteToText(f"envelope+file://{tmp_path}/part", num_shards=2)
    assert {(request["RoleArn"], request["RoleSessionName"]) for request in sts.requests} == {(ROLE, "nightly")}
    assert 1 <= len(sts.requests) <= 2, "once for each process"
    with jobs.make_pipeline(register_filesystem(PipelineOptions(words[:-2])), 1, 0) as p:
        assert_that(p | beam.io.ReadFromText(f"envelope+file://{tmp_path}/part*"), equal_to(LINES))
