"""What is in a folder of shards, told without a key."""

import os
import re
from datetime import datetime, timedelta, timezone

import pytest

from beam_envelope import create_shard
from beam_envelope.formats.shard_layout import shard_size
from beam_envelope.inventory import ShardEntry, list_shards
from tests.running import write_files


@pytest.fixture
def sealed(tmp_path, local_key):
    """A folder of two shards, one of them compressed and in a sub-folder."""
    folder = tmp_path / "sealed"
    (folder / "sub").mkdir(parents=True)
    with create_shard(folder / "a.csv", key=local_key, context={"dataset": "x"}) as shard:
        shard.write(b"a" * 20_000)
    with create_shard(folder / "sub/b", key=local_key, compression="zstd") as shard:
        shard.write(b"b" * 20_000)
    return folder


def problems(folder):
    """Return what is wrong below a folder: relative path to problem."""
    entries = list_shards([str(folder)])
    return {entry.path.removeprefix(f"{folder}/"): entry.problem for entry in entries if entry.problem}


def times(entry):
    return {"modified": entry.modified, "key_file_modified": entry.key_file_modified}


def test_shards_are_listed_with_what_their_key_files_say(sealed, local_key):
    one, two = list_shards([str(sealed)])
    (kms_key,) = one.kms_keys
    assert re.fullmatch(r"local-kms:default/[0-9a-f]{32}", kms_key)
    assert one == ShardEntry(
        f"{sealed}/a.csv", shard_size(20_000), 20_000, (kms_key,), {"dataset": "x"}, "none", one.created, **times(one)
    )
    assert two.path == f"{sealed}/sub/b"
    assert (two.plaintext_bytes, two.compression, two.context) == (None, "zstd", {})
    assert two.stored_bytes == (sealed / "sub/b").stat().st_size < 1000
    assert (one.problem, two.problem) == ("", "")


def test_keys_of_aws_are_listed_by_their_arn(tmp_path, fake_kms, local_key):
    arn = fake_kms.create_key("etl")
    with create_shard(tmp_path / "a", key=["aws-kms://alias/etl", local_key]) as shard:
        shard.write(b"a")
    (entry,) = list_shards([f"{tmp_path}/a"])
    assert entry.kms_keys[0] == arn
    assert entry.kms_keys[1].startswith("local-kms:default/")


def test_no_key_is_needed_and_no_kms_is_asked(sealed, local_key):
    os.unlink(local_key.path)
    assert [entry.problem for entry in list_shards([str(sealed)])] == ["", ""]


def test_the_age_of_a_shard_is_in_seconds(sealed):
    entry = list_shards([f"{sealed}/a.csv"])[0]
    assert 0 <= entry.age_s() < 60
    day_ago = (datetime.now(timezone.utc) - timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert ShardEntry("a", 1, created=day_ago).age_s() == pytest.approx(86_400, abs=5)
    assert ShardEntry("a", 1, created="yesterday").age_s() is None


def test_what_is_amiss_is_listed_with_what_is_wrong(sealed):
    write_files(
        sealed,
        {
            "note.txt": b"plain",
            "_TMP_0123": b"half",
            "_KEY_FOR_gone.json": b"{}",
            "bad": b"x" * 500,
            "_KEY_FOR_bad.json": b"{}",
            "_MANIFEST.json": b"{}",
        },
    )
    os.truncate(sealed / "a.csv", 60)
    assert problems(sealed) == {
        "_KEY_FOR_gone.json": "a key file without its shard",
        "_TMP_0123": "unfinished; delete it if no job is running",
        "a.csv": f"{sealed}/a.csv has 60 bytes, a size that no whole shard has: it was cut short. Write it again",
        "bad": (
            f"the key file of {sealed}/bad is not a readable key file: a field is missing or of the wrong type. "
            "Restore it from a copy; without it the data cannot be opened"
        ),
        "note.txt": "no key file: not a shard, or nobody can open it",
    }


def test_a_pattern_that_leaves_key_files_or_shards_out_makes_no_problem(sealed):
    assert [entry.problem for entry in list_shards([f"{sealed}/a*"])] == [""]
    assert list_shards([f"{sealed}/_KEY*"]) == []


def test_several_patterns_are_listed_once_in_order(sealed):
    entries = list_shards([f"{sealed}/sub", f"{sealed}/**", f"{sealed}/a.csv"])
    assert [entry.path for entry in entries] == [f"{sealed}/a.csv", f"{sealed}/sub/b"]


def test_a_pattern_that_finds_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file matches"):
        list_shards([f"{tmp_path}/*"])


def test_an_entry_turns_into_json_types(sealed):
    fields = list_shards([f"{sealed}/a.csv"])[0].as_dict()
    assert list(fields) == [
        "path",
        "stored_bytes",
        "plaintext_bytes",
        "kms_keys",
        "context",
        "compression",
        "created",
        "cipher",
        "column_kms_keys",
        "problem",
        "kind",
        "modified",
        "key_file_modified",
        "looks",
        "finding",
    ]
