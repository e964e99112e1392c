"""`beam-envelope inspect` on S3 and KMS over HTTP: what it tells, and with how many requests."""

import json
from datetime import datetime, timezone

import pytest

from tests.running import listing

CONTEXT = ("--context", "dataset=flights")


@pytest.fixture
def sealed(aws, command):
    """Five shards in a bucket; the ARN of their key."""
    aws.put("raw", {f"2026/{number}.csv": b"1,2\n" * 50 for number in range(5)})
    arn = aws.create_key("alias/etl")
    words = ("encrypt", "s3://raw/2026/*", "--output", "s3://sealed/2026/", "--key", "aws-kms://alias/etl", *CONTEXT)
    assert command(*words).status == 0
    aws.calls()
    return arn


def document(command, *words):
    said = command("inspect", *words, "--audit", "--json")
    assert said.status == 0, said.errors
    return json.loads(said.output)


def test_an_audit_costs_a_listing_and_a_request_for_each_key_file(aws, command, sealed):
    found = document(command, "s3://sealed/2026/")
    assert aws.calls() == {"ListObjectsV2": 1, "GetObject": 5}
    (key,) = found["kms_keys"]
    assert (key["kms_key"], key["files"], found["findings"]) == (sealed, 5, [])
    today = datetime.now(timezone.utc)
    for time in (key["oldest"], key["newest"]):
        written = datetime.strptime(time, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
        assert abs((today - written).total_seconds()) < 120


def test_times_of_key_files_that_a_pattern_leaves_out_cost_a_request_more(aws, command, sealed):
    found = document(command, "s3://sealed/2026/[0-2].csv")
    assert aws.calls()["HeadObject"] == 1 + 3
    assert found["ages"][0]["files"] == 3


def test_kms_is_asked_once_for_a_key(aws, command, sealed):
    kms = aws.client("kms", "us-east-1")
    found = document(command, "s3://sealed/2026/", "--ask-kms")
    calls = aws.calls()
    assert (calls["DescribeKey"], calls["Decrypt"]) == (1, 0)
    assert found["kms_keys"][0]["state"] == "enabled"
    kms.schedule_key_deletion(KeyId=sealed.rpartition("/")[2], PendingWindowInDays=9)
    said = command("inspect", "s3://sealed/2026/", "--ask-kms", "--fail-on-findings")
    assert said.status == 1
    assert "KMS key waits for its deletion" in said.output
    assert "It goes on " in said.output


def test_plaintext_and_lost_key_files_are_found_by_one_small_read(aws, command, sealed):
    aws.put("sealed", {"2026/export.csv": b"1,2\n" * 1_000_000, "2026/_SUCCESS": b""})
    aws.s3.delete_object(Bucket="sealed", Key="2026/_KEY_FOR_3.csv.json")
    aws.calls()
    found = document(command, "s3://sealed/2026/")
    # Those that are not there are asked for, too.
    assert aws.calls()["GetObject"] == 4 + 3 + 2
    assert {row["kind"]: [item["what"] for item in row["items"]] for row in found["findings"]} == {
        "plaintext": ["s3://sealed/2026/export.csv"],
        "no-key-file": ["s3://sealed/2026/3.csv"],
    }


def test_the_page_goes_to_s3_too(aws, command, sealed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    aws.s3.create_bucket(Bucket="audits")
    assert command("inspect", "s3://sealed/", "--html", "s3://audits/today.html").status == 0
    page = aws.read("audits")["today.html"].decode()
    assert sealed in page
    assert listing(tmp_path) == []
    said = command("inspect", "s3://sealed/", "--html", "s3://audits/today.html")
    assert (said.status, "the page exists, and is kept" in said.errors) == (1, True)
