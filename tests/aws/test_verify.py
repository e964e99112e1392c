"""VerifyShards with `aws-kms://` keys and `s3://` paths, over HTTP: what it finds, and which requests it makes."""

import pytest

from beam_envelope import VerifyShards
from beam_envelope.keys.cache import clear_caches
from tests.running import encrypt, run

CONTEXT = {"dataset": "flights"}
FILES = {f"2026/{number}.csv": b"%d," % number * 30_000 for number in range(5)}
KEY = "aws-kms://alias/etl"


@pytest.fixture
def sealed(aws):
    """Five shards in S3 of one data key."""
    aws.create_key("alias/etl")
    aws.put("raw", FILES)
    encrypt("s3://raw/**", "s3://sealed/", KEY, context=CONTEXT)
    aws.calls()
    clear_caches()
    return aws


def verify(*patterns, **settings):
    job = run(VerifyShards(key=KEY, context=CONTEXT, **settings), *patterns)
    return {result.path.removeprefix("s3://sealed/"): result for result in job.results}


@pytest.mark.parametrize("pattern", ["s3://sealed/", "s3://sealed/2026/*", "s3://sealed/2026/?.csv"])
def test_shards_in_s3_are_read_and_the_kms_is_asked_once(sealed, pattern):
    rows = verify(pattern, range_bytes=1 << 14)
    assert {name: (row.ok, row.plaintext_bytes) for name, row in rows.items()} == {
        **dict.fromkeys(FILES, (True, 60_000)),
        "_MANIFEST.json": (True, None),
    }
    calls = sealed.calls()
    assert calls["Decrypt"] == 2  # for the shards, and for the manifest
    assert not calls.keys() & {"PutObject", "UploadPart", "CreateMultipartUpload", "DeleteObject"}


def test_a_quick_look_is_two_or_three_requests_for_each_shard(sealed):
    assert all(row.ok for row in verify("s3://sealed/", quick=True).values())
    calls = sealed.calls()
    assert (calls["Decrypt"], calls["ListObjectsV2"]) == (2, 2)  # of them one for manifests in folders below
    assert calls["GetObject"] + calls["HeadObject"] <= 4 * len(FILES) + 1


def test_damage_in_s3_is_found(sealed):
    objects = sealed.read("sealed")
    flipped = bytearray(objects["2026/0.csv"])
    flipped[20_000] ^= 1
    sealed.put("sealed", {"2026/0.csv": bytes(flipped), "2026/1.csv": objects["2026/1.csv"][:-1], "2026/x": b"1,2"})
    sealed.s3.delete_object(Bucket="sealed", Key="2026/2.csv")
    sealed.s3.delete_object(Bucket="sealed", Key="2026/_KEY_FOR_3.csv.json")
    for pattern in ("s3://sealed/", "s3://sealed/2026/*"):
        rows = verify(pattern, range_bytes=1 << 14, manifest="ignore")
        assert {name: row.kind for name, row in rows.items() if not row.ok} == {
            "2026/0.csv": "shard",
            "2026/1.csv": "shard",
            "2026/_KEY_FOR_2.csv.json": "key file",
            "2026/3.csv": "file",
            "2026/x": "file",
        }
        assert rows["2026/4.csv"].ok
        rows = verify(pattern, range_bytes=1 << 14)
        assert {name: row.kind for name, row in rows.items() if not row.ok} == {
            "2026/0.csv": "shard",
            "2026/1.csv": "shard",
            "2026/2.csv": "shard",  # listed
            "2026/3.csv": "file",
            "2026/x": "file",
        }
        assert rows["2026/4.csv"].ok
