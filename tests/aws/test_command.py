"""The command with `s3://` paths and `aws-kms://` keys: what it does, and what it says when it is refused."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from beam_envelope.testing import find_plaintext
from tests.running import with_key_files, with_manifest, write_files
from tests.wire import s3_error

KEY = ("--key", "aws-kms://alias/etl")
CONTEXT = ("--context", "dataset=flights")
FILES = {f"2026/{number}.csv": b"CANARY-%d,1\n" % number * 50 for number in range(5)}


def encrypt(*more):
    return ("encrypt", "s3://raw/2026/*", "--output", "s3://sealed/2026/", *KEY, *CONTEXT, *more)


def decrypt(*more):
    return ("decrypt", "s3://sealed/2026/*", "--output", "s3://opened/", *KEY, *CONTEXT, *more)


@pytest.fixture
def raw(aws):
    """An AWS with some files in `raw` and an empty bucket `opened`."""
    aws.s3.create_bucket(Bucket="opened")
    aws.put("raw", FILES)
    return aws


class TestJobs:
    def test_a_dataset_goes_to_s3_and_comes_back(self, raw, command, tmp_path):
        arn = raw.create_key("alias/etl")
        raw.calls()
        said = command(*encrypt("--json"))
        assert (said.status, json.loads(said.output)["files"]) == (0, 5)
        assert json.loads(said.output)["kms_calls"] == {"GenerateDataKey": 2}  # one for the manifest
        calls = raw.calls()
        assert calls["GenerateDataKey"] == 1 + 2  # that of the check, before anything starts, is thrown away
        assert calls["PutObject"] == 2 * 5 + 1
        assert sorted(raw.keys("sealed")) == with_manifest(*FILES, folder="2026/")
        assert find_plaintext(write_files(tmp_path, raw.read("sealed")), b"CANARY-") == []

        said = command("inspect", "s3://sealed/2026", "--json")
        assert said.status == 0
        shards = json.loads(said.output)
        assert [shard["path"] for shard in shards] == [f"s3://sealed/{name}" for name in FILES]
        assert {tuple(shard["kms_keys"]) for shard in shards} == {(arn,)}
        assert {shard["context"]["dataset"] for shard in shards} == {"flights"}
        assert {shard["plaintext_bytes"] for shard in shards} == {50 * 11}
        assert raw.calls() == {"HeadObject": 1, "ListObjectsV2": 2, "GetObject": 5}

        said = command("decrypt", "s3://sealed/2026", "--output", "s3://opened/2026", *KEY, *CONTEXT)
        assert said.status == 0
        assert "Decrypted 5 files" in said.output
        assert raw.calls()["Decrypt"] == 2  # for the shards, and for the manifest
        assert raw.read("opened") == FILES

    def test_cat_writes_the_plaintext(self, raw, command):
        raw.create_key("alias/etl")
        command(*encrypt())
        said = command("cat", "s3://sealed/2026/[13].csv", *KEY, *CONTEXT)
        assert said == (0, (FILES["2026/1.csv"] + FILES["2026/3.csv"]).decode(), "")

    def test_what_exists_is_refused_before_the_job_starts(self, raw, command):
        raw.create_key("alias/etl")
        command(*encrypt())
        before = raw.read("sealed")
        raw.calls()
        said = command(*encrypt())
        assert said.status == 1
        assert "s3://sealed/2026/0.csv: the output exists (5 of 5 do); choose to skip or overwrite it" in said.errors
        assert set(raw.calls()) == {"HeadObject", "ListObjectsV2"}
        assert raw.read("sealed") == before

    def test_a_pattern_that_finds_nothing_and_a_bucket_that_is_not_there(self, raw, command):
        raw.create_key("alias/etl")
        said = command("encrypt", "s3://raw/none/*", "--output", "s3://sealed/", *KEY)
        assert (said.status, "s3://raw/none/*: no file matches" in said.errors) == (1, True)
        said = command("encrypt", "s3://none/*", "--output", "s3://sealed/", *KEY)
        assert (said.status, "s3://none/*: there is no such bucket" in said.errors) == (1, True)
        said = command("encrypt", "s3://raw/2026/*", "--output", "s3://none/", *KEY)
        assert (said.status, "there is no such bucket" in said.errors) == (1, True)
        assert raw.keys("sealed") == []

    def test_an_output_bucket_that_refuses_is_named_with_the_permission(self, raw, command, hook):
        raw.create_key("alias/etl")
        hook("before-send.s3.PutObject", lambda request, **_: s3_error(request, 403, "AccessDenied"))
        said = command(*encrypt())
        assert said.status == 1
        assert "access denied; the caller needs s3:PutObject on it" in said.errors
        assert "s3://sealed/2026/_KEY_FOR_" in said.errors
        assert raw.keys("sealed") == []


class TestRefusals:
    """With a KMS that refuses what AWS refuses: which key, which permission, status 1, and nothing written."""

    @pytest.fixture
    def kms(self, raw, fake_kms):
        fake_kms.create_key("etl")
        fake_kms.create_key("other")
        return fake_kms

    @pytest.fixture
    def sealed(self, raw, kms, command):
        assert command(*encrypt()).status == 0
        return raw

    def test_no_permission_to_encrypt(self, raw, kms, command):
        kms.deny("GenerateDataKey")
        said = command(*encrypt())
        assert said.status == 1
        assert said.errors.startswith("beam-envelope encrypt: not allowed to use KMS key alias/etl: the caller needs ")
        assert "the caller needs kms:GenerateDataKey on it" in said.errors
        assert (raw.keys("sealed"), raw.uploads("sealed")) == ([], [])
        assert raw.calls()["PutObject"] == 0

    def test_no_permission_to_encrypt_under_the_second_key(self, raw, kms, command):
        kms.deny("Encrypt", "alias/other")
        said = command(*encrypt("--key", "aws-kms://alias/other"))
        assert said.status == 1
        assert "not allowed to use KMS key alias/other: the caller needs kms:Encrypt on it" in said.errors
        assert raw.keys("sealed") == []

    def test_no_permission_to_decrypt(self, sealed, kms, command):
        kms.deny("Decrypt")
        said = command(*decrypt())
        assert said.status == 1
        assert "KMS key alias/etl: the caller needs kms:Decrypt on it" in said.errors
        assert sealed.keys("opened") == []

    @pytest.mark.parametrize("words", [encrypt("--if-exists=overwrite"), decrypt()], ids=lambda words: words[0])
    def test_a_disabled_key(self, sealed, kms, command, words):
        before = sealed.read("sealed")
        kms.disable_key("alias/etl")
        said = command(*words)
        assert said.status == 1
        assert "KMS key alias/etl is disabled or pending deletion" in said.errors
        assert "enable" in said.errors
        assert (sealed.read("sealed"), sealed.keys("opened")) == (before, [])

    @pytest.mark.parametrize("words", [encrypt("--if-exists=overwrite"), decrypt()], ids=lambda words: words[0])
    def test_a_key_that_is_not_there(self, sealed, kms, command, words):
        said = command(*(word.replace("alias/etl", "alias/none") for word in words))
        assert said.status == 1
        assert "there is no KMS key alias/none in the region" in said.errors
        assert sealed.keys("opened") == []

    def test_the_wrong_key(self, sealed, kms, command):
        said = command(*(word.replace("alias/etl", "alias/other") for word in decrypt()))
        assert said.status == 1
        assert "KMS key alias/other did not wrap this data key. Give the key that the key file names" in said.errors
        assert sealed.keys("opened") == []

    @pytest.mark.parametrize("context", [(), ("--context", "dataset=other"), (*CONTEXT, "--context", "more=1")])
    def test_the_wrong_context(self, sealed, kms, command, context):
        before = kms.calls
        for manifest, what in (("ignore", "0.csv"), ("use", "_MANIFEST.json")):
            words = ("--output", "s3://opened/", *KEY, *context, f"--manifest={manifest}")
            said = command("decrypt", "s3://sealed/2026/*", *words)
            assert said.status == 1
            assert f"s3://sealed/2026/{what} was written with another encryption context" in said.errors
        assert sealed.keys("opened") == []
        assert kms.calls == before

    def test_any_context_when_the_caller_says_so(self, sealed, kms, command):
        said = command("decrypt", "s3://sealed/2026/*", "--output", "s3://opened/", *KEY, "--any-context")
        assert said.status == 0
        assert len(sealed.keys("opened")) == 5

    def test_kms_that_fails_after_the_check(self, raw, kms, command, hook):
        """What the check found good may be gone when the job runs: the job fails, and leaves nothing behind."""
        hook("before-send.s3.GetObject", lambda **_: kms.disable_key("alias/etl"))
        said = command(*encrypt())
        assert said.status == 1
        assert "KMS key alias/etl is disabled" in said.errors
        assert (raw.keys("sealed"), raw.uploads("sealed")) == ([], [])


def test_a_killed_job_is_finished_by_another_that_skips_what_is_whole(raw, command):
    """Killed in the middle of a large file: an incomplete upload stays, which no reader sees and no job minds."""
    raw.create_key("alias/etl")
    large = random.Random(1).randbytes(20 << 20)
    raw.put("raw", {"2026/large.bin": large})
    with raw.stopped_at("UploadPart", 2) as came:
        child = subprocess.Popen(
            [sys.executable, "-m", "beam_envelope.cli", *encrypt()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
        )
        assert came.wait(120)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    left = raw.keys("sealed")
    shards = [name for name in FILES if name in left]
    assert left == with_key_files(*shards)
    assert raw.uploads("sealed") == ["2026/large.bin"]

    # As if the job had been killed between a key file and its shard, too.
    raw.put("sealed", {"2026/_KEY_FOR_4.csv.json": b"from a killed job"})
    raw.s3.delete_object(Bucket="sealed", Key="2026/4.csv")
    shards = [name for name in shards if name != "2026/4.csv"]

    before = raw.read("sealed")
    if shards:
        inspected = json.loads(command("inspect", "s3://sealed/", "--json").output)
        assert [entry["path"] for entry in inspected if not entry["problem"]] == [f"s3://sealed/{n}" for n in shards]
    said = command(*encrypt("--if-exists=skip", "--json"))
    assert said.status == 0
    assert json.loads(said.output)["files_skipped"] == len(shards)
    assert json.loads(said.output)["files"] == len(FILES) + 1 - len(shards)
    after = raw.read("sealed")
    assert sorted(after) == with_manifest(*FILES, "2026/large.bin", folder="2026/")
    assert {name: after[name] for name in shards} == {name: before[name] for name in shards}

    assert command(*decrypt()).status == 0
    assert raw.read("opened") == {
        name.removeprefix("2026/"): data for name, data in (FILES | {"2026/large.bin": large}).items()
    }
    assert raw.uploads("sealed") == ["2026/large.bin"]  # what a lifecycle rule is for
