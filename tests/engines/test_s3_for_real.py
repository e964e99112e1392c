"""S3 as versitygw has it: it checks signatures, writes on conditions, and shows in a folder what is really stored."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import boto3
import pytest

from beam_envelope.formats.keyfile import MANIFEST_NAME, KeyFile
from beam_envelope.formats.manifest import Manifest
from beam_envelope.io import s3
from beam_envelope.io.s3 import S3Store, clear_s3_clients, s3_client
from beam_envelope.testing import find_plaintext
from tests.engines import build
from tests.engines.branches import CANARY, CONTEXT, KEY
from tests.engines.gateway import ACCESS_KEY, NOT_THERE, Gateway
from tests.engines.races import RACES, read_shard, write_shard
from tests.engines.server import clean_environment, wait_for
from tests.running import decrypt, encrypt, read_files, write_files

pytestmark = pytest.mark.skipif("versitygw" in build.missing(), reason="versitygw is not built: run `make engines`")

OF_S3 = [
    "tests/io/test_s3.py",
    "tests/io/test_keystore.py",
    "tests/io/test_manifest.py",
    "tests/io/test_filesystem.py",
    "tests/io/test_s3_role.py",
    "tests/aws",
    "tests/fsspec/test_s3.py",
]
PART = 5 << 20
STEPS = 20


def data_of(size, seed=0):
    return random.Random(seed).randbytes(size)


def test_the_tests_of_s3_hold_here_too(tmp_path):
    command = [sys.executable, "-m", "pytest", *OF_S3, "--s3", "versitygw", "-k", "s3 or aws or S3", "-rs"]
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--numprocesses",
        "2",
        "--basetemp",
        tmp_path / "its",
        "--timeout",
        "300",
    ]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        said = process.communicate(timeout=580)[0]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # it ends its servers
            process.wait(15)
    assert process.returncode == 0, said[-10_000:]
    assert int(re.search(r"(\d+) passed", said)[1]) > 200, said
    for reason in set(NOT_THERE.values()):
        assert reason in said


# ------------------------------------------------------------------------------------------- conditional requests


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    """A versitygw for the tests of this file."""
    gateway = Gateway(tmp_path_factory.mktemp("versitygw"))
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def environment(gateway, kms):
    """What leads a process to this S3 and to a KMS."""
    return {**kms.environment(), **gateway.variables()}


@pytest.fixture
def client(gateway, environment, monkeypatch):
    """A client, and an empty bucket; this process's own S3 is the gateway too."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    clear_s3_clients()
    gateway.empty("sealed")
    client = boto3.client("s3")
    client.create_bucket(Bucket="sealed")
    yield client
    clear_s3_clients()


@pytest.fixture(scope="module")
def raced(gateway, environment, tmp_path_factory):
    """What two processes said of each race that they had: two lists of STEPS, by race."""
    (gateway.objects / "race").mkdir()
    folder = tmp_path_factory.mktemp("races")
    (folder / "gate").mkdir()
    variables = clean_environment(folder, environment)
    command = [sys.executable, "-m", "tests.engines.races"]
    processes = [
        subprocess.Popen([*command, me, str(STEPS), folder / "gate"], env=variables, stdout=subprocess.PIPE, text=True)
        for me in "12"
    ]
    try:
        said = [
            [json.loads(line) for line in process.communicate(timeout=300)[0].splitlines()] for process in processes
        ]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    return {race: [[did for what, did in lines if what == race] for lines in said] for race in RACES}


def test_of_two_who_make_a_dataset_key_both_have_the_same(raced, gateway):
    first, second = raced["dataset key"]
    assert first == second
    assert len(set(first)) == STEPS
    assert len(list((gateway.objects / "race/keys").iterdir())) == 2 * STEPS  # by its name, and by its key id


def test_of_two_who_create_a_file_once_both_read_the_same(raced, gateway):
    first, second = raced["key file"]
    assert first == second
    stored = [path.read_text() for path in sorted((gateway.objects / "race/once").iterdir())]
    assert sorted(stored) == sorted(first)


@pytest.mark.usefixtures("client")
def test_of_two_who_write_one_shard_one_is_refused_and_the_other_reads(raced):
    first, second = raced["shard"]
    for step in range(STEPS):
        assert first[step] + second[step] == 1
        assert read_shard(f"s3://race/shards/{step}") == f"by {1 if first[step] else 2}".encode()


def test_of_two_jobs_that_add_to_a_manifest_neither_is_lost(raced, gateway):
    assert raced["manifest"] == [[f"s3://race/listed/{MANIFEST_NAME}"] * STEPS] * 2
    raw = (gateway.objects / "race/listed" / MANIFEST_NAME).read_bytes()
    assert set(Manifest.from_bytes(raw, "m").latest()) == {f"{me}-{step}" for me in (1, 2) for step in range(STEPS)}


# ------------------------------------------------------------------------------------------------ what is stored


def test_a_wrong_secret_is_refused_with_our_error(client, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    clear_s3_clients()
    with pytest.raises(
        PermissionError, match=r"S3 does not take these credentials; check them\. S3 says SignatureDoesNotMatch"
    ):
        list(S3Store().match("s3://sealed/*"))


def test_neither_plaintext_nor_a_key_is_in_its_folder(client, gateway, kms, tmp_path, monkeypatch):
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    large = CANARY.encode() * (2 * PART // len(CANARY))
    contents = {f"{number}.csv": f"{CANARY},{number}\n".encode() * 1000 for number in range(5)} | {"large": large}
    encrypt(write_files(tmp_path / "data", contents), "s3://sealed/", KEY, context=CONTEXT)
    key_files = list((gateway.objects / "sealed").rglob("_KEY_FOR_*"))
    assert len(key_files) == len(contents)
    data_keys = [key for path in key_files for key in KeyFile.from_bytes(path.read_bytes(), "a key file").data_keys]
    wrapped = {form.wrapped for key in data_keys for form in key.wrapped_keys}
    unwrap = boto3.client("kms").decrypt
    keys = [unwrap(CiphertextBlob=blob, EncryptionContext=CONTEXT)["Plaintext"] for blob in wrapped]
    assert len(keys) == 1
    assert find_plaintext([gateway.objects], CANARY.encode(), *keys) == []
    assert find_plaintext([gateway.objects], *wrapped) == sorted(key_files)  # the search would find it
    for path in gateway.objects.rglob("*"):
        for name in os.listxattr(path):
            assert CANARY.encode() not in os.getxattr(path, name)
    decrypt("s3://sealed/", tmp_path / "opened", KEY, context=CONTEXT)
    assert read_files(tmp_path / "opened") == contents


# ------------------------------------------------------------------------------------------------- a server killed


@pytest.fixture
def restarted(gateway, client, monkeypatch):
    """The gateway, which is up again after the test."""
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    yield gateway
    if not gateway.is_alive():
        gateway.start_again()


def visible(client):
    return [item["Key"] for item in client.list_objects_v2(Bucket="sealed").get("Contents", [])]


@pytest.mark.parametrize("moment", ["CreateMultipartUpload", "UploadPart", "PutObject", "CompleteMultipartUpload"])
def test_killed_before_any_request_nothing_is_whole_and_a_second_try_is(restarted, client, moment, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")  # nobody starts it again meanwhile
    data, one = data_of(3 * PART), threading.Lock()  # parts are sent by several threads

    def kill(**_):
        with one:
            if restarted.is_alive():
                restarted.kill()

    s3_client().meta.events.register(f"before-send.s3.{moment}", kill)
    with pytest.raises(OSError, match="S3 could not be used"), write_shard("s3://sealed/large") as shard:
        shard.write(data)
    clear_s3_clients()
    restarted.start_again()
    assert "large" not in visible(client)
    assert not (restarted.objects / "sealed/large").exists()
    with write_shard("s3://sealed/large", overwrite=True) as shard:
        shard.write(data)
    assert read_shard("s3://sealed/large") == data


@pytest.mark.usefixtures("client")
def test_a_writer_outlives_a_server_that_is_away_for_a_moment(restarted):
    data = data_of(6 * PART)

    def restart():
        restarted.kill()
        time.sleep(3)
        restarted.start_again()

    with write_shard("s3://sealed/large") as shard:
        shard.write(data[: 2 * PART])
        thread = threading.Thread(target=restart)
        thread.start()
        shard.write(data[2 * PART :])
        thread.join()
    assert read_shard("s3://sealed/large") == data


def test_a_job_whose_server_is_killed_is_finished_by_skip(restarted, client, environment, tmp_path):
    contents = {f"{number:02}": data_of(1 << 20, number) for number in range(30)}
    data = write_files(tmp_path / "data", contents)
    words = ["encrypt", f"{data}/*", "--output", "s3://sealed/", "--key", KEY, "--context", "dataset=people"]
    command = [sys.executable, "-m", "beam_envelope.cli", *words]
    variables = clean_environment(tmp_path, {**environment, "AWS_MAX_ATTEMPTS": "2"})  # nobody starts it meanwhile
    objects = restarted.objects / "sealed"
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
        try:
            wait_for(lambda: len(list(objects.glob("[0-9]*"))) >= 3, "job", alive=lambda: process.poll() is None)
            restarted.kill()
            status = process.wait(300)
        finally:
            process.kill()
        said = (tmp_path / "log").read_text()
    there = {path.name for path in objects.glob("[0-9]*")}
    assert 3 <= len(there) < len(contents), "it was killed too late to see anything"
    assert status == 1
    assert "S3 could not be used" in said
    assert ACCESS_KEY not in said.replace("beam_envelope.testing", "")
    restarted.start_again()
    for name in there:
        assert read_shard(f"s3://sealed/{name}") == contents[name]
    done = subprocess.run([*command, "--if-exists", "skip"], env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:  # a key file without its shard, which only --if-exists overwrite replaces
        assert "a killed one left it; choose to overwrite it" in done.stderr
        done = subprocess.run([*command, "--if-exists", "overwrite"], env=variables, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    decrypt("s3://sealed/", tmp_path / "opened", KEY, context=CONTEXT)
    assert read_files(tmp_path / "opened") == contents
