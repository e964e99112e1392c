"""RotateKeys with `aws-kms://` keys and `s3://` paths, over HTTP: which requests it makes, and what it refuses."""

import json

import pytest

from beam_envelope import RotateKeys, WrongKeyError
from beam_envelope.io import s3
from beam_envelope.io.keyfiles import KeyFileReplacedError, find_key_files, replace_key_file
from beam_envelope.keys.cache import clear_caches
from tests.running import decrypt, encrypt, fails, read_files, run
from tests.wire import s3_error

CONTEXT = {"dataset": "flights"}
FILES = {f"2026/{number}.csv": b"%d," % number * 100 for number in range(5)}


@pytest.fixture
def sealed(aws):
    """Five shards in S3 of one data key; returns AWS and the ARNs of the old and the new key."""
    arns = aws.create_key("alias/old"), aws.create_key("alias/new")
    aws.put("raw", FILES)
    encrypt("s3://raw/**", "s3://sealed/", "aws-kms://alias/old", context=CONTEXT)
    aws.calls()
    clear_caches()
    return aws, *arns


def test_one_re_encrypt_for_one_data_key_and_no_shard_is_read(sealed, tmp_path):
    aws, old, new = sealed
    _, counters = run(RotateKeys(f"aws-kms://{old}", to=f"aws-kms://{new}"), "s3://sealed/2026/*")
    touched = {request.path for request in aws.requests if request.operation in {"GetObject", "PutObject"}}
    key_files = {f"/sealed/2026/_KEY_FOR_{number}.csv.json" for number in range(5)}
    # The pattern names all that the manifest lists, so it goes along; another is looked for below it.
    assert touched == {*key_files, "/sealed/_MANIFEST.json", "/sealed/2026/_MANIFEST.json"}
    calls = aws.calls()
    assert {name: calls[name] for name in ("ReEncrypt", "DescribeKey", "Decrypt", "PutObject")} == {
        "ReEncrypt": 2,
        "DescribeKey": 0,
        "Decrypt": 0,
        "PutObject": 6,
    }
    assert counters == {"key_files": 6, "key_files_changed": 6, "kms_ReEncrypt": 2}
    decrypt("s3://sealed/", tmp_path / "opened", f"aws-kms://{new}", context=CONTEXT)
    assert len(read_files(tmp_path / "opened")) == 5
    with pytest.raises(WrongKeyError):
        decrypt("s3://sealed/", tmp_path / "no", f"aws-kms://{old}", context=CONTEXT)
    aws.calls()
    _, counters = run(RotateKeys(f"aws-kms://{old}", to=f"aws-kms://{new}"), "s3://sealed/")
    assert (counters, aws.calls()["PutObject"]) == ({"key_files": 6}, 0)


def test_a_key_of_another_region_is_added_and_opens_alone(sealed, tmp_path):
    aws, old, _ = sealed
    there = aws.create_key(region="eu-west-1")
    run(RotateKeys(f"aws-kms://{old}", add=f"aws-kms://{there}"), "s3://sealed/")
    for key in (old, there):
        clear_caches()
        decrypt("s3://sealed/", tmp_path / key[-4:], f"aws-kms://{key}", context=CONTEXT)
        assert len(read_files(tmp_path / key[-4:])) == 5


def test_an_object_that_changed_since_it_was_read_is_left_alone(sealed, hook):
    aws, *_ = sealed
    path = find_key_files("s3://sealed/2026/0.csv")[0]
    key = path.removeprefix("s3://sealed/")
    old = aws.read("sealed")[key]
    with pytest.raises(KeyFileReplacedError):
        replace_key_file(path, b"not what is there", b"new")
    assert aws.read("sealed")[key] == old
    # Between the last look and the write: S3 itself compares.
    hook("before-send.s3.PutObject", lambda **_: aws.put("sealed", {key: b"theirs"}))
    seen = []
    hook("before-send.s3.PutObject", lambda request, **_: seen.append(request.headers.get("If-Match")))
    hook("before-send.s3.PutObject", lambda request, **_: s3_error(request, 412, "PreconditionFailed"))
    with pytest.raises(KeyFileReplacedError):
        replace_key_file(path, old, b"new")
    assert seen[0]
    assert aws.read("sealed")[key] == b"theirs"


def test_a_request_that_was_sent_twice_finds_its_own_work(sealed, hook):
    aws, *_ = sealed
    path = find_key_files("s3://sealed/2026/0.csv")[0]
    key = path.removeprefix("s3://sealed/")
    old = aws.read("sealed")[key]
    hook("before-send.s3.PutObject", lambda **_: aws.put("sealed", {key: b"new"}))
    hook("before-send.s3.PutObject", lambda request, **_: s3_error(request, 412, "PreconditionFailed"))
    replace_key_file(path, old, b"new")
    assert s3.s3_client() is not None


def test_a_bucket_that_may_not_be_written_is_named_with_the_permission(sealed, hook):
    _, old, new = sealed
    hook("before-send.s3.PutObject", lambda request, **_: s3_error(request, 403, "AccessDenied"))
    name, message = fails(RotateKeys(f"aws-kms://{old}", to=f"aws-kms://{new}"), "s3://sealed/")
    assert (name, "the caller needs s3:PutObject on it" in message) == ("PermissionError", True)


def test_the_command_names_the_permission_that_is_missing_in_kms(aws, fake_kms, command):
    for name in ("old", "new"):
        fake_kms.create_key(name)
    aws.put("raw", FILES)
    encrypt("s3://raw/**", "s3://sealed/", "aws-kms://alias/old", context=CONTEXT)
    words = ("rotate", "s3://sealed/", "--from", "aws-kms://alias/old", "--to", "aws-kms://alias/new", "--json")
    before = aws.read("sealed")
    fake_kms.deny("ReEncryptTo")
    said = command(*words)
    assert said.status == 1
    assert "kms:ReEncryptFrom on the old key and kms:ReEncryptTo on the new one" in said.errors
    assert aws.read("sealed") == before
    fake_kms.allow("ReEncryptTo")
    fake_kms.deny("Decrypt")
    calls = fake_kms.calls
    said = command(*words, "--log", "s3://raw/audit/log.jsonl")
    figures = json.loads(said.output)
    assert (said.status, figures["changed"], figures["kms_calls"]["ReEncrypt"]) == (0, 6, 2)
    assert (fake_kms.calls - calls)[
        "ReEncrypt"
    ] == 2 + 1  # of the shards, of the manifest, and a dry run before anything started
    assert len(aws.read("raw")["audit/log.jsonl"].splitlines()) == 6
