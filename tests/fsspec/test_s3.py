"""`envelope::s3://` over s3fs. s3fs holds botocore to versions of its own, so it is no part of the `test` extra."""

import gc

import boto3
import fsspec
import pytest

from beam_envelope import open_shard
from beam_envelope.formats.keyfile import key_file_name
from beam_envelope.formats.shard_layout import shard_size
from beam_envelope.fsspec import EnvelopeFsspecFileSystem
from tests.fsspec.conftest import CANARY

s3fs = pytest.importorskip("s3fs")

BIG = bytes(range(251)) * 60_000  # three parts of an upload


@pytest.fixture
def s3(moto_server):
    """A boto3 client of an S3 with one bucket, `lake`."""
    client = boto3.client("s3")
    client.create_bucket(Bucket="lake")
    yield client
    uploads = client.list_multipart_uploads(Bucket="lake").get("Uploads", [])
    assert uploads == []


@pytest.fixture
def inner(s3):
    s3fs.S3FileSystem.clear_instance_cache()
    return fsspec.filesystem("s3", use_listings_cache=False)


@pytest.fixture
def fs(inner, options):
    return EnvelopeFsspecFileSystem(fs=inner, **options)


@pytest.fixture
def asked(inner, monkeypatch):
    """The requests that s3fs makes: operation and key."""
    requests = []
    call = type(inner)._call_s3

    def note(self, method, *arguments, **options):
        requests.append((method, options.get("Key")))
        return call(self, method, *arguments, **options)

    monkeypatch.setattr(type(inner), "_call_s3", note)
    return requests


def keys(s3):
    return sorted(item["Key"] for item in s3.list_objects_v2(Bucket="lake").get("Contents", []))


def body(s3, key):
    return s3.get_object(Bucket="lake", Key=key)["Body"]


@pytest.mark.parametrize("data", [b"", b"small", BIG], ids=["empty", "small", "big"])
def test_what_is_written_open_shard_reads(fs, s3, options, tmp_path, data):
    with fs.open("lake/x/a.bin", "wb", block_size=5 << 20) as f:
        f.write(data)
    assert keys(s3) == ["x/" + key_file_name("a.bin"), "x/a.bin"]
    (tmp_path / "a.bin").write_bytes(body(s3, "x/a.bin").read())
    with open_shard(tmp_path / "a.bin", key_file=body(s3, "x/" + key_file_name("a.bin")).read(), **options) as f:
        assert f.read() == data
    assert fs.cat_file("lake/x/a.bin") == data


def test_a_url_is_enough(s3, options):
    url = "envelope::s3://lake/x/a.txt"
    with fsspec.open(url, "w", **options) as f:
        f.write(CANARY)
    assert CANARY.encode() not in body(s3, "x/a.txt").read()
    with fsspec.open(url, "r", **options) as f:
        assert f.read() == CANARY


@pytest.mark.parametrize("data", [b"small", BIG], ids=["small", "big"])
@pytest.mark.parametrize("how", ["exception", "collected"])
def test_a_dropped_writer_leaves_neither_object_nor_upload(fs, s3, data, how):
    f = fs.open("lake/a.bin", "wb", block_size=5 << 20)
    f.write(data)
    if how == "exception":
        f.__exit__(RuntimeError, RuntimeError(), None)
    del f
    gc.collect()
    assert keys(s3) == []


def test_the_key_file_is_there_before_the_shard(fs, s3, monkeypatch):
    seen = []
    commit = s3fs.core.S3File.commit
    monkeypatch.setattr(s3fs.core.S3File, "commit", lambda self: (seen.extend(keys(s3)), commit(self)))
    fs.pipe_file("lake/a.bin", b"1")
    assert seen == ["_KEY_FOR_a.bin.json"]
    assert keys(s3) == ["_KEY_FOR_a.bin.json", "a.bin"]


def test_a_listing_makes_no_request_for_an_object(fs, s3, inner, asked):
    fs.pipe_file("lake/x/0.bin", b"12345")
    for name in ("0.bin", key_file_name("0.bin")):
        for number in range(1, 1000):
            target = f"x/{name.replace('0.bin', f'{number}.bin')}"
            s3.copy_object(Bucket="lake", Key=target, CopySource={"Bucket": "lake", "Key": f"x/{name}"})
    asked.clear()
    inner.invalidate_cache()
    found = fs.find("lake/x", detail=True)
    assert [info["size"] for info in found.values()] == [5] * 1000
    assert fs.du("lake/x") == 5000
    assert {method for method, _ in asked} <= {"list_objects_v2"}


def test_a_range_fetches_what_it_needs(fs, s3, asked):
    fs.pipe_file("lake/a.bin", BIG)
    asked.clear()
    assert fs.cat_file("lake/a.bin", 5_000_000, 5_000_100) == BIG[5_000_000:5_000_100]
    gets = [key for method, key in asked if method == "get_object"]
    assert gets == ["_KEY_FOR_a.bin.json", "a.bin", "a.bin"]  # the header, and a chunk


def test_a_whole_shard_costs_one_get_and_one_for_its_key_file(fs, s3, asked):
    fs.pipe_file("lake/a.bin", BIG)
    asked.clear()
    with fs.open("lake/a.bin") as f:
        assert f.read() == BIG
    assert sorted(asked, key=str) == [
        ("get_object", "_KEY_FOR_a.bin.json"),
        ("get_object", "a.bin"),
        ("head_object", "a.bin"),
    ]


def test_exclusive_creation_leaves_what_is_there(fs, s3):
    f = fs.open("lake/a.bin", "xb")
    f.write(b"late")
    fs.pipe_file("lake/a.bin", b"first")
    with pytest.raises(FileExistsError):
        f.close()
    assert fs.cat_file("lake/a.bin") == b"first"


def test_shards_are_copied_moved_and_removed_with_their_key_files(fs, s3, inner):
    fs.pipe_file("lake/a.bin", b"1")
    fs.cp_file("lake/a.bin", "lake/x/b.bin")
    fs.mv("lake/a.bin", "lake/x/c.bin")
    assert keys(s3) == [f"x/{name}" for name in ("_KEY_FOR_b.bin.json", "_KEY_FOR_c.bin.json", "b.bin", "c.bin")]
    assert fs.cat("lake/x/*") == {"lake/x/b.bin": b"1", "lake/x/c.bin": b"1"}
    fs.copy("lake/x", "lake/y", recursive=True)
    fs.rm("lake/x", recursive=True)
    assert fs.find("lake") == ["lake/y/b.bin", "lake/y/c.bin"]
    fs.mv("lake/y", "lake/z", recursive=True)
    fs.rm("lake/z/[bc].bin")
    assert keys(s3) == []


def test_a_transaction_completes_at_its_end(fs, s3):
    with fs.transaction:
        fs.pipe_file("lake/a.bin", b"1")
        fs.pipe_file("lake/b.bin", BIG)
        assert keys(s3) == []
    assert s3.head_object(Bucket="lake", Key="b.bin")["ContentLength"] == shard_size(len(BIG))
    fs.start_transaction()
    fs.pipe_file("lake/c.bin", b"1")
    fs.transaction.complete(commit=False)
    assert fs.find("lake") == ["lake/a.bin", "lake/b.bin"]


def test_pandas_reads_and_writes(s3, options):
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame({"number": range(1000)})
    url = "envelope::s3://lake/set/a"
    table.to_csv(f"{url}.csv", index=False, storage_options=options)
    table.to_parquet(f"{url}.parquet", storage_options=options)
    assert pd.read_csv(f"{url}.csv", storage_options=options).equals(table)
    assert pd.read_parquet(f"{url}.parquet", storage_options=options).equals(table)
