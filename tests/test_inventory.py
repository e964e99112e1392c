"""What is in a folder of shards, told without a key."""

import os
import re
from datetime import datetime, timedelta, timezone

import pyarrow as pa
import pytest
from apache_beam.io.filesystem import BeamIOError

from beam_envelope import create_dataset_key, create_parquet, create_records, create_shard, inventory
from beam_envelope.formats.shard_layout import shard_size
from beam_envelope.inventory import Inventory, ShardEntry, list_shards
from tests.io import test_store
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


# ------------------------------------------------------------------------------------------- kinds and findings


def by_name(folder, **settings):
    """Return the entries below a folder by relative path."""
    entries = Inventory([f"{folder}/"], **settings).entries()
    return {entry.path.removeprefix(f"{folder}/"): entry for entry in entries}


def told(folder):
    """Return kind and finding of each file below a folder."""
    return {name: (entry.kind, entry.finding) for name, entry in by_name(folder).items()}


def test_key_files_of_a_key_store_are_record_keys_and_no_problem(tmp_path, local_key):
    store = tmp_path / "keys"
    create_records(key=local_key, keys=store, context={"dataset": "orders"}).encrypt(b"one")
    create_dataset_key(key=local_key, keys=store, context={"dataset": "orders"})
    entries = list(by_name(store).values())
    assert [(entry.kind, entry.problem, entry.context) for entry in entries] == [
        ("record key", "", {"dataset": "orders"})
    ] * 3  # a dataset key is found by its name and by its id
    assert {entry.cipher for entry in entries} == {"record-aes-256-gcm", "record-aes-256-siv"}
    assert all(entry.kms_keys[0].startswith("local-kms:default/") for entry in entries)
    assert all(entry.wrapped == entry.modified != "" for entry in entries)
    assert list_shards([str(store)]) == entries


def test_a_key_file_for_records_opens_no_file(tmp_path, local_key):
    create_dataset_key(key=local_key, keys=tmp_path / "keys")
    (tmp_path / "keys/dataset").write_bytes(b"data")
    entry = by_name(tmp_path / "keys")["dataset"]
    assert (entry.kind, entry.finding) == ("shard", "unreadable-key-file")
    assert entry.problem == "its key file is one for records (record-aes-256-siv), and opens no file"


TABLE = pa.table({"id": [1, 2], "ssn": ["a", "b"]})


def test_parquet_with_keys_in_its_footer_says_which_and_misses_no_key_file(tmp_path, fake_kms):
    fake_kms.create_key("etl")
    with create_parquet(tmp_path / "a.bin", TABLE.schema, key="aws-kms://alias/etl", interop=True) as writer:
        writer.write(TABLE)
    (entry,) = list_shards([str(tmp_path)])
    assert (entry.kind, entry.kms_keys, entry.problem) == (
        "parquet, keys in its footer",
        ("parquet-footer:alias/etl",),
        "",
    )
    assert (entry.context, entry.created) == (None, "")
    assert entry.wrapped == entry.modified != ""


def test_parquet_that_lost_its_key_file_is_told_apart(tmp_path, local_key):
    folder = tmp_path / "sealed"
    folder.mkdir()
    path = folder / "a.parquet"
    with create_parquet(path, TABLE.schema, key=local_key) as writer:
        writer.write(TABLE)
    assert told(folder) == {"a.parquet": ("parquet", "")}
    os.unlink(folder / "_KEY_FOR_a.parquet.json")
    (entry,) = list_shards([str(folder)])
    assert (entry.kind, entry.finding) == ("file", "lost-key-file")
    assert entry.problem == "no key file: encrypted Parquet, which nobody can open without it"
    os.truncate(path, 100)
    (entry,) = list_shards([str(folder)])
    assert (entry.finding, entry.looks) == ("no-key-file", "encrypted Parquet whose footer cannot be read")


def test_each_file_has_a_kind_and_markers_are_no_problem(sealed):
    write_files(
        sealed,
        {
            "_SUCCESS": b"",
            "sub/._SUCCESS.crc": b"crc",
            "_committed_123": b"{}",
            "_TMP_1": b"half",
            "_MANIFEST.json": b"{}",
            "_KEY_FOR_gone.json": b"{}",
            "note.txt": b"plain",
        },
    )
    assert told(sealed) == {
        "_SUCCESS": ("marker", ""),
        "sub/._SUCCESS.crc": ("marker", ""),
        "_committed_123": ("marker", ""),
        "_TMP_1": ("unfinished", "unfinished"),
        "_MANIFEST.json": ("manifest", ""),
        "_KEY_FOR_gone.json": ("key file", "key-file-alone"),
        "a.csv": ("shard", ""),
        "sub/b": ("shard", ""),
        "note.txt": ("file", "no-key-file"),
    }


def test_a_marker_that_is_large_is_no_marker(sealed):
    (sealed / "_SUCCESS").write_bytes(b"a" * ((1 << 20) + 1))
    assert told(sealed)["_SUCCESS"] == ("file", "no-key-file")


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        (b"", "an empty file"),
        (b"id,ssn\n1,2\n", "text"),
        ("é".encode() * 400, "text"),
        (b"x" + "é".encode() * 400, "text"),
        (b"PAR1" + bytes(100), "Parquet with a plain footer"),
        (b"\x1f\x8b\x08" + bytes(30), "gzip"),
        (b"Obj\x01", "Avro"),
        (bytes(range(256)) * 4, "encrypted or compressed data"),
        (bytes(1000), "binary data"),
        (b"\xff\xfe\x00", "binary data"),
        (b"ab\x00cd", "binary data"),
        (b"\xff" * 72, "encrypted or compressed data"),
    ],
)
def test_a_file_without_key_file_is_guessed_by_its_first_bytes(tmp_path, content, looks):
    (tmp_path / "a").write_bytes(content)
    assert by_name(tmp_path)["a"].looks == looks


def test_a_shard_that_lost_its_key_file_does_not_look_like_plaintext(tmp_path, local_key):
    for number in range(20):
        with create_shard(tmp_path / f"shard-{number}", key=local_key) as shard:
            shard.write(b"a" * number * 100)
        os.unlink(tmp_path / f"_KEY_FOR_shard-{number}.json")
    assert {entry.looks for entry in list_shards([f"{tmp_path}/shard*"])} == {"encrypted or compressed data"}


def test_only_so_many_are_looked_into_and_always_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(inventory, "_MAX_LOOKS", 2)
    write_files(tmp_path, dict.fromkeys(("a", "b", "c", "d.parquet", "d.parquet.tmp", "e.parquets"), b"text"))
    assert {name: entry.looks for name, entry in by_name(tmp_path).items()} == {
        "a": "text",
        "b": "text",
        "c": "",
        "d.parquet": "text",
        "d.parquet.tmp": "text",
        "e.parquets": "",
    }


@pytest.fixture
def on_disk(sealed, monkeypatch):
    """The same shards, and a stray, in another Beam filesystem; call it with what to raise for files of a name."""
    (sealed / "note.txt").write_bytes(b"plain")
    monkeypatch.setattr(test_store, "ROOT", str(sealed.parent))
    opened = test_store.DiskFileSystem.open

    def raise_for(name, error):
        def refuse(self, path, *arguments, **settings):
            if path.endswith(name):
                raise error
            return opened(self, path, *arguments, **settings)

        monkeypatch.setattr(test_store.DiskFileSystem, "open", refuse)

    return raise_for


def test_a_key_file_that_may_not_be_read_is_told_and_the_rest_goes_on(on_disk):
    on_disk("_KEY_FOR_a.csv.json", PermissionError(13, "Permission denied"))
    entries = by_name("test-disk://sealed")
    assert (entries["a.csv"].finding, entries["sub/b"].finding) == ("key-file-not-permitted", "")
    assert entries["a.csv"].problem == "its key file may not be read: Permission denied"


def test_an_error_of_beam_for_a_file_that_is_not_there_is_no_error(on_disk):
    on_disk("_KEY_FOR_note.txt.json", BeamIOError("404"))
    assert by_name("test-disk://sealed")["note.txt"].looks == "text"
    on_disk("_KEY_FOR_a.csv.json", BeamIOError("503"))
    with pytest.raises(OSError, match="503"):
        by_name("test-disk://sealed")


def test_a_stray_file_that_may_not_be_read_looks_like_nothing(on_disk):
    on_disk("note.txt", PermissionError(13, "Permission denied"))
    entry = by_name("test-disk://sealed")["note.txt"]
    assert (entry.finding, entry.looks) == ("no-key-file", "")


# --------------------------------------------------------------------------------------------------------- ages


def test_times_are_those_of_the_store(sealed):
    os.utime(sealed / "a.csv", (1_600_000_000, 1_600_000_000.9))
    os.utime(sealed / "_KEY_FOR_a.csv.json", (1_700_000_000, 1_700_000_000))
    entry = by_name(sealed)["a.csv"]
    assert (entry.modified, entry.key_file_modified) == ("2020-09-13T12:26:40Z", "2023-11-14T22:13:20Z")
    assert entry.wrapped == entry.key_file_modified


def test_a_pattern_that_leaves_key_files_out_costs_a_look_for_their_times(sealed):
    os.utime(sealed / "_KEY_FOR_a.csv.json", (1_700_000_000, 1_700_000_000))
    (plain,) = Inventory([f"{sealed}/a*"]).entries()
    (timed,) = Inventory([f"{sealed}/a*"], key_file_times=True).entries()
    assert (plain.key_file_modified, timed.key_file_modified) == ("", "2023-11-14T22:13:20Z")
    assert plain.wrapped == plain.created != ""


def test_a_key_file_that_names_no_time_has_no_age(sealed):
    hostile = ShardEntry("a", 1, created="<script>9999")
    assert (hostile.wrapped, hostile.age_s()) == ("", None)
    assert inventory._iso(0) == inventory._iso(1e30) == ""


def test_key_files_are_counted_apart(sealed):
    listing = Inventory([str(sealed)])
    sizes = [(sealed / name).stat().st_size for name in ("_KEY_FOR_a.csv.json", "sub/_KEY_FOR_b.json")]
    assert (len(listing), listing.key_files()) == (4, (2, sum(sizes)))
