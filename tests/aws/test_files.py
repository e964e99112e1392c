"""EncryptFiles and DecryptFiles with `aws-kms://` keys and `s3://` paths, over HTTP."""

import json
import random

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from botocore.exceptions import ClientError

from beam_envelope import DecryptFiles, EncryptFiles, jobs
from beam_envelope.formats.keyfile import KeyFile
from beam_envelope.io import s3
from beam_envelope.testing import find_plaintext
from tests.running import decrypt, encrypt, fails, read_files, run, with_manifest, write_files

CONTEXT = {"dataset": "flights", "tenant": "a"}
CANARY = b"CANARY-4111111111111111"


def data_of(size, seed=0):
    return random.Random(seed).randbytes(size)


FILES = {
    "2026/a.csv": CANARY + b",1\n" + CANARY + b",2\n",
    "2026/empty": b"",
    "2026/größe b+%20.bin": data_of(100_000),
    "2026/deep/a.csv": CANARY * 10_000,
}


@pytest.fixture
def raw(aws):
    """The files in the bucket `raw`."""
    aws.put("raw", FILES)
    return aws


def below(folder, contents):
    return {name.removeprefix(folder): data for name, data in contents.items()}


def test_from_s3_to_s3_and_back(raw):
    arn = raw.create_key("alias/etl")
    job = encrypt("s3://raw/2026/**", "s3://sealed/out", "aws-kms://alias/etl", context=CONTEXT)
    names = [f"out/{name}" for name in below("2026/", FILES)]
    assert sorted(raw.keys("sealed")) == with_manifest(*names, folder="out/")
    assert [result.shard for result in job.results] == sorted(f"s3://sealed/{name}" for name in names)
    key_file = KeyFile.from_bytes(raw.read("sealed")["out/_KEY_FOR_a.csv.json"], "a key file")
    assert [form.kms_key for form in key_file.data_keys[0].wrapped_keys] == [arn]
    assert raw.calls()["GenerateDataKey"] == 2  # for the shards, and for the manifest
    decrypt("s3://sealed/out/**", "s3://raw/opened", "aws-kms://alias/etl", context=CONTEXT)
    assert below("opened/", {k: v for k, v in raw.read("raw").items() if k.startswith("opened/")}) == below(
        "2026/", FILES
    )
    assert raw.calls()["Decrypt"] == 2


def test_from_a_disk_to_s3_and_back(aws, tmp_path):
    aws.create_key("alias/etl")
    source = write_files(tmp_path / "source", FILES)
    encrypt(source, "s3://sealed/", "aws-kms://alias/etl")
    assert sorted(aws.keys("sealed")) == with_manifest(*FILES)
    decrypt("s3://sealed/", tmp_path / "opened", "aws-kms://alias/etl")
    assert read_files(tmp_path / "opened") == FILES


def test_from_s3_to_a_disk_and_back(raw, tmp_path):
    raw.create_key("alias/etl")
    encrypt("s3://raw/2026", tmp_path / "sealed", "aws-kms://alias/etl")  # a folder without its slash
    decrypt(tmp_path / "sealed", "s3://sealed/", "aws-kms://alias/etl")
    assert raw.read("sealed") == below("2026/", FILES)


def test_no_object_of_the_output_holds_plaintext(raw, tmp_path):
    raw.create_key("alias/etl")
    encrypt("s3://raw/**", "s3://sealed/", "aws-kms://alias/etl", context=CONTEXT)
    sealed = write_files(tmp_path / "sealed", raw.read("sealed"))
    assert find_plaintext(sealed, CANARY, FILES["2026/größe b+%20.bin"][5000:5020]) == []
    assert find_plaintext(write_files(tmp_path / "raw", FILES), CANARY)  # the search would find it


@pytest.mark.parametrize("name", ["alias", "key id", "key ARN", "alias ARN"])
def test_a_key_by_any_of_its_names(raw, name):
    arn = raw.create_key("alias/etl")
    key = {
        "alias": "aws-kms://alias/etl",
        "key id": f"aws-kms://{arn.rpartition('/')[2]}",
        "key ARN": f"aws-kms://{arn}",
        "alias ARN": f"aws-kms://{arn.partition('key/')[0]}alias/etl",
    }[name]
    encrypt("s3://raw/2026/a.csv", "s3://sealed/", key, context=CONTEXT)
    decrypt("s3://sealed/a.csv", "s3://raw/opened/", key, context=CONTEXT)
    assert raw.read("raw")["opened/a.csv"] == FILES["2026/a.csv"]


def test_keys_of_two_regions_either_of_which_opens(raw):
    here, there = raw.create_key(region="us-east-1"), raw.create_key("alias/etl", region="eu-west-1")
    assert ":eu-west-1:" in there
    raw.calls()
    encrypt("s3://raw/2026/*", "s3://sealed/", [f"aws-kms://{there}", f"aws-kms://{here}"], context=CONTEXT)
    kms = [(request.operation, request.region) for request in raw.requests if request.path == "/"]
    assert kms == [("GenerateDataKey", "eu-west-1"), ("Encrypt", "us-east-1")] * 2  # of the shards, of the manifest
    raw.calls()
    for key, region in (
        (f"aws-kms://{here}", "us-east-1"),
        (f"aws-kms://{there}", "eu-west-1"),
        ("aws-kms://alias/etl?region=eu-west-1", "eu-west-1"),
    ):
        decrypt("s3://sealed/*", "s3://raw/opened/", key, context=CONTEXT, if_exists="overwrite")
        assert raw.read("raw")["opened/a.csv"] == FILES["2026/a.csv"]
        assert [(r.operation, r.region) for r in raw.requests if r.path == "/"] == [("Decrypt", region)] * 2
        raw.calls()


def test_a_key_of_another_region_is_not_even_asked(raw):
    raw.create_key("alias/etl")
    other = raw.create_key("alias/etl", region="eu-west-1")
    encrypt("s3://raw/2026/a.csv", "s3://sealed/", "aws-kms://alias/etl")
    raw.calls()
    for manifest, what in (("ignore", "s3://sealed/a.csv"), ("use", "section 1 of s3://sealed/_MANIFEST.json")):
        transform = DecryptFiles("s3://raw/opened/", key=f"aws-kms://{other}", manifest=manifest)
        name, message = fails(transform, "s3://sealed/a.csv")
        assert name == "WrongKeyError"
        assert message.startswith(f"{what} is encrypted under arn:aws:kms:us-east-1:")
        assert other in message
    assert raw.calls()["Decrypt"] == 0
    assert not [key for key in raw.keys("raw") if key.startswith("opened/")]


@pytest.mark.parametrize(
    "context", [None, {"dataset": "flights"}, {**CONTEXT, "more": "1"}, {**CONTEXT, "tenant": "b"}]
)
def test_another_context_opens_nothing_and_asks_nobody(raw, context):
    raw.create_key("alias/etl")
    encrypt("s3://raw/2026/a.csv", "s3://sealed/", "aws-kms://alias/etl", context=CONTEXT)
    raw.calls()
    for manifest, what in (("ignore", "s3://sealed/a.csv"), ("use", "section 1 of s3://sealed/_MANIFEST.json")):
        transform = DecryptFiles("s3://raw/opened/", key="aws-kms://alias/etl", context=context, manifest=manifest)
        name, message = fails(transform, "s3://sealed/a.csv")
        assert name == "ContextMismatchError"
        assert message.startswith(what)
    assert raw.calls()["Decrypt"] == 0
    assert not [key for key in raw.keys("raw") if key.startswith("opened/")]


def test_kms_itself_holds_to_the_context(raw):
    """Whoever changes the context in a key file, or calls KMS without us, gets nothing."""
    raw.create_key("alias/etl")
    encrypt("s3://raw/2026/a.csv", "s3://sealed/", "aws-kms://alias/etl", context=CONTEXT)
    key_file = raw.read("sealed")["_KEY_FOR_a.csv.json"]
    blob = KeyFile.from_bytes(key_file, "a key file").data_keys[0].wrapped_keys[0].wrapped
    kms = raw.client("kms", "us-east-1")
    assert len(kms.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT)["Plaintext"]) == 32
    with pytest.raises(ClientError, match="InvalidCiphertextException"):
        kms.decrypt(CiphertextBlob=blob)
    document = json.loads(key_file)
    document["context"]["tenant"] = "b"
    changed = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    raw.put("sealed", {"_KEY_FOR_a.csv.json": changed.encode()})
    settings = {"key": "aws-kms://alias/etl", "context": {**CONTEXT, "tenant": "b"}}
    name, _ = fails(DecryptFiles("s3://raw/opened/", **settings), "s3://sealed/a.csv")
    assert name == "ContextMismatchError"  # the manifest's
    name, message = fails(DecryptFiles("s3://raw/opened/", **settings, manifest="ignore"), "s3://sealed/a.csv")
    assert name == "TamperedError"
    assert "the key file or its encryption context was changed" in message


HUNDRED = {f"many/{number:03}.bin": data_of(1000, number) for number in range(100)}


def test_a_hundred_files_in_one_bundle_are_few_calls_to_kms_and_to_s3(aws, monkeypatch):
    """The requests that jobs of small files make, so that a change that adds one to each file is seen.

    The readers are two processes, which reach S3 by Beam's option only.
    """
    aws.create_key("alias/etl")
    aws.put("raw", HUNDRED)
    aws.calls()
    job = encrypt("s3://raw/many/*", "s3://sealed/", "aws-kms://alias/etl")
    assert len(job.results) == 100
    assert aws.calls() == {
        "GenerateDataKey": 1 + 1,  # for the shards; for the manifest
        "GetObject": 100 + 100 + 1,  # the file; its shard's key file, read back; whether there is a manifest
        "PutObject": 100 + 100 + 1,  # the key file; the shard; the manifest
        # Whether the glob is the name of a file; whether there is an old shard to remove; whether a manifest came.
        "HeadObject": 1 + 100 + 2,
        "ListObjectsV2": 1 + 1 + 1 + 1,  # the same for a folder; the files; key files beside them; shards that exist
    }
    assert sorted(aws.keys("sealed")) == with_manifest(*below("many/", HUNDRED))

    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", aws.endpoint)
    workers = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    pipeline = jobs.make_pipeline(PipelineOptions([*workers, f"--s3_endpoint_url={aws.endpoint}"]))
    _ = pipeline | beam.Create(["s3://sealed/*"]) | DecryptFiles("s3://raw/opened/", key="aws-kms://alias/etl")
    result = pipeline.run()
    result.wait_until_finish()
    calls = aws.calls()
    assert calls.pop("Decrypt") in (1 + 1, 2 + 1)  # one in each process that had files, and the manifest's
    assert calls == {
        "GetObject": 100 + 100 + 1,  # the key file; the shard; the manifest
        "PutObject": 100,
        "HeadObject": 1,
        "ListObjectsV2": 1 + 1 + 1,  # whether the glob is the name of a folder; the shards; outputs that exist
    }
    assert jobs.counters(result)["files"] == 100
    opened = {key: data for key, data in aws.read("raw").items() if key.startswith("opened/")}
    assert below("opened/", opened) == below("many/", HUNDRED)


def test_a_file_is_split_at_line_ends_into_shards(aws):
    aws.create_key("alias/etl")
    lines = b"".join(b"%06d,%s\n" % (number, CANARY) for number in range(100_000))
    aws.put("raw", {"flights.csv": b"number,text\n" + lines})
    aws.calls()
    job = encrypt("s3://raw/flights.csv", "s3://sealed/", "aws-kms://alias/etl", split_lines="1MiB", header_lines=1)
    names = [f"flights-{number:05}-of-00003.csv" for number in range(3)]
    assert [result.shard for result in job.results] == [f"s3://sealed/{name}" for name in names]
    calls = aws.calls()
    assert calls["GenerateDataKey"] == 1 + 1  # the manifest's
    assert calls["PutObject"] == 6 + 1
    decrypt("s3://sealed/*.csv", "s3://raw/opened/", "aws-kms://alias/etl")
    parts = [aws.read("raw")[f"opened/{name}"] for name in names]
    assert all(part.startswith(b"number,text\n") and part.endswith(b"\n") for part in parts)
    assert b"".join(part.removeprefix(b"number,text\n") for part in parts) == lines


def test_a_large_file_goes_in_parts_and_comes_back(aws, monkeypatch):
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    aws.create_key("alias/etl")
    aws.put("raw", {"large": data_of(12 << 20)})
    aws.calls()
    encrypt("s3://raw/large", "s3://sealed/", "aws-kms://alias/etl")
    calls = aws.calls()
    assert (calls["CreateMultipartUpload"], calls["UploadPart"], calls["CompleteMultipartUpload"]) == (1, 3, 1)
    decrypt("s3://sealed/large", "s3://raw/opened/", "aws-kms://alias/etl")
    assert aws.calls()["GetObject"] == 3  # the manifest, the key file, and the shard from end to end
    assert aws.read("raw")["opened/large"] == data_of(12 << 20)


def test_a_shard_that_was_changed_leaves_no_output(aws, monkeypatch):
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    aws.create_key("alias/etl")
    aws.put("raw", {"large": data_of(12 << 20)})
    encrypt("s3://raw/large", "s3://sealed/", "aws-kms://alias/etl")
    shard = bytearray(aws.read("sealed")["large"])
    shard[-1] ^= 1
    aws.put("sealed", {"large": bytes(shard)})
    name, message = fails(DecryptFiles("s3://raw/opened/", key="aws-kms://alias/etl"), "s3://sealed/large")
    assert name == "TamperedError"
    assert message.startswith("s3://sealed/large was changed after it was written")
    assert aws.keys("raw") == ["large"]
    assert aws.uploads("raw") == []


def test_an_existing_shard_is_refused_skipped_or_overwritten(raw):
    raw.create_key("alias/etl")
    encrypt("s3://raw/2026/a.csv", "s3://sealed/", "aws-kms://alias/etl")
    first = raw.read("sealed")
    name, message = fails(EncryptFiles("s3://sealed/", key="aws-kms://alias/etl"), "s3://raw/2026/a.csv")
    assert name == "FileExistsError"
    assert "the output exists; choose to skip or overwrite it. If the engine has started this job again" in message
    assert message.endswith(": 's3://sealed/a.csv'")
    assert encrypt("s3://raw/2026/a.csv", "s3://sealed/", "aws-kms://alias/etl", if_exists="skip").results[0].skipped
    assert raw.read("sealed") == first
    raw.calls()
    encrypt("s3://raw/2026/a.csv", "s3://sealed/", "aws-kms://alias/etl", if_exists="overwrite")
    assert raw.calls()["DeleteObject"] == 1
    assert raw.read("sealed") != first
    run(DecryptFiles("s3://raw/opened/", key="aws-kms://alias/etl"), "s3://sealed/a.csv")
    assert raw.read("raw")["opened/a.csv"] == FILES["2026/a.csv"]
