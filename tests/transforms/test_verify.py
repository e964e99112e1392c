"""VerifyShards: every kind of damage is a row with its reason, every chunk is read once, and nothing is written."""

import io
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.display import DisplayData

from beam_envelope import ANY_CONTEXT, AwsKms, LocalKms, VerifiedFile, VerifyShards, create_parquet, create_shard, jobs
from beam_envelope.errors import EnvelopeError, KeyAccessError, KmsUnavailableError
from beam_envelope.formats.dataset_key import DeterministicEncryptor
from beam_envelope.formats.keyfile import key_file_name
from beam_envelope.formats.keystore import LocalKeyStore
from beam_envelope.formats.record import RecordEncryptor
from beam_envelope.formats.shard_reader import RawShardReader
from beam_envelope.io.store import LocalStore
from beam_envelope.keys.cache import DataKeyPolicy, clear_caches
from beam_envelope.keys.local import generate_local_key
from beam_envelope.testing import find_plaintext
from beam_envelope.transforms import verify_plan
from beam_envelope.transforms.verify import WriteVerificationLog
from beam_envelope.transforms.verify_find import Found, find_files
from beam_envelope.transforms.verify_plan import Part, merge
from tests.running import encrypt, fails, read_files, run, write_files

CONTEXT = {"dataset": "flights"}
CHUNK, SEALED, HEADER = 16384, 16400, 56
CANARY = b"CANARY-51f0c2e8,"


@pytest.fixture
def key(tmp_path):
    made = LocalKms(tmp_path / "keyring" / "keyring.json")
    generate_local_key(made)
    return made


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "sealed"
    path.mkdir()
    return path


def seal(path, key, size, compression="none", context=CONTEXT):
    """Write one shard of rows with a canary in each; return its path."""
    rows = b"".join(b"%s%d\n" % (CANARY, number * 7919) for number in range(size // 17 + 1))[:size]
    with create_shard(path, key=key, context=context, compression=compression) as shard:
        shard.write(rows)
    return path


def write_parquet(path, key, n_groups=4, rows=500, **settings):
    schema = pa.schema([("id", pa.int64()), ("name", pa.string()), ("ssn", pa.string())])
    with create_parquet(path, schema, key=key, context=CONTEXT, use_dictionary=False, **settings) as writer:
        for group in range(n_groups):
            ids = list(range(group * rows, (group + 1) * rows))
            texts = [f"{CANARY.decode()}{number}" for number in ids]
            writer.write_table(pa.table([ids, texts, texts], schema=schema))
    return path


def verify(key, *patterns, context=CONTEXT, **settings):
    """Run VerifyShards; return what it says of each file, by the path below `sealed`."""
    clear_caches()
    job = run(VerifyShards(key=key, context=context, **settings), *map(str, patterns))
    rows = {result.path.rpartition("/sealed/")[2]: result for result in job.results}
    assert len(rows) == len(job.results)
    assert job.counters["files"] == len(rows)
    assert job.counters.get("files_with_problems", 0) == sum(not row.ok for row in rows.values())
    assert all(row.ok == (row.problem == "") for row in rows.values())
    return rows


def verifier_of(key, **settings):
    """Return what checks the parts of files, without a runner and without a manifest."""
    return VerifyShards(key=key, context=CONTEXT, manifest="ignore", **settings).verifier


def problem_of(key, path, **settings):
    """Return what is wrong with the one file that a pattern names, or "" if nothing is."""
    (row,) = verify(key, path, **settings).values()
    return row.problem


def flip(path, position):
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# -------------------------------------------------------------------------------------------- what is well


@pytest.mark.parametrize("quick", [False, True])
def test_a_dataset_that_is_as_it_was_written_is_well(folder, key, quick):
    sizes = {"empty": 0, "one": 1, "full": CHUNK, "two": 2 * CHUNK, "more": 5 * CHUNK + 17, "sub/deep": 3}
    (folder / "sub").mkdir()
    for name, size in sizes.items():
        seal(folder / name, key, size)
    seal(folder / "z", key, 200_000, "zstd")
    write_parquet(folder / "p.parquet", key)
    RecordEncryptor([key], LocalKeyStore(folder / "keys"), CONTEXT, DataKeyPolicy()).encrypt(b"one")
    DeterministicEncryptor([key], LocalKeyStore(folder / "keys"), CONTEXT).encrypt(b"one")
    before = read_files(folder)
    rows = verify(key, folder, quick=quick, range_bytes=2 * CHUNK)
    assert all(row.ok for row in rows.values())
    assert {name: rows[name].plaintext_bytes for name in sizes} == sizes
    assert {rows[name].kind for name in (*sizes, "z")} == {"shard"}
    assert rows["z"].plaintext_bytes == (None if quick else 200_000)
    assert rows["p.parquet"][1:6] == ("parquet", True, "", None, None if quick else 2000)
    stored = [row for name, row in rows.items() if name.startswith("keys/_KEY_FOR_")]
    assert [row.kind for row in stored] == ["record key"] * 3
    for name in (*sizes, "p.parquet"):
        key_file = json.loads((folder / name).with_name(key_file_name(Path(name).name)).read_bytes())
        assert rows[name].key_id == key_file["data_keys"][0]["key_id"]
    assert len(rows) == len(sizes) + 2 + 3
    assert read_files(folder) == before


def test_bytes_are_counted_as_they_are_authenticated(folder, key):
    seal(folder / "a", key, 5 * CHUNK + 17)
    with create_shard(folder / "z", key=key, context=CONTEXT, compression="zstd") as shard:
        shard.write(os.urandom(100_000) + bytes(100_000))
    compressed = (folder / "z").stat().st_size
    parquet = write_parquet(folder / "p", key).stat().st_size
    results, counters = run(VerifyShards(key=key, context=CONTEXT, range_bytes=CHUNK), str(folder))
    assert [(row.plaintext_bytes, row.records) for row in results] == [
        (5 * CHUNK + 17, None),
        (None, 2000),
        (200_000, None),
    ]
    tags = 16 * ((compressed - HEADER) // SEALED + 1)
    assert counters["bytes_authenticated"] == 5 * CHUNK + 17 + compressed - HEADER - tags + parquet
    quick = run(VerifyShards(key=key, context=CONTEXT, quick=True), str(folder)).counters
    assert quick.get("bytes_authenticated", 0) == 0


def test_a_file_that_many_patterns_find_is_verified_once_with_its_key_file(folder, key):
    seal(folder / "a", key, 10)
    patterns = (folder, f"{folder}/*", f"{folder}/a", f"{folder}/_KEY_FOR_*", f"{folder}/_KEY_FOR_a.json")
    for some in (patterns, *((pattern,) for pattern in patterns)):
        assert verify(key, *some) == {"a": VerifiedFile(f"{folder}/a", "shard", True, "", 10, None, _key_id(folder))}
    write_files(folder, {"_KEY_FOR_a.json": b"{}"})
    assert [row.kind for row in verify(key, *patterns).values()] == ["shard"]


def _key_id(folder):
    return json.loads((folder / "_KEY_FOR_a.json").read_bytes())["data_keys"][0]["key_id"]


def test_rotation_at_the_same_time_is_no_problem(folder, key, monkeypatch):
    seal(folder / "a", key, 4 * CHUNK)
    parts = verifier_of(key, range_bytes=CHUNK).parts(f"{folder}/a", Found(4 * SEALED + HEADER + 16))
    (folder / "_KEY_FOR_a.json").unlink()  # what the parts hold is enough
    assert all(verifier_of(key).check(part, len_of).ok for part in parts)


def len_of(n_bytes):
    """Count nothing."""


# ------------------------------------------------------------------------------------------- damaged shards

SIZE = 4 * CHUNK + 100


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize(
    ("position", "says", "quick"),
    [
        (0, "the key commitment differs", True),
        (23, "the key commitment differs", True),
        (24, "the key commitment differs", True),
        (55, "the key commitment differs", True),
        (56, "was changed after it was written", False),
        (HEADER + CHUNK, "was changed after it was written", False),
        (HEADER + SEALED, "was changed after it was written", False),
        (-17, "was changed after it was written", True),
        (-1, "was changed after it was written", True),
    ],
)
def test_one_bit_anywhere_is_found_and_quickly_in_the_header_and_last_chunk(
    folder, key, compression, position, says, quick
):
    path = folder / "a"
    with create_shard(path, key=key, context=CONTEXT, compression=compression) as shard:
        shard.write(os.urandom(SIZE))
    flip(path, position)
    assert says in problem_of(key, folder, range_bytes=2 * CHUNK)
    assert (says in problem_of(key, folder, quick=True)) is quick


@pytest.mark.parametrize(
    "size", [0, 10, HEADER, HEADER + 15, HEADER + 16, HEADER + SEALED + 16, HEADER + 4 * SEALED, -1]
)
def test_a_shard_that_was_cut_is_found_also_quickly(folder, key, size):
    path = seal(folder / "a", key, SIZE)
    path.write_bytes(path.read_bytes()[:size])
    for quick in (False, True):
        (row,) = verify(key, folder, quick=quick, range_bytes=CHUNK).values()
        assert (row.kind, row.plaintext_bytes, row.key_id) == ("shard", None, _key_id(folder))
        assert "it was cut short" in row.problem or "or the file was cut" in row.problem


@pytest.mark.parametrize("more", [b"x", bytes(16), bytes(SEALED), bytes(3 * SEALED)])
def test_a_shard_that_was_made_longer_is_found_also_quickly(folder, key, more):
    path = seal(folder / "a", key, SIZE)
    path.write_bytes(path.read_bytes() + more)
    for quick in (False, True):
        assert "was changed after it was written" in problem_of(key, folder, quick=quick, range_bytes=CHUNK)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("names", [("a", "b"), ("_KEY_FOR_a.json", "_KEY_FOR_b.json"), ("a", "p"), ("a", "c")])
def test_swapped_files_are_found(folder, key, names, quick):
    data = write_files(folder.parent / "data", {"a": b"1" * 99, "b": b"2" * 99})
    encrypt(data, folder, key, context=CONTEXT, manifest=False)
    seal(folder / "c", key, 99)
    write_parquet(folder / "p", key)
    one, two = (folder / name for name in names)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    rows = verify(key, folder, quick=quick)
    wrong = {name.removeprefix("_KEY_FOR_").removesuffix(".json") for name in names}
    assert {name for name, row in rows.items() if not row.ok} == wrong


@pytest.mark.parametrize("quick", [False, True])
def test_any_change_of_a_key_file_is_found(folder, key, quick):
    seal(folder / "a", key, 99)
    path = folder / "_KEY_FOR_a.json"
    good = path.read_bytes()
    document = json.loads(good)

    def changed(**fields):
        return json.dumps({**document, **fields}, indent=2).encode() + b"\n"

    content = document["content"]
    wrapped = json.loads(good)["data_keys"]
    wrapped[0]["wrapped_keys"][0]["wrapped_key"] = "A" * 80
    bad = [
        b"",
        b"{}",
        good[:-3],
        good + b" ",
        changed(shard_id="00000000-0000-4000-8000-000000000000"),
        changed(content={**content, "compression": "zstd"}),
        changed(content={**content, "created": "2001-01-01T00:00:00Z"}),
        changed(content={**content, "name": "another"}),
        changed(context={"dataset": "trains"}),
        changed(cipher="parquet-aes-gcm-v1"),
        changed(cipher="record-aes-256-gcm"),
        changed(data_keys=[{**document["data_keys"][0], "key_id": "0" * 32}]),
        changed(data_keys=wrapped),
    ]
    for raw in bad:
        path.write_bytes(raw)
        (row,) = verify(key, folder, quick=quick, context=ANY_CONTEXT).values()
        assert (row.path, row.ok) == (f"{folder}/a", False), raw
        assert row.kind == ("parquet" if b"parquet" in raw else "shard")
    path.write_bytes(good)
    assert problem_of(key, folder, quick=quick, context=ANY_CONTEXT) == ""


def test_the_key_file_of_records_in_the_place_of_a_shards_is_found(folder, key):
    seal(folder / "a", key, 99)
    RecordEncryptor([key], LocalKeyStore(folder / "keys"), CONTEXT, DataKeyPolicy()).encrypt(b"one")
    (stored,) = (folder / "keys").iterdir()
    (folder / "_KEY_FOR_a.json").write_bytes(stored.read_bytes())
    row = verify(key, folder)["a"]
    assert (row.kind, "of the cipher record-aes-256-gcm" in row.problem) == ("shard", True)
    (folder / "a").unlink()
    row = verify(key, folder)["_KEY_FOR_a.json"]
    assert (row.kind, "it was put in the place of another" in row.problem) == ("record key", True)


# -------------------------------------------------------------------------------- what lies beside, or does not


def test_what_should_not_be_there_or_is_missing_is_told(folder, key):
    for name in ("gone", "alone", "good"):
        seal(folder / name, key, 99)
    (folder / "gone").unlink()
    (folder / "_KEY_FOR_alone.json").unlink()
    write_files(folder, {"plain.csv": CANARY, "_TMP_1": b"left", "_MANIFEST.json": b"{}", "_KEY_FOR_bad.json": b"{"})
    rows = verify(key, folder)
    assert {name: (row.kind, row.ok) for name, row in rows.items()} == {
        "good": ("shard", True),
        "_KEY_FOR_gone.json": ("key file", False),
        "_KEY_FOR_bad.json": ("key file", False),
        "alone": ("file", False),
        "plain.csv": ("file", False),
        "_TMP_1": ("unfinished", True),
        "_MANIFEST.json": ("manifest", False),
    }
    assert rows["_KEY_FOR_gone.json"].problem.startswith(f"{folder}/gone is missing: there is only its key file.")
    assert rows["alone"].problem.startswith(f"there is no key file _KEY_FOR_alone.json beside {folder}/alone")
    assert rows["plain.csv"].problem.startswith(f"{folder}/plain.csv is plain data")
    assert rows["_MANIFEST.json"].problem.startswith(f"{folder}/_MANIFEST.json is not a readable manifest")
    assert CANARY.decode() not in str(rows)


@pytest.mark.parametrize("pattern", ["*", "p*", "part-?", "part-0", "_KEY_FOR_part-0.json", "**"])
def test_a_missing_shard_is_told_whatever_the_pattern(folder, key, pattern):
    for name in ("part-0", "part-1"):
        seal(folder / name, key, 99)
    (folder / "part-0").unlink()
    row = verify(key, f"{folder}/{pattern}")["_KEY_FOR_part-0.json"]
    assert (row.kind, row.ok) == ("key file", False)


@pytest.mark.parametrize("pattern", ["none", "none*", "none/", "sub/**"])
def test_a_pattern_that_finds_nothing_fails_the_job(folder, key, pattern):
    (folder / "sub").mkdir()
    assert fails(VerifyShards(key=key), f"{folder}/{pattern}")[0] == "FileNotFoundError"


def test_a_file_that_cannot_be_read_or_named_is_a_row(folder, key, monkeypatch):
    seal(folder / "a", key, 99)
    seal(folder / "b", key, 99)
    (folder / os.fsdecode(b"\xff")).write_bytes(b"")
    before = LocalStore.open

    def broken(store, path):
        if path.endswith("/a"):
            raise OSError(5, "Input/output error", path)
        return before(store, path)

    monkeypatch.setattr(LocalStore, "open", broken)
    rows = verify(key, folder)
    assert rows["a"].problem == "it cannot be read: Input/output error"
    assert rows["b"].ok
    assert "is not valid UTF-8" in rows["\\udcff"].problem


# --------------------------------------------------------------------------------------------- keys and contexts


@pytest.mark.parametrize("quick", [False, True])
def test_another_key_or_context_is_a_row_with_the_reason(folder, key, quick):
    other = LocalKms(key.path, "other")
    generate_local_key(other)
    seal(folder / "a", key, 99)
    seal(folder / "b", other, 99)
    seal(folder / "c", key, 99, context={"dataset": "trains"})
    write_parquet(folder / "p", other)
    RecordEncryptor([other], LocalKeyStore(folder / "keys"), CONTEXT, DataKeyPolicy()).encrypt(b"one")
    rows = verify(key, folder, quick=quick)
    (stored,) = (row for name, row in rows.items() if name.startswith("keys/"))
    assert {name for name, row in rows.items() if row.ok} == {"a"}
    for row in (rows["b"], rows["p"], stored):
        assert "the keys allowed here are" in row.problem
    assert "'dataset' is 'trains' there and 'flights' here" in rows["c"].problem
    assert all(row.ok for row in verify([key, other], folder, quick=quick, context=ANY_CONTEXT).values())


def test_columns_under_a_key_that_is_not_given_are_a_row(folder, key):
    other = LocalKms(key.path, "other")
    generate_local_key(other)
    write_parquet(folder / "p", key, columns={"ssn": other})
    for quick in (False, True):
        problem = problem_of(key, folder, quick=quick)
        assert "this reader may not open these columns" in problem
        assert "ssn" in problem
        assert problem_of([key, other], folder, quick=quick) == ""


@pytest.mark.parametrize("kind", ["shard", "parquet", "record key"])
def test_errors_of_the_kms_fail_the_job_with_their_message(folder, fake_kms, kind):
    arn = fake_kms.create_key("etl")
    key = AwsKms(arn)
    if kind == "shard":
        seal(folder / "a", key, 99)
    elif kind == "parquet":
        write_parquet(folder / "a", key)
    else:
        RecordEncryptor([key], LocalKeyStore(folder), CONTEXT, DataKeyPolicy()).encrypt(b"one")
    for quick in (False, True):
        clear_caches()
        fake_kms.disable_key(arn)
        name, message = fails(VerifyShards(key=key, context=CONTEXT, quick=quick), str(folder))
        assert (name, arn in message) == ("KeyAccessError", True)
        fake_kms.enable_key(arn)
        assert problem_of(key, folder, quick=quick) == ""


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("error", [KmsUnavailableError, KeyAccessError])
def test_a_kms_that_is_away_says_nothing_of_the_file(folder, key, monkeypatch, error, quick):
    def away(*_):
        raise error("come back later")

    seal(folder / "a", key, 99)
    write_parquet(folder / "p", key)
    monkeypatch.setattr(LocalKms, "unwrap", away)
    for name in ("a", "p"):
        clear_caches()
        job = VerifyShards(key=key, context=CONTEXT, quick=quick)
        assert fails(job, f"{folder}/{name}") == (error.__name__, f"{folder}/{name} cannot be opened: come back later")


def test_the_kms_is_asked_once_for_each_data_key(folder, fake_kms):
    key = AwsKms(fake_kms.create_key("etl"))
    contents = {f"{number}": b"x" * 10_000 for number in range(20)}
    encrypt(write_files(folder.parent / "data", contents), folder / "sub", key, context=CONTEXT)
    seal(folder / "large", key, 20 * CHUNK)
    write_parquet(folder / "p", key)
    before = fake_kms.calls
    clear_caches()
    job = run(VerifyShards(key=key, context=CONTEXT, range_bytes=CHUNK), str(folder))
    assert len(job.results) == 22 + 1  # the manifest, which speaks for what is in its folder
    assert all(result.ok for result in job.results)
    assert fake_kms.calls - before == Counter(Decrypt=3 + 1)
    assert job.counters["kms_Decrypt"] == 3 + 1


# ------------------------------------------------------------------------------------------------- large shards


@pytest.mark.parametrize("size", [10 * CHUNK - 1, 10 * CHUNK, 10 * CHUNK + 1, 9 * CHUNK, 0, 1])
@pytest.mark.parametrize("chunks", [1, 3, 5, 100])
def test_the_parts_of_a_shard_cover_every_chunk_once(folder, key, size, chunks, monkeypatch):
    path = seal(folder / "a", key, size)
    decrypted = Counter()
    load, whole = RawShardReader._load, RawShardReader._decrypt_whole

    def one(reader, chunk):
        decrypted[chunk] += 1
        load(reader, chunk)

    def several(reader, chunk, count, target):
        decrypted.update(range(chunk, chunk + count))
        whole(reader, chunk, count, target)

    monkeypatch.setattr(RawShardReader, "_load", one)
    monkeypatch.setattr(RawShardReader, "_decrypt_whole", several)
    verifier = verifier_of(key, range_bytes=chunks * CHUNK)
    parts = verifier.parts(str(path), Found(path.stat().st_size))
    assert len(parts) == max(1, -(-size // (chunks * CHUNK)))
    results = [(part.number, part.total, verifier.check(part, len_of)) for part in parts]
    assert decrypted == dict.fromkeys(range(size // CHUNK + 1), 1)
    assert merge(results)[2:5] == (True, "", size)


@pytest.mark.parametrize("chunk", range(9))
def test_damage_in_any_chunk_of_a_large_shard_is_found(folder, key, chunk):
    path = seal(folder / "a", key, 8 * CHUNK)  # so the last chunk is empty
    flip(path, HEADER + chunk * SEALED)
    for n_chunks in (2, 3, 4, 8):
        problem = problem_of(key, folder, range_bytes=n_chunks * CHUNK)
        assert "was changed after it was written" in problem


def test_damage_in_several_parts_is_one_row(folder, key):
    path = seal(folder / "a", key, 8 * CHUNK)
    for chunk in (1, 2, 5):
        flip(path, HEADER + chunk * SEALED)
    problem = problem_of(key, folder, range_bytes=CHUNK)
    assert "chunk 1 does not authenticate" in problem
    assert problem.endswith("(and more in 2 other parts of it)")


def test_a_shard_that_becomes_shorter_or_longer_while_it_is_verified_is_not_well(folder, key):
    path = seal(folder / "a", key, 5 * CHUNK)
    verifier = verifier_of(key, range_bytes=4 * CHUNK)
    first, last = verifier.parts(str(path), Found(path.stat().st_size))
    whole = path.read_bytes()
    path.write_bytes(whole[: HEADER + 2 * SEALED + 16])
    assert not verifier.check(first, len_of).ok
    assert not verifier.check(last, len_of).ok
    path.write_bytes(whole + bytes(SEALED))
    assert not verifier.check(last, len_of).ok
    path.write_bytes(whole)
    larger = last._replace(size=last.size + SEALED)
    assert "became shorter while it was read" in verifier.check(larger, len_of).problem
    beyond = first._replace(start=4, end=9)
    assert "became shorter while it was read" in verifier.check(beyond, len_of).problem


def test_the_last_part_goes_to_the_end_wherever_that_is_by_then(folder, key):
    path = seal(folder / "a", key, 64 * CHUNK)  # as much as is read at a time
    (part,) = verifier_of(key).parts(str(path), Found(path.stat().st_size))
    path.write_bytes(path.read_bytes() + bytes(SEALED))
    assert not verifier_of(key).check(part, len_of).ok


def test_a_part_that_the_runner_lost_is_missed():
    good = VerifiedFile("a", "shard", True, "", 10, None, "k")
    assert merge([(1, 2, good), (0, 2, good), (1, 2, good)]) == good._replace(plaintext_bytes=20)
    with pytest.raises(EnvelopeError, match=r"1 of 2 parts of a were checked"):
        merge([(1, 2, good)])


def test_memory_does_not_grow_with_the_shard(folder, key, monkeypatch):
    import tracemalloc

    path = seal(folder / "a", key, 24 << 20)
    seal(folder / "z", key, 24 << 20, "zstd")
    verifier = verifier_of(key)
    for name in ("a", "z"):
        (part,) = verifier.parts(f"{folder}/{name}", Found((folder / name).stat().st_size))
        tracemalloc.start()
        assert verifier.check(part, len_of).plaintext_bytes == 24 << 20
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 << 20
    assert path.stat().st_size > 24 << 20


# ------------------------------------------------------------------------------------------------------ Parquet


def test_one_bit_in_any_page_is_found_and_quickly_in_the_footer_only(folder, key):
    path = write_parquet(folder / "p", key, n_groups=2, rows=50)
    good = path.read_bytes()
    verifier = verifier_of(key, range_bytes=1)
    quick = verifier_of(key, quick=True)

    def found(verifier):
        parts = verifier.parts(str(path), Found(len(good)))
        return not merge((part.number, part.total, verifier.check(part, len_of)) for part in parts).ok

    assert not found(verifier)
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    for position in [*range(0, footer, 61), *range(footer, len(good), 29)]:
        flip(path, position)
        assert found(verifier), position
        if position >= footer or position < 4:
            assert found(quick), position
        path.write_bytes(good)
    flip(path, footer // 2)
    assert not found(quick)


def test_parquet_is_verified_by_row_groups(folder, key):
    path = write_parquet(folder / "p", key, n_groups=7)
    size = path.stat().st_size
    for range_bytes, n_parts in ((1, 7), (size // 3, 4), (size, 1)):
        parts = verifier_of(key, range_bytes=range_bytes).parts(str(path), Found(size))
        assert [group for part in parts for group in range(part.start, part.end)] == list(range(7))
        assert len(parts) == n_parts
        assert verify(key, folder, range_bytes=range_bytes)["p"].records == 3500


@pytest.mark.parametrize("n_groups", [0, 1])
def test_parquet_without_rows_is_verified_by_its_footer(folder, key, n_groups):
    path = write_parquet(folder / "p", key, n_groups=n_groups, rows=0)
    assert verify(key, folder)["p"].ok
    flip(path, -30)
    assert not verify(key, folder)["p"].ok


@pytest.mark.parametrize("quick", [False, True])
def test_plain_parquet_in_the_place_of_an_encrypted_file_is_found(folder, key, quick):
    import pyarrow.parquet as pq

    path = write_parquet(folder / "p", key)
    pq.write_table(pa.table({"id": [1]}), path)
    assert "is plain Parquet beside the key file of an encrypted file" in problem_of(key, folder, quick=quick)


# --------------------------------------------------------------------------------------------------- key stores


@pytest.mark.parametrize("quick", [False, True])
def test_forged_key_files_of_a_key_store_are_found(folder, key, quick):
    store = LocalKeyStore(folder)
    for _ in range(2):
        RecordEncryptor([key], store, CONTEXT, DataKeyPolicy()).encrypt(b"one")
    DeterministicEncryptor([key], store, CONTEXT).encrypt(b"one")
    good = read_files(folder)
    named = "_KEY_FOR_dataset.json"
    by_id = [name for name in good if name != named and b'"name": ""' in good[name]]
    document = json.loads(good[named])

    def wrong():
        return {name for name, row in verify(key, folder, quick=quick, context=ANY_CONTEXT).items() if not row.ok}

    assert len(by_id) == 2
    assert wrong() == set()
    write_files(folder, {by_id[0]: good[by_id[1]], by_id[1]: good[by_id[0]]})
    assert wrong() == set(by_id)
    write_files(folder, good)
    write_files(folder, {named: good[by_id[0]], "_KEY_FOR_other.json": good[named]})
    assert wrong() == {named, "_KEY_FOR_other.json"}
    (folder / "_KEY_FOR_other.json").unlink()
    for field, value in {
        "context": {"dataset": "trains"},
        "shard_id": "00000000-0000-4000-8000-000000000000",
        "derivation": {**document["derivation"], "salt": "00" * 24},
        "cipher": "fernet",
    }.items():
        write_files(folder, {named: json.dumps({**document, field: value}, indent=2).encode() + b"\n"})
        assert wrong() == {named}, field
    commitment = {**document["derivation"], "commitment": "00" * 32}
    write_files(folder, {named: json.dumps({**document, "derivation": commitment}, indent=2).encode() + b"\n"})
    assert wrong() == {named}


# ------------------------------------------------------------------------------------------- what is read and written


class _CountingFile(io.FileIO):
    """A file that counts what is read from it."""

    total = 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        _CountingFile.total += count
        return count

    def read(self, size=-1):
        data = super().read(size)
        _CountingFile.total += len(data)
        return data


def test_a_quick_look_reads_little(folder, key, monkeypatch):
    seal(folder / "a", key, 8 << 20)
    seal(folder / "z", key, 8 << 20, "zstd")
    monkeypatch.setattr(LocalStore, "open", lambda _, path: _CountingFile(path))
    key_files = sum(len(raw) for name, raw in read_files(folder).items() if "_KEY_FOR_" in name)
    monkeypatch.setattr(_CountingFile, "total", 0)
    assert all(row.ok for row in verify(key, folder, quick=True).values())
    assert 0 < _CountingFile.total <= key_files + 2 * (HEADER + SEALED)
    monkeypatch.setattr(_CountingFile, "total", 0)
    verify(key, folder)
    assert _CountingFile.total == sum(len(raw) for raw in read_files(folder).values())


def test_a_quick_look_at_a_file_is_one_part_and_asks_no_kms_to_plan_it(folder, key):
    other = LocalKms(key.path, "other")
    generate_local_key(other)
    seal(folder / "a", key, 9 * CHUNK)
    write_parquet(folder / "p", key)
    quick = verifier_of(other, quick=True, range_bytes=1)
    for name in ("a", "p"):
        (part,) = quick.parts(f"{folder}/{name}", Found((folder / name).stat().st_size))
        assert part.problem == ""


def test_no_plaintext_is_written_also_by_worker_processes(folder, key, tmp_path, monkeypatch):
    seal(folder / "a", key, 40 * CHUNK)
    seal(folder / "z", key, 100_000, "zstd")
    write_parquet(folder / "p", key)
    seal(folder / "bad", key, 4 * CHUNK)
    flip(folder / "bad", HEADER + 3 * SEALED)
    write_files(folder, {"plain.csv": b"nothing to hide"})
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    options = PipelineOptions(["--direct_running_mode=multi_processing", "--direct_num_workers=2"])
    pipeline = jobs.make_pipeline(options)
    verified = pipeline | beam.Create([str(folder)]) | VerifyShards(key=key, context=CONTEXT, range_bytes=4 * CHUNK)
    _ = verified | WriteVerificationLog(f"{scratch}/log")
    result = pipeline.run()
    result.wait_until_finish()
    rows = [json.loads(line) for line in (scratch / "log").read_text().splitlines()]
    assert sorted((Path(row["path"]).name, row["ok"]) for row in rows) == [
        ("a", True),
        ("bad", False),
        ("p", True),
        ("plain.csv", False),
        ("z", True),
    ]
    counters = jobs.counters(result)
    assert counters["bytes_authenticated"] > 40 * CHUNK
    assert 4 <= counters["kms_Decrypt"] <= 2 * 4
    assert find_plaintext([scratch, folder], CANARY) == []


# ------------------------------------------------------------------------------------------------------- the shell


def test_arguments_are_checked_before_anything_runs(key):
    with pytest.raises(ValueError, match="range_bytes is above 0, not 0"):
        VerifyShards(key=key, range_bytes=0)
    with pytest.raises((ValueError, TypeError), match="key"):
        VerifyShards(key=())
    with pytest.raises((ValueError, TypeError), match="context"):
        VerifyShards(key=key, context={"a": 1})


def test_display_data_shows_the_settings_but_not_the_contexts_values(key):
    items = DisplayData.create_from(VerifyShards(key=key, context=CONTEXT, quick=True)).items
    assert {item.key: item.value for item in items} == {"key": str(key), "context": "dataset", "quick": True}
    items = DisplayData.create_from(VerifyShards(key=key, context=ANY_CONTEXT)).items
    assert {item.key: item.value for item in items}["context"] == "any"


def test_a_pattern_may_stand_before_the_transform(folder, key):
    seal(folder / "a", key, 9)
    with beam.Pipeline() as pipeline:
        _ = pipeline | beam.Create([1])
        assert (str(folder) | VerifyShards(key=key, context=CONTEXT))[0].ok


def test_the_log_has_a_line_for_each_file(folder, key, tmp_path):
    seal(folder / "a", key, 9)
    write_files(folder, {"b": b"plain"})
    pipeline = jobs.make_pipeline(PipelineOptions([]), 1, 0)
    verified = pipeline | beam.Create([str(folder)]) | VerifyShards(key=key, context=CONTEXT)
    _ = verified | WriteVerificationLog(f"{tmp_path}/log.jsonl")
    pipeline.run().wait_until_finish()
    rows = sorted(map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()), key=lambda row: row["path"])
    assert [list(row) for row in rows] == [["time", *VerifiedFile._fields]] * 2
    assert [(row["path"], row["ok"], row["plaintext_bytes"]) for row in rows] == [
        (f"{folder}/a", True, 9),
        (f"{folder}/b", False, None),
    ]


def test_what_is_found_is_told_without_a_runner(folder, key):
    seal(folder / "a", key, 9)
    size = (folder / "a").stat().st_size
    assert find_files(f"{folder}/") == {f"{folder}/a": size}
    assert find_files(f"{folder}/_KEY_FOR_a.json") == {f"{folder}/a": None}
    assert verifier_of(key).parts(f"{folder}/a", Found(None))[0].size == size
    assert isinstance(verifier_of(key).parts(f"{folder}/none", Found(3))[0], Part)
    assert verify_plan.printable_name("å/b") == "å/b"
