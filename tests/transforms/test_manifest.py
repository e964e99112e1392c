"""Manifests of whole jobs: what each writer lists, each reader holds its files against."""

import json
import shutil
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.io import fileio
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_stream import TestStream as Stream
from apache_beam.transforms import window
from apache_beam.transforms.error_handling import CollectingErrorHandler

from beam_envelope import (
    AwsKms,
    DecryptFiles,
    DecryptTables,
    EncryptFiles,
    EncryptTables,
    LocalKms,
    ReadAllEncryptedParquet,
    ReadAllEncryptedText,
    ReadEncryptedParquet,
    ReadEncryptedParquetBatched,
    ReadEncryptedText,
    RotateKeys,
    VerifyShards,
    WriteEncryptedFiles,
    WriteEncryptedParquet,
    WriteEncryptedText,
    cli,
)
from beam_envelope.formats.keyfile import KeyFile, is_internal, key_file_name
from beam_envelope.formats.manifest import Manifest
from beam_envelope.io.manifest import shard_on_store
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.local import generate_local_key
from beam_envelope.keys.provider import kms_calls
from tests.running import encrypt, fails, listing, read_files, run, write_files

CONTEXT = {"dataset": "numbers"}
NAME = "_MANIFEST.json"
NUMBERS = list(range(90))
SCHEMA = pa.schema([pa.field("number", pa.int64(), nullable=False)])
MISSING, EXTRA = "listed by the manifest, and not there", "not listed by the manifest"
SWAPPED, CHANGED = "is not the shard that its manifest lists", "was changed after it was written, or forged"

_kept = []


def keep(element):
    """Keep an element in this process."""
    _kept.append(element)


def collect(*steps):
    """Run steps one behind the other; return what comes out."""
    _kept.clear()
    with beam.Pipeline("FnApiRunner", options=PipelineOptions([])) as p:
        elements = p
        for number, step in enumerate(steps):
            elements = elements | f"Step {number}" >> step
        _ = elements | "Keep" >> beam.Map(keep)
    return list(_kept)


# -------------------------------------------------------------------------------------------------- the writers


def texts(data):
    """Write three plain files of lines."""
    lines = [f"{number}\n" for number in NUMBERS]
    return write_files(data, {f"{n}.txt": "".join(lines[n * 30 : n * 30 + 30]).encode() for n in range(3)})


def tables(data):
    """Write three plain files of tables."""
    Path(data).mkdir(parents=True, exist_ok=True)
    for n in range(3):
        pq.write_table(pa.table([NUMBERS[n * 30 : n * 30 + 30]], schema=SCHEMA), f"{data}/{n}.parquet")
    return Path(data)


def of_files(folder, data, **settings):
    return run(EncryptFiles(f"{folder}", if_exists="overwrite", **settings), f"{texts(data)}/*").results


def of_tables(folder, data, **settings):
    return run(EncryptTables(f"{folder}", if_exists="overwrite", **settings), f"{tables(data)}/*").results


def of_text(folder, data, **settings):
    lines = beam.Create([str(number) for number in NUMBERS])
    return collect(lines, WriteEncryptedText(f"{folder}/part", num_shards=3, file_name_suffix=".txt", **settings))


def of_parquet(folder, data, **settings):
    rows = beam.Create([{"number": number} for number in NUMBERS])
    return collect(rows, WriteEncryptedParquet(f"{folder}/part", SCHEMA, num_shards=3, **settings))


def of_sink(folder, data, **settings):
    naming = fileio.destination_prefix_naming(".txt")
    write = WriteEncryptedFiles(f"{folder}", destination=third, file_naming=naming, **settings)
    return collect(beam.Create([str(number) for number in NUMBERS]), write)


def third(line):
    return str(int(line) % 3)


WRITERS = {
    "EncryptFiles": of_files,
    "WriteEncryptedText": of_text,
    "WriteEncryptedFiles": of_sink,
    "EncryptTables": of_tables,
    "WriteEncryptedParquet": of_parquet,
}
OF_PARQUET = ("EncryptTables", "WriteEncryptedParquet")


# -------------------------------------------------------------------------------------------------- the readers


def by_decrypt_files(folder, output, **settings):
    run(DecryptFiles(f"{output}", **settings), f"{folder}/**")
    return sorted(int(line) for content in read_files(output).values() for line in content.split())


def by_text(folder, output, **settings):
    return sorted(map(int, collect(ReadEncryptedText(f"{folder}/*", **settings))))


def by_all_text(folder, output, **settings):
    return sorted(map(int, collect(beam.Create([f"{folder}/**"]), ReadAllEncryptedText(**settings))))


def by_decrypt_tables(folder, output, **settings):
    run(DecryptTables(f"{output}", **settings), f"{folder}/**")
    return sorted(n for path in output.glob("*") for n in pq.read_table(path)["number"].to_pylist())


def by_parquet(folder, output, **settings):
    return sorted(row["number"] for row in collect(ReadEncryptedParquet(f"{folder}", **settings)))


def by_batches(folder, output, **settings):
    batches = collect(ReadEncryptedParquetBatched(f"{folder}/*", **settings))
    return sorted(n for table in batches for n in table["number"].to_pylist())


def by_all_parquet(folder, output, **settings):
    return sorted(row["number"] for row in collect(beam.Create([f"{folder}/*"]), ReadAllEncryptedParquet(**settings)))


TEXT_READERS = (by_decrypt_files, by_text, by_all_text)
TABLE_READERS = (by_decrypt_tables, by_parquet, by_batches, by_all_parquet)
PAIRS = [
    pytest.param(writer, reader, id=f"{writer}-{reader.__name__}")
    for writer in WRITERS
    for reader in (TABLE_READERS if writer in OF_PARQUET else TEXT_READERS)
]


# ----------------------------------------------------------------------- datasets, made once, and copied for each test


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """For each writer: the dataset (`sealed`), and another of the same names, keys and context (`older`)."""
    root = tmp_path_factory.mktemp("made")
    for name in ("ours", "theirs"):
        generate_local_key(LocalKms(root / "keyring.json", name))
    key = LocalKms(root / "keyring.json", "ours")
    for name, write in WRITERS.items():
        for state in ("older", "sealed"):
            write(root / name / state, root / name / "data", key=key, context=CONTEXT)
    return root


@pytest.fixture
def key(made):
    return LocalKms(made / "keyring.json", "ours")


@pytest.fixture
def theirs(made):
    return LocalKms(made / "keyring.json", "theirs")


@pytest.fixture
def copied(made, tmp_path):
    """Copy the dataset of a writer; return its folder."""

    def copy(writer):
        shutil.copytree(made / writer / "sealed", tmp_path / "sealed", symlinks=True)
        return tmp_path / "sealed"

    return copy


def shards(folder):
    """Return the shards of a folder, in order."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file() and not is_internal(path.name))


def key_file(path):
    return path.with_name(key_file_name(path.name))


def parsed(folder):
    return Manifest.from_bytes(Path(folder, NAME).read_bytes(), "the manifest")


def listed(folder):
    """Return the names and shard ids that a manifest lists."""
    return {name: entry.shard_id for name, (_, entry) in parsed(folder).latest().items() if entry is not None}


def copy_pair(source, target):
    shutil.copyfile(source, target)
    shutil.copyfile(key_file(source), key_file(target))


def lose(folder, older):
    path = shards(folder)[1]
    path.unlink()
    key_file(path).unlink()
    return f"{path}: {MISSING}"


def put_in(folder, older):
    path = shards(folder)[0]
    copy_pair(path, path.with_name(f"9{path.name}"))
    return f"{path.with_name(f'9{path.name}')}: {EXTRA}"


def swap(folder, older):
    one, two = shards(folder)[:2]
    for first, second in ((one, two), (key_file(one), key_file(two))):
        first.rename(f"{first}.away")
        second.rename(first)
        Path(f"{first}.away").rename(second)
    return SWAPPED


def replay(folder, older):
    path = shards(folder)[1]
    copy_pair(older / path.name, path)
    return f"{path} {SWAPPED}"


def replace_manifest(folder, older):
    shutil.copyfile(older / NAME, folder / NAME)
    return SWAPPED


def change_manifest(folder, older):
    text = (folder / NAME).read_text()
    assert '"stored_bytes": ' in text
    (folder / NAME).write_text(text.replace('"stored_bytes": ', '"stored_bytes": 1', 1))
    return CHANGED


def cut_manifest(folder, older):
    (folder / NAME).write_bytes((folder / NAME).read_bytes()[:-1])
    return "is not a readable manifest"


DAMAGES = (lose, put_in, swap, replay, replace_manifest, change_manifest, cut_manifest)


def message_of(read, folder, output, **settings):
    with pytest.raises(Exception) as caught:  # noqa: PT011  # each runner wraps them in its way
        read(folder, output, **settings)
    return str(caught.value)


@pytest.mark.parametrize(("writer", "read"), PAIRS)
def test_what_each_writer_lists_each_reader_reads(copied, key, tmp_path, writer, read):
    folder = copied(writer)
    clear_caches()
    assert read(folder, tmp_path / "opened", key=key, context=CONTEXT, manifest="require") == NUMBERS
    expected = lose(folder, None)
    message = message_of(read, folder, tmp_path / "again", key=key, context=CONTEXT)
    assert expected in message


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(
    ("writer", "read"),
    [("EncryptFiles", read) for read in TEXT_READERS] + [("WriteEncryptedParquet", read) for read in TABLE_READERS],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_each_reader_refuses_what_the_manifest_does_not_say(copied, made, key, tmp_path, writer, read, damage):
    folder = copied(writer)
    expected = damage(folder, made / writer / "older")
    message = message_of(read, folder, tmp_path / "opened", key=key, context=CONTEXT)
    assert expected in message
    if damage in (change_manifest, cut_manifest, replace_manifest):
        assert read(folder, tmp_path / "all", key=key, context=CONTEXT, manifest="ignore") == NUMBERS


@pytest.mark.parametrize("read", [*TEXT_READERS, *TABLE_READERS])
def test_without_a_manifest_use_reads_and_require_refuses(copied, key, tmp_path, read):
    folder = copied("EncryptFiles" if read in TEXT_READERS else "EncryptTables")
    (folder / NAME).unlink()
    assert read(folder, tmp_path / "opened", key=key, context=CONTEXT) == NUMBERS
    message = message_of(read, folder, tmp_path / "again", key=key, context=CONTEXT, manifest="require")
    assert f"{folder}/ has no {NAME}, nor has a folder above it" in message


@pytest.mark.parametrize("read", [by_decrypt_files, by_all_text])
def test_the_manifest_of_another_key_or_context_is_refused(copied, key, theirs, tmp_path, read):
    folder = copied("EncryptFiles")
    for number, (other, context, expected) in enumerate(
        ((theirs, CONTEXT, "the keys allowed here are"), (key, {"dataset": "other"}, "context"))
    ):
        of_files(tmp_path / f"other{number}", tmp_path / "data", key=other, context=context)
        shutil.copyfile(tmp_path / f"other{number}" / NAME, folder / NAME)
        message = message_of(read, folder, tmp_path / "opened", key=key, context=CONTEXT)
        assert expected in message
        assert NAME in message


# --------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("writer", WRITERS)
def test_each_writer_lists_what_it_wrote_in_one_section_under_its_own_data_key(made, key, writer):
    folder = made / writer / "sealed"
    there = {path.name: KeyFile.from_bytes(key_file(path).read_bytes(), "k") for path in shards(folder)}
    assert len(there) == 3
    sections = parsed(folder).sections
    (section, *more) = sections if writer not in OF_PARQUET else sections[-1:]
    # WriteEncryptedFiles has names of its own, the others write over what is there, in `older` and `sealed` apart.
    assert not more
    assert {name: entry.shard_id for name, entry in section.shards.items()} == {
        name: found.shard_id.hex for name, found in there.items()
    }
    assert {name: entry.stored_bytes for name, entry in section.shards.items()} == {
        path.name: path.stat().st_size for path in shards(folder)
    }
    records = 30 if writer in OF_PARQUET else None
    assert {entry.records for entry in section.shards.values()} == {records} or writer == "WriteEncryptedParquet"
    assert sum(entry.records or 0 for entry in section.shards.values()) == (90 if writer in OF_PARQUET else 0)
    if writer == "EncryptFiles":
        assert sum(entry.plaintext_bytes for entry in section.shards.values()) == 10 * 2 + 80 * 3
    assert section.context == CONTEXT
    assert section.data_key.key_id not in {data_key.key_id for found in there.values() for data_key in found.data_keys}


@pytest.mark.parametrize("writer", WRITERS)
def test_without_manifest_none_is_written(tmp_path, key, writer):
    WRITERS[writer](tmp_path / "sealed", tmp_path / "data", key=key, context=CONTEXT, manifest=False)
    assert len(shards(tmp_path / "sealed")) == 3
    assert not (tmp_path / "sealed" / NAME).exists()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_second_job_appends(copied, key, tmp_path, writer):
    folder = copied(writer)
    before = listed(folder)
    clear_caches()
    results = WRITERS[writer](folder / "more", tmp_path / "data", key=key, context=CONTEXT)
    assert len(results) == 3
    assert not (folder / "more" / NAME).exists()
    assert len(parsed(folder).sections) == 2
    added = {f"more/{path.name}" for path in shards(folder / "more")}
    assert listed(folder).keys() == before.keys() | added
    assert {name: listed(folder)[name] for name in before} == before


def test_appending_needs_no_right_to_decrypt_and_one_call_more(tmp_path, fake_kms):
    fake_kms.create_key("etl")
    fake_kms.deny("Decrypt")
    for name in ("one", "two"):
        data = write_files(tmp_path / name, {f"{name}.txt": b"x"})
        before = fake_kms.calls["GenerateDataKey"]
        run(EncryptFiles(f"{tmp_path}/sealed", key="aws-kms://alias/etl"), f"{data}/*")
        assert fake_kms.calls["GenerateDataKey"] - before == 2
    assert listed(tmp_path / "sealed").keys() == {"one.txt", "two.txt"}
    fake_kms.allow("Decrypt")
    clear_caches()
    run(DecryptFiles(f"{tmp_path}/opened", key="aws-kms://alias/etl", manifest="require"), f"{tmp_path}/sealed/*")
    assert read_files(tmp_path / "opened") == {"one.txt": b"x", "two.txt": b"x"}
    assert fake_kms.calls["Decrypt"] == 4 + 1 or fake_kms.calls["Decrypt"] == 4


def test_each_destination_has_a_section_under_its_key_and_context(tmp_path, made):
    write = WriteEncryptedFiles(
        f"{tmp_path}/sealed",
        destination=third,
        file_naming=fileio.destination_prefix_naming(".txt"),
        key=lambda name: f"local-kms://{made}/keyring.json?name={'theirs' if name == '2' else 'ours'}",
        context=lambda name: {"third": name},
    )
    collect(beam.Create([str(number) for number in NUMBERS]), write)
    found = {section.context["third"]: section for section in parsed(tmp_path / "sealed").sections}
    assert found.keys() == {"0", "1", "2"}
    assert all(path.startswith(name) for name, section in found.items() for path in section.shards)
    (pattern,) = [str(path) for path in shards(tmp_path / "sealed") if path.name.startswith("2")]
    reader = ReadEncryptedText(
        pattern, key=f"local-kms://{made}/keyring.json?name=theirs", context={"third": "2"}, manifest="require"
    )
    assert len(collect(reader)) == 30


@pytest.mark.parametrize("kind", ["files", "text", "parquet"])
def test_an_unbounded_write_leaves_no_manifest(tmp_path, key, kind):
    data = write_files(tmp_path / "data", {"1": b"1", "2": b"2"})
    values = [f"{data}/1", f"{data}/2"] if kind == "files" else ["1", "2"]
    stream = Stream().add_elements([window.TimestampedValue(value, 1) for value in values])
    with beam.Pipeline("BundleBasedDirectRunner", options=PipelineOptions(["--streaming"])) as p:
        elements = p | stream.advance_watermark_to_infinity() | beam.WindowInto(window.FixedWindows(10))
        if kind == "files":
            _ = elements | EncryptFiles(f"{tmp_path}/sealed", key=key)
        elif kind == "text":
            _ = elements | WriteEncryptedText(f"{tmp_path}/sealed/part", key=key, num_shards=1, triggering_frequency=10)
        else:
            rows = elements | beam.Map(lambda line: {"number": int(line)})
            _ = rows | WriteEncryptedParquet(f"{tmp_path}/sealed/part", SCHEMA, key=key)
    assert shards(tmp_path / "sealed")
    assert not (tmp_path / "sealed" / NAME).exists()


def test_a_bounded_write_in_windows_has_a_manifest_of_all(tmp_path, key):
    stamped = beam.Map(lambda number: window.TimestampedValue({"number": number}, number))
    windows = beam.WindowInto(window.FixedWindows(30))
    collect(beam.Create(NUMBERS), stamped, windows, WriteEncryptedParquet(f"{tmp_path}/sealed/part", SCHEMA, key=key))
    assert listed(tmp_path / "sealed").keys() == {path.name for path in shards(tmp_path / "sealed")}
    assert len(listed(tmp_path / "sealed")) >= 3


def test_cells_are_plain_files_and_have_none(tmp_path, key):
    settings = {"key": key, "cells": True, "keys": f"{tmp_path}/keys"}
    run(EncryptTables(f"{tmp_path}/sealed", columns=["number"], **settings), f"{tables(tmp_path / 'data')}/*")
    assert not (tmp_path / "sealed" / NAME).exists()
    with pytest.raises(ValueError, match="cells are in plain Parquet, which no manifest lists"):
        DecryptTables(f"{tmp_path}/opened", manifest="require", **settings)
    run(DecryptTables(f"{tmp_path}/opened", **settings), f"{tmp_path}/sealed/*")


@pytest.mark.parametrize(
    "make",
    [
        lambda key: DecryptFiles("x", key=key, manifest="yes"),
        lambda key: DecryptTables("x", key=key, manifest="yes"),
        lambda key: ReadEncryptedText("x*", key=key, manifest="yes", validate=False),
        lambda key: ReadAllEncryptedText(key=key, manifest="yes"),
        lambda key: ReadAllEncryptedParquet(key=key, manifest="yes", schema=SCHEMA),
        lambda key: VerifyShards(key=key, manifest="yes"),
    ],
)
def test_another_mode_is_refused_when_the_pipeline_is_built(key, make):
    with pytest.raises(ValueError, match="manifest is one of use, require, ignore, not 'yes'"):
        make(key)


# ------------------------------------------------------------------------------ jobs that fail, and are run again


def with_handler(transform, source):
    _kept.clear()
    failed = []
    globals()["_failed"] = failed
    with beam.Pipeline("FnApiRunner") as p:
        with CollectingErrorHandler() as handler:
            done = p | beam.Create([str(source)]) | transform.with_error_handler(handler)
        _ = done | "Keep" >> beam.Map(keep)
        _ = handler.output() | "Keep failed" >> beam.Map(keep_failed)
    return list(_kept), sorted(failed)


def keep_failed(row):
    globals()["_failed"].append(row)


@pytest.mark.parametrize("kind", ["files", "tables"])
def test_single_bad_shards_go_to_the_error_handler_and_the_good_ones_land(copied, made, key, tmp_path, kind):
    writer = "EncryptFiles" if kind == "files" else "EncryptTables"
    folder = copied(writer)
    one, two, three = shards(folder)
    lose(folder, None)
    put_in(folder, None)
    copy_pair(made / writer / "older" / three.name, three)
    transform = (DecryptFiles if kind == "files" else DecryptTables)(f"{tmp_path}/opened", key=key, context=CONTEXT)
    done, failed = with_handler(transform, f"{folder}/*")
    assert len(done) == 1
    assert [path.name for path in (tmp_path / "opened").glob("*")] == [one.name]
    extra = one.with_name(f"9{one.name}")
    assert {Path(row.source).name: row.error for row in failed} == {
        two.name: "ManifestError",
        three.name: "ManifestError",
        extra.name: "ManifestError",
    }
    for row, part in zip(failed, (MISSING, SWAPPED, EXTRA), strict=True):
        assert part in row.message


def test_what_the_writers_error_handler_takes_is_not_listed(tmp_path, key):
    data = texts(tmp_path / "data")
    encrypt(f"{data}/1.txt", tmp_path / "sealed", key, manifest=False)
    write_files(tmp_path / "data", {"1.txt": b"is there already, as another shard"})
    done, failed = with_handler(EncryptFiles(f"{tmp_path}/sealed", key=key, if_exists="error"), f"{data}/[02].txt")
    assert (len(done), failed) == (2, [])
    assert listed(tmp_path / "sealed").keys() == {"0.txt", "2.txt"}


@pytest.mark.parametrize("writer", ["EncryptFiles", "EncryptTables"])
def test_a_job_killed_before_the_manifest_is_completed_by_skip(copied, key, tmp_path, writer):
    folder = copied(writer)
    whole = listed(folder)
    (folder / NAME).unlink()  # as if it had been killed after its last shard
    lost = shards(folder)[2]
    lost.unlink()
    kind, data = (EncryptFiles, texts) if writer == "EncryptFiles" else (EncryptTables, tables)
    source = f"{data(tmp_path / 'data')}/*"
    settings = {"key": key, "context": CONTEXT}
    clear_caches()
    results = run(kind(f"{folder}", if_exists="skip", **settings), source).results
    assert [result.skipped for result in results] == [True, True, False]
    assert listed(folder).keys() == whole.keys()
    assert {n: i for n, i in listed(folder).items() if n != lost.name} == {
        n: i for n, i in whole.items() if n != lost.name
    }
    before = (folder / NAME).read_bytes()
    run(kind(f"{folder}", if_exists="skip", **settings), source)
    assert (folder / NAME).read_bytes() == before
    read = by_decrypt_files if writer == "EncryptFiles" else by_decrypt_tables
    assert read(folder, tmp_path / "opened", manifest="require", **settings) == NUMBERS


def test_skip_does_not_vouch_for_a_shard_that_was_replaced_but_encrypts_it_anew(copied, made, key, tmp_path):
    folder = copied("EncryptFiles")
    before = listed(folder)
    replay(folder, made / "EncryptFiles" / "older")
    replaced = {
        path.name for path in folder.glob("*.txt") if shard_on_store(str(path)).entry.shard_id != before[path.name]
    }
    assert len(replaced) == 1
    ids = {shard_on_store(str(folder / name)).entry.shard_id for name in replaced}
    run(EncryptFiles(f"{folder}", if_exists="skip", key=key, context=CONTEXT), f"{texts(tmp_path / 'data')}/*")
    after = listed(folder)
    assert {name for name in after if after[name] != before[name]} == replaced
    assert ids.isdisjoint(after.values())
    opened = by_decrypt_files(folder, tmp_path / "opened", key=key, context=CONTEXT, manifest="require")
    assert opened == NUMBERS


def test_an_older_shard_after_an_overwrite_is_refused(copied, key, tmp_path):
    folder = copied("EncryptFiles")
    shutil.copytree(folder, tmp_path / "older")
    of_files(folder, tmp_path / "data", key=key, context=CONTEXT)
    assert len(parsed(folder).sections) == 2
    assert by_decrypt_files(folder, tmp_path / "opened", key=key, context=CONTEXT, manifest="require") == NUMBERS
    expected = replay(folder, tmp_path / "older")
    assert expected in message_of(by_decrypt_files, folder, tmp_path / "again", key=key, context=CONTEXT)
    # The folder as it was, manifest and all, is as good as ever: docs/manifest.md says so.
    assert by_decrypt_files(tmp_path / "older", tmp_path / "x", key=key, context=CONTEXT, manifest="require") == NUMBERS


def test_single_files_cannot_tell_of_missing_ones(copied, key, tmp_path):
    """What comes from MatchFiles is looked up file by file: added and swapped ones are noticed."""
    folder = copied("EncryptFiles")
    lose(folder, None)

    def read(output):
        clear_caches()
        decrypt = DecryptFiles(f"{output}", key=key, context=CONTEXT, manifest="require", relative_to=f"{folder}")
        return collect(fileio.MatchFiles(f"{folder}/[0-9]*"), decrypt)

    assert len(read(tmp_path / "opened")) == 2
    put_in(folder, None)
    with pytest.raises(Exception, match=EXTRA):
        read(tmp_path / "again")


# ----------------------------------------------------------------------------------------------------- verification


def verified(folder, key, **settings):
    clear_caches()
    rows = run(VerifyShards(**{"key": key, "context": CONTEXT, **settings}), f"{folder}").results
    return {row.path.removeprefix(f"{folder}/"): row for row in rows}


@pytest.mark.parametrize("writer", ["EncryptFiles", "WriteEncryptedParquet"])
def test_verify_has_a_row_for_each_thing_that_the_manifest_says_otherwise(copied, made, key, writer):
    folder = copied(writer)
    older = made / writer / "older"
    names = [path.name for path in shards(folder)]
    rows = verified(folder, key, manifest="require")
    assert {name: (row.kind, row.ok) for name, row in rows.items()} == {
        NAME: ("manifest", True),
        **dict.fromkeys(names, ("shard" if writer == "EncryptFiles" else "parquet", True)),
    }
    copy_pair(older / names[2], folder / names[2])
    lose(folder, older)
    put_in(folder, older)
    rows = verified(folder, key)
    assert {name: row.problem.partition(".")[0] for name, row in rows.items() if not row.ok}.keys() == {
        names[1],
        names[2],
        f"9{names[0]}",
    }
    assert MISSING in rows[names[1]].problem
    assert SWAPPED in rows[names[2]].problem
    assert EXTRA in rows[f"9{names[0]}"].problem
    assert rows[NAME].ok
    assert {name for name, row in verified(folder, key, manifest="ignore").items() if not row.ok} == set()


def test_verify_tells_two_that_were_swapped(copied, key):
    folder = copied("EncryptFiles")
    swap(folder, None)
    rows = verified(folder, key)
    assert {name for name, row in rows.items() if SWAPPED in row.problem} == {p.name for p in shards(folder)[:2]}


@pytest.mark.parametrize("damage", [change_manifest, cut_manifest, replace_manifest])
def test_verify_tells_of_a_manifest_that_was_changed(copied, made, key, damage):
    folder = copied("EncryptFiles")
    expected = damage(folder, made / "EncryptFiles" / "older")
    rows = verified(folder, key)
    problems = {name for name, row in rows.items() if expected in row.problem}
    assert problems == ({p.name for p in shards(folder)} if damage is replace_manifest else {NAME})


def test_verify_tells_of_a_manifest_that_is_not_there(copied, key):
    folder = copied("EncryptFiles")
    (folder / NAME).unlink()
    assert all(row.ok for row in verified(folder, key).values())
    assert f"has no {NAME}" in verified(folder, key, manifest="require")[NAME].problem


def test_the_commands_have_the_same_modes_and_an_exit_status(copied, key, tmp_path, capfdbinary, monkeypatch):
    folder = copied("EncryptFiles")
    ours = ("--key", str(key), "--context", "dataset=numbers")

    def command(*words):
        clear_caches()
        status = cli.main([str(word) for word in words])
        out, err = capfdbinary.readouterr()
        return status, out + err

    assert command("verify", folder, *ours, "--manifest", "require")[0] == 0
    status, printed = command("cat", f"{folder}/*", *ours, "--manifest=require")
    assert (status, sorted(map(int, printed.split()))) == (0, NUMBERS)
    put_in(folder, None)
    for words in (("verify", folder), ("cat", f"{folder}/*"), ("decrypt", folder, "--output", tmp_path / "opened")):
        status, printed = command(*words, *ours)
        assert status == 1
        assert EXTRA.encode() in b" ".join(printed.split())
        assert command(*words, *ours, "--manifest=ignore")[0] == 0
    (folder / NAME).unlink()
    assert command("verify", folder, *ours)[0] == 0
    assert command("verify", folder, *ours, "--manifest=require")[0] == 1
    data = texts(tmp_path / "data")
    assert command("encrypt", f"{data}/*", "--output", tmp_path / "two", *ours, "--no-manifest")[0] == 0
    assert not (tmp_path / "two" / NAME).exists()
    assert command("encrypt", f"{data}/*", "--output", tmp_path / "two", *ours, "--if-exists=skip")[0] == 0
    assert len(listed(tmp_path / "two")) == 3


# --------------------------------------------------------------------------------------------------------- rotation


def required(folder, key, output):
    clear_caches()
    return by_decrypt_files(folder, output, key=key, context=CONTEXT, manifest="require")


def test_the_manifest_of_a_folder_goes_along(copied, key, theirs, tmp_path):
    folder = copied("EncryptFiles")
    of_files(folder, tmp_path / "data", key=key, context=CONTEXT)  # a second section
    macs = [section.mac for section in parsed(folder).sections]
    results = run(RotateKeys(key, to=theirs), f"{folder}").results
    assert [Path(row.key_file).name for row in results if Path(row.key_file).name == NAME] == [NAME]
    assert len(results) == 4
    assert [section.mac for section in parsed(folder).sections] == macs
    assert required(folder, theirs, tmp_path / "opened") == NUMBERS
    assert "the keys allowed here are" in message_of(
        by_decrypt_files, folder, tmp_path / "again", key=key, context=CONTEXT
    )
    assert [row.changed for row in run(RotateKeys(key, to=theirs), f"{folder}/{NAME}").results] == [False]


def test_a_key_is_added_to_the_manifest_and_removed(copied, key, theirs, tmp_path):
    folder = copied("EncryptFiles")
    run(RotateKeys(key, add=theirs), f"{folder}")
    for number, one in enumerate((key, theirs)):
        assert required(folder, one, tmp_path / f"opened{number}") == NUMBERS
    run(RotateKeys(theirs, remove=key), f"{folder}")
    assert required(folder, theirs, tmp_path / "opened") == NUMBERS
    assert all(len(data_key.wrapped_keys) == 1 for data_key in parsed(folder).data_keys)
    with pytest.raises(Exception, match="the keys allowed here are"):
        required(folder, key, tmp_path / "again")


def test_sections_under_other_keys_stay_as_they_are(copied, key, theirs, tmp_path):
    folder = copied("EncryptFiles")
    data = write_files(tmp_path / "more", {"9.txt": b"9\n"})
    encrypt(f"{data}/*", folder, theirs, context=CONTEXT)
    third_key = LocalKms(tmp_path / "third.json")
    generate_local_key(third_key)
    before = parsed(folder)
    run(RotateKeys(key, to=third_key), f"{folder}/{NAME}", f"{folder}/[012].txt")
    after = parsed(folder)
    assert after.data_keys[1] == before.data_keys[1]
    assert after.data_keys[0] != before.data_keys[0]
    assert by_decrypt_files(
        folder, tmp_path / "opened", key=[theirs, third_key], context=CONTEXT, manifest="require"
    ) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, *NUMBERS[10:]]


def test_a_pattern_of_some_shards_leaves_the_manifest_and_one_of_all_takes_it_along(copied, key, theirs):
    folder = copied("EncryptFiles")
    before = (folder / NAME).read_bytes()
    results = run(RotateKeys(key, to=theirs), f"{folder}/[01].txt").results
    assert len(results) == 2
    assert (folder / NAME).read_bytes() == before
    results = run(RotateKeys(key, to=theirs), f"{folder}/*.txt").results
    assert [result.changed for result in results] == [False, False, True, True]
    assert (folder / NAME).read_bytes() != before


def test_a_broken_manifest_does_not_stop_the_rotation_of_key_files(copied, key, theirs):
    folder = copied("EncryptFiles")
    cut_manifest(folder, None)
    error = fails(RotateKeys(key, to=theirs), f"{folder}/{NAME}")
    assert "is not a readable manifest" in error[1]


def test_a_job_that_adds_while_a_rotation_runs_loses_nothing(copied, key, theirs, tmp_path, monkeypatch):
    from beam_envelope.transforms import rotate

    folder = copied("EncryptFiles")
    more = encrypt(f"{write_files(tmp_path / 'more', {'9.txt': b'9'})}/*", folder, key, context=CONTEXT, manifest=False)
    (result,) = more.results
    real, left = rotate.replace_key_file, [1]

    def come_between(path, old, new):
        if path.endswith(NAME) and left:
            left.pop()
            from beam_envelope.io.manifest import add_to_manifest, shard_on_store

            add_to_manifest(f"{folder}/", [shard_on_store(result.shard)], (key,), CONTEXT)
        return real(path, old, new)

    monkeypatch.setattr(rotate, "replace_key_file", come_between)
    run(RotateKeys(key, to=theirs), f"{folder}")
    assert not left
    assert len(listed(folder)) == 4
    assert all(len(section.data_key.wrapped_keys) == 1 for section in parsed(folder).sections)
    assert required(folder, theirs, tmp_path / "opened") == sorted([*NUMBERS, 9])


def test_rotation_on_aws_needs_no_right_to_decrypt(tmp_path, fake_kms):
    old, new = (AwsKms(fake_kms.create_key()) for _ in range(2))
    encrypt(f"{texts(tmp_path / 'data')}/*", tmp_path / "sealed", old, context=CONTEXT)
    fake_kms.deny("Decrypt")
    kms_calls.counts.clear()
    run(RotateKeys(old, to=new), f"{tmp_path}/sealed")
    fake_kms.allow("Decrypt")
    fake_kms.disable_key(old.key_id)
    assert required(tmp_path / "sealed", new, tmp_path / "opened") == NUMBERS
    assert NAME in listing(tmp_path / "sealed")
    json.loads((tmp_path / "sealed" / NAME).read_bytes())
