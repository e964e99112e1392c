"""The jobs of the Flex Templates, made and staged by Beam's own DataflowRunner: as far as goes without an account.

The launcher of a template calls the program with `--template_location`: the runner stages the job and submits nothing.
"""

import base64
import bz2
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import pytest
from apache_beam.internal import pickler
from apache_beam.portability.api import beam_runner_api_pb2

import pipelines
from beam_envelope import DecryptRecords, EncryptColumns, EncryptFields, EncryptRecords
from beam_envelope.testing import FakeKms
from pipelines.dataflow.launch import launch

pytest.importorskip("google.cloud.dataflow_v1beta3")
gcs = pytest.importorskip("tests.pipelines.gcs")  # needs google-crc32c, which comes with it

CANARY = "CANARY-7f3a-4111111111111111"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAMADEUPIDENTIFIER",
    "AWS_SECRET_ACCESS_KEY": "made-up-aws-secret-7f3a",
    "AWS_SESSION_TOKEN": "made-up-session-token-7f3a",
    "VAULT_TOKEN": "made-up-vault-token-7f3a",
}
IMAGE = "us-docker.pkg.dev/test-project/images/beam-envelope:1"
GROUP_BY_KEY = "beam:transform:group_by_key:v1"
STEPS = {
    "encrypt": [
        "Files",
        "EncryptFiles",
        "EncryptFiles/Plan",
        "EncryptFiles/Group",
        "EncryptFiles/Spread",
        "EncryptFiles/Encrypt",
        "EncryptFiles/Manifest",
    ],
    "decrypt": [
        "Files",
        "DecryptFiles",
        "DecryptFiles/Plan",
        "DecryptFiles/Group",
        "DecryptFiles/Spread",
        "DecryptFiles/Decrypt",
    ],
    "rotate": [
        "KeyFiles",
        "RotateKeys",
        "RotateKeys/Find",
        "RotateKeys/Spread",
        "RotateKeys/Read",
        "RotateKeys/Group",
        "RotateKeys/Rotate",
        "RotateKeys/Failed",
        "Flatten",
        "Tell",
    ],
    "verify": [
        "Files",
        "VerifyShards",
        "VerifyShards/Find",
        "VerifyShards/Pair",
        "VerifyShards/Split",
        "VerifyShards/Spread",
        "VerifyShards/Check",
        "VerifyShards/Collect",
        "VerifyShards/Merge",
        "Tell",
    ],
}
"""The steps' names, which metrics and alerts go by: a change here is a change for users."""


class Job(NamedTuple):
    """What was staged: the job's document, its pipeline, and everything as bytes."""

    document: dict
    pipeline: beam_runner_api_pb2.Pipeline
    objects: dict[str, bytes]

    @property
    def options(self):
        """The options that workers get."""
        return self.document["environment"]["sdkPipelineOptions"]["options"]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    """A store for staged files and made-up credentials: a function that returns, and forgets, what was staged."""
    with gcs.serve() as (url, objects), pytest.MonkeyPatch.context() as patch:
        account = tmp_path_factory.mktemp("account") / "account.json"
        account.write_text(json.dumps(gcs.service_account(url)))
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(account))

        def staged():
            found = dict(objects)
            objects.clear()
            (pipeline,) = [data for name, data in found.items() if name.endswith("/pipeline.pb")]
            return Job(json.loads(found["bucket/job.json"]), beam_runner_api_pb2.Pipeline.FromString(pipeline), found)

        yield staged


def words(template, data):
    """Return what the launcher of a template gives."""
    arguments = {
        "encrypt": ["--output=gs://sealed/", "--key=aws-kms://alias/etl"],
        "decrypt": ["--output=gs://opened/", "--key=aws-kms://alias/etl"],
        "rotate": ["--from=aws-kms://alias/etl", "--to=aws-kms://alias/new"],
        "verify": ["--key=aws-kms://alias/etl"],
    }
    return [
        f"--input={data}/*",
        *arguments[template],
        *([] if template == "rotate" else ["--context=dataset=flights"]),
        f"--sdk_container_image={IMAGE}",
        "--runner=DataflowRunner",
        "--project=test-project",
        "--region=us-central1",
        "--job_name=seal-flights",
        "--staging_location=gs://bucket/staging",
        "--temp_location=gs://bucket/temp",
        "--template_location=gs://bucket/job.json",
        "--service_account_email=worker@test-project.iam.gserviceaccount.com",
        "--subnetwork=regions/us-central1/subnetworks/private",
        "--no_use_public_ips",
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a file that holds the canary."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.csv").write_text(f"email\n{CANARY}\n")
    return folder


@pytest.fixture(scope="module")
def environment():
    """The launcher's variables: secrets, and a KMS with the jobs' keys, which are checked before the job."""
    with FakeKms() as kms:
        for alias in ("etl", "new"):
            kms.create_key(alias)
        yield kms.environment() | SECRETS


@pytest.fixture(scope="module")
def jobs(cloud, data, environment):
    """The job of each template."""
    staged = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        for template in STEPS:
            patch.setenv("BEAM_ENVELOPE_PIPELINE", template)
            launch(words(template, data))
            staged[template] = cloud()
    return staged


@pytest.fixture(params=list(STEPS))
def job(request, jobs):
    """Each job in turn."""
    return jobs[request.param]


def test_the_job_is_batch_on_the_image_of_the_template(job):
    environment = job.document["environment"]
    (pool,) = environment["workerPools"]
    assert job.document["name"] == "seal-flights"
    assert job.document["type"] == "JOB_TYPE_BATCH"
    assert pool["workerHarnessContainerImage"] == IMAGE
    assert pool["subnetwork"] == "regions/us-central1/subnetworks/private"
    assert pool["ipConfiguration"] == "WORKER_IP_PRIVATE"
    assert environment["serviceAccountEmail"] == "worker@test-project.iam.gserviceaccount.com"
    for environment in job.pipeline.components.environments.values():
        assert IMAGE.encode() in environment.payload


def test_nothing_was_submitted(job):
    assert job.options["template_location"] == "gs://bucket/job.json"
    assert "id" not in job.document


@pytest.mark.parametrize("template", STEPS)
def test_steps_keep_their_names(template, jobs):
    pipeline = jobs[template].pipeline
    roots = set(pipeline.root_transform_ids)
    names = [one.unique_name for name, one in pipeline.components.transforms.items() if name not in roots]
    depth_two = {name for name in names if name.count("/") <= 1 and "(" not in name}
    inside_of_beam = {
        name for name in depth_two for step in ("Files", "KeyFiles", "Flatten") if name.startswith(f"{step}/")
    }
    assert depth_two - inside_of_beam == set(STEPS[template])


def test_the_workers_load_our_filesystems(job):
    plugins = {name for name in job.options["beam_plugins"] if name.startswith("beam_envelope")}
    assert {
        "beam_envelope.io.filesystem.EnvelopeLocalFileSystem",
        "beam_envelope.io.filesystem.EnvelopeS3FileSystem",
        "beam_envelope.io.filesystem.EnvelopeGCSFileSystem",
    } <= plugins


def payloads(pipeline):
    """Yield what the functions of a pipeline were pickled to, by step, unpacked."""
    for transform in pipeline.components.transforms.values():
        if transform.spec.urn == "beam:transform:pardo:v1":
            packed = beam_runner_api_pb2.ParDoPayload.FromString(transform.spec.payload).do_fn.payload
            yield transform.unique_name, packed + unpacked(packed)


def unpacked(packed):
    """Return what is in one of Beam's pickles: base64 of bz2 or zlib."""
    for unpack in (bz2.decompress, zlib.decompress):
        try:
            return unpack(base64.b64decode(packed))
        except (OSError, ValueError, zlib.error):
            pass
    return b""


def test_the_search_looks_into_pickled_functions(job):
    assert any(b"_DoFn" in text or b"DoFn" in text for _, text in payloads(job.pipeline))


def test_nothing_secret_is_staged(job, data):
    account = json.loads(Path(os.environ["GOOGLE_APPLICATION_CREDENTIALS"]).read_text())
    body = "".join(account["private_key"].splitlines()[1:-1])
    secrets = [*SECRETS.values(), gcs.TOKEN, body[100:140], CANARY]
    for place, staged in [*job.objects.items(), *payloads(job.pipeline)]:
        for secret in secrets:
            for form in (secret.encode(), base64.b64encode(secret.encode())[:-4], secret.encode().hex().encode()):
                assert form not in staged, place


def test_the_jobs_say_which_key_and_context_but_not_in_options(jobs):
    staged = dict(payloads(jobs["encrypt"].pipeline))["EncryptFiles/Encrypt"]
    for name in (b"alias/etl", b"dataset", b"flights"):
        assert name in staged
    assert "key" not in jobs["encrypt"].options


# ------------------------------------------------------------------------ what is shuffled before it is encrypted


def before(pipeline, step):
    """Return the names of the single steps that lead to one, by URN."""
    transforms = pipeline.components.transforms
    single = {name: one for name, one in transforms.items() if not one.subtransforms}
    makers = {output: name for name, one in single.items() for output in one.outputs.values()}
    (start,) = [name for name, one in single.items() if one.unique_name == step]
    found, waiting = set(), [start]
    while waiting:
        makers_of = {makers[value] for value in single[waiting.pop()].inputs.values() if value in makers} - found
        found |= makers_of
        waiting.extend(makers_of)
    return {single[name].unique_name: single[name].spec.urn for name in found}


def grouped(pipeline, step):
    """Return the names of the GroupByKeys before a step; a Reshuffle has one inside."""
    return sorted(name for name, urn in before(pipeline, step).items() if urn == GROUP_BY_KEY)


def test_only_paths_are_grouped_before_they_are_encrypted(jobs, data):
    pipeline = jobs["encrypt"].pipeline
    spread = "EncryptFiles/Spread/ReshufflePerKey/GroupByKey"
    assert grouped(pipeline, "EncryptFiles/Encrypt") == ["EncryptFiles/Group", spread]
    steps = before(pipeline, "EncryptFiles/Encrypt")
    ours = [name for name in steps if not name.startswith(("Files/", "EncryptFiles/Spread/"))]
    assert sorted(ours) == ["EncryptFiles/Group", "EncryptFiles/Plan"]
    # What the staged function gives to the group, of a file that holds the canary:
    (plan,) = [one for one in pipeline.components.transforms.values() if one.unique_name == "EncryptFiles/Plan"]
    payload = beam_runner_api_pb2.ParDoPayload.FromString(plan.spec.payload).do_fn.payload
    tasks = list(pickler.loads(payload)[0].process(f"{data}/*"))
    assert [task.source for _, task in tasks] == [f"{data}/a.csv"]
    assert CANARY.encode() not in unpacked(pickler.dumps(tasks))


SETTINGS = {"key": "aws-kms://alias/etl", "keys": "gs://sealed/keys/"}
ELEMENTS = {
    "records": (["a"], EncryptRecords(**SETTINGS)),
    "messages": (["a"], EncryptRecords(key="aws-kms://alias/etl", format="aws-encryption-sdk")),
    "fields": ([{"a": "b"}], EncryptFields(["a"], **SETTINGS)),
    "columns": ([beam.Row(a="b")], EncryptColumns(["a"], **SETTINGS)),
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_elements_are_encrypted_before_anything_is_grouped(name):
    elements, transform = ELEMENTS[name]
    pipeline = beam.Pipeline(runner="FnApiRunner")
    _ = pipeline | "In" >> beam.Create(elements, reshuffle=False) | "Seal" >> transform
    assert grouped(pipeline.to_runner_api(), "Seal/Encrypt") == []


def test_the_walk_finds_what_is_grouped():
    pipeline = beam.Pipeline(runner="FnApiRunner")
    sealed = pipeline | "In" >> beam.Create(["a"], reshuffle=False) | beam.Reshuffle() | EncryptRecords(**SETTINGS)
    _ = sealed | "Later" >> beam.Reshuffle() | "Open" >> DecryptRecords(**SETTINGS)
    proto = pipeline.to_runner_api()
    assert len(grouped(proto, "EncryptRecords/Encrypt")) == 1
    assert len(grouped(proto, "Open/Decrypt")) == 2


# ------------------------------------------------------------------------------------------- as a program


def test_the_program_of_the_image_stages_its_job_and_ends(cloud, data, environment):
    """As the launcher starts it: in a process of its own, whose main session is staged for the workers, too."""
    root = Path(pipelines.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, str(root / "pipelines" / "dataflow" / "launch.py"), *words("decrypt", data)],
        env={**os.environ, **environment, "BEAM_ENVELOPE_PIPELINE": "decrypt", "PYTHONPATH": str(root)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    job = cloud()
    assert [name.rpartition("/")[2] for name in job.objects if "pickled_main_session" in name]
    for secret in [*SECRETS.values(), gcs.TOKEN]:
        assert not any(secret.encode() in text + unpacked(text) for text in job.objects.values())
        assert secret not in done.stdout + done.stderr
