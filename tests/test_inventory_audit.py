"""What an auditor is told: keys, ages, contexts and findings, counted right, and the same each time."""

import json
import os
from datetime import datetime, timezone

import boto3
import pytest

from beam_envelope import create_parquet, create_shard, inventory_audit
from beam_envelope.inventory_audit import audit
from tests.io import test_store
from tests.running import write_files
from tests.test_inventory import TABLE

NOW = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)
DAY_S = 86_400


def seal(path, key, n_bytes=100, context=None, age_days=None):
    """Write a shard whose key file was last written so long before NOW."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with create_shard(path, key=key, context=context) as shard:
        shard.write(b"a" * n_bytes)
    if age_days is not None:
        at = NOW.timestamp() - age_days * DAY_S
        os.utime(path.with_name(f"_KEY_FOR_{path.name}.json"), (at, at))
    return path.stat().st_size


@pytest.fixture
def keys(fake_kms):
    """The ARNs of four keys, `aws-kms://alias/NAME`."""
    return {name: fake_kms.create_key(name) for name in ("etl", "old", "pii", "gone")}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "sealed"


def look(folder, **settings):
    return audit([str(folder)], now=NOW, **settings)


def findings(document):
    """Return kind to severity, files and what."""
    return {
        row["kind"]: (row["severity"], row["files"], [item["what"].rpartition("/sealed/")[2] for item in row["items"]])
        for row in document["findings"]
    }


def by_key(document, field):
    return {row["kms_key"]: row[field] for row in document["kms_keys"]}


def test_bytes_and_files_are_counted_for_each_key_and_context(folder, keys):
    sizes = [
        seal(folder / "a", "aws-kms://alias/etl", 1000, {"dataset": "x"}),
        seal(folder / "b", ["aws-kms://alias/etl", "aws-kms://alias/old"], 500, {"dataset": "x"}),
        seal(folder / "sub/c", "aws-kms://alias/old", 20_000, {"dataset": "y", "a": "1"}),
    ]
    document = look(folder)
    assert [(row["kms_key"], row["files"], row["bytes"], row["alone"]) for row in document["kms_keys"]] == [
        (keys["old"], 2, sizes[1] + sizes[2], {"files": 1, "bytes": sizes[2]}),
        (keys["etl"], 2, sizes[0] + sizes[1], {"files": 1, "bytes": sizes[0]}),
    ]
    assert document["contexts"] == [
        {"context": {"a": "1", "dataset": "y"}, "files": 1, "bytes": sizes[2]},
        {"context": {"dataset": "x"}, "files": 2, "bytes": sizes[0] + sizes[1]},
    ]
    key_bytes = sum(path.stat().st_size for path in folder.rglob("_KEY_FOR_*"))
    assert document["totals"] == {
        "files": 3,
        "bytes": sum(sizes),
        "encrypted": {"files": 3, "bytes": sum(sizes)},
        "key_files": {"files": 3, "bytes": key_bytes},
        "kms_keys": 2,
        "contexts": 2,
        "findings": {"critical": 0, "warning": 0, "note": 0},
    }
    assert (document["findings"], document["kms_asked"]) == ([], False)
    assert set(by_key(document, "state").values()) == {None}


def test_columns_of_parquet_count_under_their_own_keys(folder, keys):
    folder.mkdir()
    columns = {"ssn": "aws-kms://alias/pii"}
    with create_parquet(folder / "a.parquet", TABLE.schema, key="aws-kms://alias/etl", columns=columns) as writer:
        writer.write(TABLE)
    size = (folder / "a.parquet").stat().st_size
    document = look(folder)
    assert by_key(document, "bytes") == {keys["etl"]: size, keys["pii"]: size}
    assert by_key(document, "alone") == {key: {"files": 1, "bytes": size} for key in (keys["etl"], keys["pii"])}
    assert document["kinds"] == [{"kind": "parquet", "files": 1, "bytes": size}]
    assert document["totals"]["encrypted"] == {"files": 1, "bytes": size}


def test_ages_are_those_of_key_files_and_say_what_is_due(folder, keys):
    ages = {"a": 0, "b": 29.9, "c": 30.1, "d": 364, "e": 366, "f": 1094, "g": 1200, "h": -5}
    for name, days in ages.items():
        seal(folder / name, "aws-kms://alias/etl", age_days=days)
    seal(folder / "z", "aws-kms://alias/old", age_days=100)
    document = look(folder, older_than_days=365)
    assert {row["age"]: row["files"] for row in document["ages"]} == {
        "under 30 days": 3,
        "30 to 90 days": 1,
        "90 to 180 days": 1,
        "180 days to 1 year": 1,
        "1 to 2 years": 1,
        "2 to 3 years": 1,
        "over 3 years": 1,
        "unknown": 0,
    }
    assert findings(document) == {"due-for-rotation": ("warning", 3, ["e", "f", "g"])}
    etl, old = document["kms_keys"]
    assert (etl["due"]["files"], old["due"]["files"]) == (3, 0)
    assert (etl["oldest"], etl["oldest_path"], etl["newest"]) == (
        "2023-08-12T12:00:00Z",
        f"{folder}/g",
        "2026-11-29T12:00:00Z",
    )
    assert old["oldest"] == old["newest"] == "2026-08-16T12:00:00Z"
    assert findings(look(folder)) == {}
    assert findings(look(folder, older_than_days=0))["due-for-rotation"][1] == 7  # but neither `a`, of now, nor `h`


def test_plaintext_is_told_only_beside_encrypted_files(folder, local_key):
    seal(folder / "part", local_key)
    lost = seal(folder / "lost", local_key)
    os.unlink(folder / "_KEY_FOR_lost.json")
    write_files(folder, {"export.csv": b"1,2\n", "empty": b"", "elsewhere/readme.txt": b"text", "_SUCCESS": b""})
    document = look(folder)
    assert findings(document) == {
        "plaintext": ("critical", 1, ["export.csv"]),
        "no-key-file": ("warning", 3, ["elsewhere/readme.txt", "empty", "lost"]),
    }
    items = {item["what"]: item["text"] for row in document["findings"] for item in row["items"]}
    assert items[f"{folder}/export.csv"] == "it looks like text"
    assert items[f"{folder}/lost"] == "it looks like encrypted or compressed data"
    assert document["totals"]["findings"] == {"critical": 1, "warning": 1, "note": 0}
    assert document["findings"][1]["bytes"] == lost + len(b"text")
    # Also where a pattern leaves all key files out.
    assert findings(look(f"{folder}/[ep]*"))["plaintext"] == ("critical", 1, ["export.csv"])


def test_plaintext_beside_a_key_file_that_cannot_be_used_is_plaintext(folder):
    write_files(folder, {"a": b"x" * 100, "_KEY_FOR_a.json": b"{}", "b": b"text"})
    assert findings(look(folder)) == {
        "unreadable-key-file": ("critical", 1, ["a"]),
        "plaintext": ("critical", 1, ["b"]),
    }


def test_a_store_that_tells_no_times_leaves_those_that_key_files_name(folder, local_key, monkeypatch):
    seal(folder / "ok/a", local_key)
    write_files(folder, {"bad/a": b"x" * 100, "bad/_KEY_FOR_a.json": b"{}", "bad/b": b"text"})
    monkeypatch.setattr(test_store, "ROOT", str(folder.parent))
    monkeypatch.setattr(test_store.DiskFileSystem, "last_updated", lambda *_: 0.0)
    document = audit(["test-disk://sealed/"])
    assert document["kms_keys"][0]["oldest"][:4] >= "2026"
    assert {row["age"] for row in document["ages"] if row["files"]} == {"under 30 days"}
    assert {row["kind"]: row["files"] for row in document["findings"]} == {"unreadable-key-file": 1, "plaintext": 1}


def test_what_is_amiss_is_told_with_what_to_do_the_most_urgent_first(folder, local_key):
    for name in ("cut", "ok", "bad"):
        seal(folder / name, local_key)
    os.truncate(folder / "cut", 60)
    write_files(folder, {"_KEY_FOR_bad.json": b"{}", "_KEY_FOR_gone.json": b"{}", "_TMP_1": b"x"})
    document = look(folder)
    assert findings(document) == {
        "unreadable-key-file": ("critical", 1, ["bad"]),
        "truncated": ("critical", 1, ["cut"]),
        "key-file-alone": ("warning", 1, ["_KEY_FOR_gone.json"]),
        "unfinished": ("note", 1, ["_TMP_1"]),
    }
    texts = [row["items"][0]["text"] for row in document["findings"]]
    assert texts[0].startswith("is not a readable key file: ")
    assert texts[1].startswith("has 60 bytes, a size that no whole shard has")
    assert texts[2:] == ["", ""]
    assert all(row["title"] and row["advice"].endswith(".") for row in document["findings"])


def test_keys_that_open_nothing_are_told_with_what_is_under_them(folder, keys, fake_kms):
    seal(folder / "a", "aws-kms://alias/etl")
    two = seal(folder / "b", ["aws-kms://alias/gone", "aws-kms://alias/etl"])
    one = seal(folder / "c", "aws-kms://alias/gone")
    seal(folder / "d", ["aws-kms://alias/etl", "aws-kms://alias/old"])
    seal(folder / "e", "aws-kms://alias/pii")
    fake_kms.schedule_key_deletion("alias/gone", 12)
    fake_kms.disable_key("alias/old")
    fake_kms.deny("DescribeKey", keys["pii"])
    document = look(folder, ask_kms=True)
    assert by_key(document, "state") == {
        keys["etl"]: "enabled",
        keys["gone"]: "pending deletion",
        keys["old"]: "disabled",
        keys["pii"]: "not permitted",
    }
    rows = {row["kind"]: row for row in document["findings"]}
    assert {kind: (row["severity"], row["files"]) for kind, row in rows.items()} == {
        "pending-deletion": ("critical", 2),
        "disabled": ("warning", 1),  # what is under it opens under another key as well
        "not-permitted": ("warning", 1),
    }
    (item,) = rows["pending-deletion"]["items"]
    date = by_key(document, "deletion_date")[keys["gone"]]
    assert item == {
        "what": keys["gone"],
        "text": f"It goes on {date}. 1 of 2 files open under other keys.",
        "files": 2,
        "bytes": one + two,
    }
    assert by_key(document, "closed")[keys["gone"]] == {"files": 1, "bytes": one}
    assert rows["disabled"]["items"][0]["text"] == "1 of 1 files open under other keys."
    assert "kms:DescribeKey" in rows["not-permitted"]["items"][0]["text"]
    assert set(fake_kms.calls) == {"GenerateDataKey", "Encrypt", "DescribeKey"}
    fake_kms.disable_key("alias/etl")
    document = look(folder, ask_kms=True)
    assert by_key(document, "closed")[keys["gone"]] == {"files": 2, "bytes": one + two}
    assert findings(document)["disabled"][0] == "critical"


def test_a_column_key_that_is_gone_closes_its_file(folder, keys, fake_kms):
    folder.mkdir()
    columns = {"ssn": "aws-kms://alias/pii"}
    with create_parquet(folder / "a.parquet", TABLE.schema, key="aws-kms://alias/etl", columns=columns) as writer:
        writer.write(TABLE)
    fake_kms.disable_key("alias/pii")
    document = look(folder, ask_kms=True)
    assert {key: sums["files"] for key, sums in by_key(document, "closed").items()} == {keys["etl"]: 0, keys["pii"]: 1}
    assert findings(document) == {"disabled": ("critical", 1, [keys["pii"]])}


def test_states_of_moto_are_told_too(folder, moto_server, local_key):
    kms = boto3.client("kms")
    arns = [kms.create_key()["KeyMetadata"]["Arn"] for _ in range(3)]
    for number, arn in enumerate(arns):
        seal(folder / str(number), f"aws-kms://{arn}")
    seal(folder / "local", local_key)
    kms.disable_key(KeyId=arns[1].rpartition("/")[2])
    kms.schedule_key_deletion(KeyId=arns[2].rpartition("/")[2], PendingWindowInDays=7)
    document = look(folder, ask_kms=True, keys=[local_key])
    assert [by_key(document, "state")[arn] for arn in arns] == ["enabled", "disabled", "pending deletion"]
    assert {kind: row[:2] for kind, row in findings(document).items()} == {
        "pending-deletion": ("critical", 1),
        "disabled": ("critical", 1),
    }
    document = look(folder, ask_kms=True)
    assert findings(document)["unknown"][:2] == ("warning", 1)


def test_no_kms_is_asked_unless_told_so(folder, keys, fake_kms):
    seal(folder / "a", "aws-kms://alias/etl")
    before = fake_kms.calls
    look(folder)
    assert fake_kms.calls == before


def test_of_many_some_are_listed_and_all_are_counted(folder, monkeypatch):
    monkeypatch.setattr(inventory_audit, "MAX_ITEMS", 3)
    write_files(folder, {f"_TMP_{number}": b"12" for number in range(10)})
    (row,) = look(folder)["findings"]
    assert (row["files"], row["bytes"], len(row["items"])) == (10, 20, 3)


def test_the_document_is_of_json_types_and_the_same_each_time(folder, local_key):
    for number in range(30):
        seal(folder / f"{number}", local_key, number, {"n": str(number % 7)}, number * 10)
    write_files(folder, {"x.csv": b"plain", "_TMP_1": b"x"})
    document = look(folder, older_than_days=100, ask_kms=True, keys=[local_key])
    assert (
        json.loads(json.dumps(document))
        == document
        == look(folder, older_than_days=100, ask_kms=True, keys=[local_key])
    )
    assert list(document) == [
        "format",
        "version",
        "time",
        "patterns",
        "kms_asked",
        "older_than_days",
        "totals",
        "findings",
        "kms_keys",
        "contexts",
        "ages",
        "kinds",
    ]
    assert (document["format"], document["version"], document["time"]) == (
        "beam-envelope inventory",
        1,
        "2026-11-24T12:00:00Z",
    )


def test_totals_agree_with_their_parts(folder, local_key):
    seal(folder / "a", local_key, age_days=10)
    write_files(folder, {"x.csv": b"plain", "_TMP_1": b"x", "_MANIFEST.json": b"{}", "_SUCCESS": b""})
    document = look(folder)
    for field in ("files", "bytes"):
        assert sum(row[field] for row in document["kinds"]) == document["totals"][field]
        assert sum(row[field] for row in document["ages"]) == document["totals"]["encrypted"][field]
