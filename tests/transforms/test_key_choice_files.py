"""Templates and allow-lists where whole files, lines and tables are written and read; and what becomes of a tenant."""

import json
import subprocess
import sys
from pathlib import Path

import apache_beam as beam
import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.io import fileio
from apache_beam.testing.test_stream import TestStream as Stream

from beam_envelope import (
    ANY_CONTEXT,
    AllowedKeys,
    DataKeyPolicy,
    DecryptFields,
    DecryptFiles,
    DecryptRecords,
    DecryptTables,
    EncryptedParquetFile,
    EncryptFields,
    EncryptFiles,
    EncryptRecords,
    EncryptTables,
    ReadAllEncryptedText,
    ReadEncryptedParquet,
    ReadEncryptedText,
    RotateKeys,
    VerifyShards,
    WriteEncryptedFiles,
    WriteEncryptedParquet,
    WriteEncryptedText,
    cli,
    create_parquet,
    open_parquet,
    open_shard,
)
from beam_envelope.errors import FormatError, KeyAccessError, WrongKeyError
from beam_envelope.formats.keyfile import MANIFEST_NAME, key_file_name
from beam_envelope.formats.manifest import Manifest
from beam_envelope.io import parquet_bundle
from beam_envelope.io.manifest import add_to_manifest, shard_on_store
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.uri import open_keys
from tests.running import fails, listing, read_files, run, with_manifest, write_files
from tests.transforms.test_key_choice import CONTEXT, KEY, TENANTS, of_line, tenants, under  # noqa: F401  # a fixture
from tests.transforms.test_records import keep, outcome, pipeline

FILES = {f"tenant={tenant}/{number}.csv": f"{tenant}:{number}\n".encode() for tenant in TENANTS for number in range(2)}
SETTINGS = {"key": KEY, "context": CONTEXT}
WRONG = "'tenant' is 'acme' there and 'bolt' here"


def keys_of(folder):
    """Return by relative path the KMS keys of each file's key file."""
    found = {}
    for path in sorted(Path(folder).rglob("_KEY_FOR_*")):
        name = str(path.relative_to(folder)).replace("_KEY_FOR_", "").removesuffix(".json")
        document = json.loads(path.read_text())
        found[name] = [form["kms_key"] for each in document["data_keys"] for form in each["wrapped_keys"]]
    return found


def sections_of(folder):
    """Return by relative path the KMS keys of the section that lists a shard, and the tenant in its context."""
    sections = Manifest.from_bytes(Path(folder, MANIFEST_NAME).read_bytes(), MANIFEST_NAME).sections
    found = {}
    for section in sections:
        keys = [form.kms_key for form in section.data_key.wrapped_keys]
        for name in section.shards:
            assert name not in found
            found[name] = (keys, section.context["tenant"])
    return found


@pytest.fixture
def data(tmp_path):
    return write_files(tmp_path / "data", FILES)


@pytest.fixture
def allowed(tenants):  # noqa: F811
    return AllowedKeys([tenants.account], [tenants.region], ["data-*"])


# ------------------------------------------------------------------------------------------------------------ files


def test_each_file_is_under_the_key_of_its_folder(data, tmp_path, tenants, allowed):  # noqa: F811
    job = run(EncryptFiles(f"{tmp_path}/sealed", **SETTINGS), f"{data}/")
    assert len(job.results) == 6
    assert tenants.calls == {"GenerateDataKey": 6}  # for each key one in this bundle, and one for its section
    arns = under(tenants)
    assert keys_of(tmp_path / "sealed") == {name: [arns[name[7:11]]] for name in FILES}
    assert sections_of(tmp_path / "sealed") == {name: ([arns[name[7:11]]], name[7:11]) for name in FILES}
    assert listing(tmp_path / "sealed") == with_manifest(*FILES)
    clear_caches()
    run(DecryptFiles(f"{tmp_path}/opened", **SETTINGS), f"{tmp_path}/sealed/")
    assert read_files(tmp_path / "opened") == FILES
    assert tenants.calls["Decrypt"] == 6  # for each key one of its shards, and one of its section
    clear_caches()
    run(DecryptFiles(f"{tmp_path}/opened2", key=allowed, context=ANY_CONTEXT), f"{tmp_path}/sealed/")
    assert read_files(tmp_path / "opened2") == FILES
    assert tenants.calls["Decrypt"] == 12


def test_a_worker_has_one_data_key_for_each_key_over_its_bundles(data, tmp_path, tenants):  # noqa: F811
    for number in range(2):
        settings = {**SETTINGS, "policy": DataKeyPolicy("worker")}
        run(EncryptFiles(f"{tmp_path}/{number}", **settings), f"{data}/")
        assert tenants.calls == {"GenerateDataKey": 6 + 3 * number}  # each manifest has three sections of its own


def test_a_pattern_says_where_the_tenant_is(tmp_path, tenants):  # noqa: F811
    write_files(tmp_path / "data", {"acme/a.csv": b"1", "bolt/b.csv": b"2"})
    settings = {**SETTINGS, "path_fields": "{tenant}/*.csv"}
    run(EncryptFiles(f"{tmp_path}/sealed", **settings), f"{tmp_path}/data/")
    assert keys_of(tmp_path / "sealed") == {
        f"{tenant}/{tenant[0]}.csv": [under(tenants)[tenant]] for tenant in ("acme", "bolt")
    }
    run(DecryptFiles(f"{tmp_path}/opened", **settings), f"{tmp_path}/sealed/")
    assert read_files(tmp_path / "opened") == {"acme/a.csv": b"1", "bolt/b.csv": b"2"}


def test_a_shard_moved_to_another_tenant_is_refused_before_any_call(data, tmp_path, tenants):  # noqa: F811
    run(EncryptFiles(f"{tmp_path}/sealed", **SETTINGS), f"{data}/tenant=acme/0.csv", f"{data}/tenant=bolt/1.csv")
    (tmp_path / "sealed/tenant=bolt").mkdir()
    for name in ("0.csv", key_file_name("0.csv")):
        (tmp_path / "sealed" / name).rename(tmp_path / "sealed/tenant=bolt" / name)
    clear_caches()
    moved = f"{tmp_path}/sealed/tenant=bolt/0.csv"
    any_context = {"key": KEY, "context": ANY_CONTEXT}
    for settings in (SETTINGS, any_context):
        name, message = fails(DecryptFiles(f"{tmp_path}/opened", **settings), f"{tmp_path}/sealed/tenant=bolt/*")
        assert (name, f"{moved}: not listed by the manifest" in message) == ("ManifestError", True)
    # Without the manifest, and where the other tenant lists it, the path says what its keys and context are.
    below = {"manifest": "ignore"}
    name, message = fails(DecryptFiles(f"{tmp_path}/opened", **SETTINGS, **below), f"{tmp_path}/sealed/tenant=bolt/*")
    assert (name, WRONG in message, "section" in message) == ("ContextMismatchError", True, False)
    assert "Decrypt" not in tenants.calls
    name, _ = fails(DecryptFiles(f"{tmp_path}/opened", **any_context, **below), f"{tmp_path}/sealed/tenant=bolt/*")
    assert name == "WrongKeyError"
    assert tenants.calls["Decrypt"] == 1
    acme = {name: value.replace("{tenant}", "acme") for name, value in CONTEXT.items()}
    add_to_manifest(f"{tmp_path}/sealed/", [shard_on_store(moved)], open_keys("aws-kms://alias/data-acme"), acme)
    section = f"section 3 of {tmp_path}/sealed/{MANIFEST_NAME}"
    name, message = fails(DecryptFiles(f"{tmp_path}/opened", **SETTINGS), f"{tmp_path}/sealed/tenant=bolt/*")
    assert (name, WRONG in message, section in message) == ("ContextMismatchError", True, True)
    assert tenants.calls["Decrypt"] == 1
    name, message = fails(DecryptFiles(f"{tmp_path}/opened", **any_context), f"{tmp_path}/sealed/tenant=bolt/*")
    assert (name, section in message) == ("WrongKeyError", True)
    assert tenants.calls["Decrypt"] == 2
    assert not listing(tmp_path / "opened")


def test_a_path_that_does_not_say_its_tenant_is_named(tmp_path, tenants):  # noqa: F811
    write_files(tmp_path / "data", {"a.csv": b"1", "tenant=b b/b.csv": b"2"})
    name, message = fails(EncryptFiles(f"{tmp_path}/sealed", **SETTINGS), f"{tmp_path}/data/a.csv")
    assert name == "FormatError"
    assert message.startswith(f"the path {tmp_path}/data/a.csv has no folder tenant=...")
    name, message = fails(EncryptFiles(f"{tmp_path}/sealed", **SETTINGS), f"{tmp_path}/data/*/b.csv")
    assert "the 'tenant' of the path" in message
    assert not listing(tmp_path / "sealed")
    assert not tenants.calls


def test_skipping_compares_the_context_of_the_path(data, tmp_path, tenants):  # noqa: F811
    run(EncryptFiles(f"{tmp_path}/sealed", **SETTINGS), f"{data}/")
    again = run(EncryptFiles(f"{tmp_path}/sealed", **SETTINGS, if_exists="skip"), f"{data}/")
    assert all(result.skipped for result in again.results)
    assert tenants.calls == {"GenerateDataKey": 6}  # all of the first job: of its shards, and of its sections


# ----------------------------------------------------------------------------------------------------------- tables


@pytest.fixture
def tables(tmp_path):
    for tenant in TENANTS:
        (tmp_path / "data" / f"tenant={tenant}").mkdir(parents=True)
        pq.write_table(pa.table({"ssn": [tenant], "n": [1]}), tmp_path / f"data/tenant={tenant}/a.parquet")
    return tmp_path / "data"


def test_each_table_is_under_the_keys_of_its_folder(tables, tmp_path, tenants, allowed):  # noqa: F811
    pii = {tenant: tenants.create_key(f"data-{tenant}/pii") for tenant in TENANTS}
    columns = {"ssn": "aws-kms://alias/data-{tenant}/pii"}
    run(EncryptTables(f"{tmp_path}/sealed", **SETTINGS, columns=columns), f"{tables}/")
    assert tenants.calls == {"GenerateDataKey": 9}  # for each tenant two of its table, and one of its section
    arns = under(tenants)
    assert keys_of(tmp_path / "sealed") == {f"tenant={t}/a.parquet": [arns[t], pii[t]] for t in TENANTS}
    # A section is under the keys of the footers.
    assert sections_of(tmp_path / "sealed") == {f"tenant={t}/a.parquet": ([arns[t]], t) for t in TENANTS}
    clear_caches()
    keys = [KEY, "aws-kms://alias/data-{tenant}/pii"]
    run(DecryptTables(f"{tmp_path}/opened", key=keys, context=CONTEXT), f"{tmp_path}/sealed/")
    read = [pq.read_table(path, partitioning=None) for path in sorted((tmp_path / "opened").rglob("*.parquet"))]
    assert [table.column("ssn").to_pylist() for table in read] == [[tenant] for tenant in TENANTS]
    settings = {"key": allowed, "context": ANY_CONTEXT}
    rows = outcome_of(ReadEncryptedParquet(f"{tmp_path}/sealed/**", **settings))
    assert sorted(row["ssn"] for row in rows) == list(TENANTS)
    rows = outcome_of(ReadEncryptedParquet(f"{tmp_path}/sealed/**", key=keys, context=CONTEXT))
    assert sorted(row["ssn"] for row in rows) == list(TENANTS)
    again = run(EncryptTables(f"{tmp_path}/sealed", **SETTINGS, columns=columns, if_exists="skip"), f"{tables}/")
    assert all(result.skipped for result in again.results)
    assert tenants.calls["GenerateDataKey"] == 9


@pytest.mark.parametrize("deterministic", [(), ["ssn"]])
def test_cells_of_each_table_are_under_the_key_of_its_folder(tables, tmp_path, tenants, deterministic):  # noqa: F811
    settings = {**SETTINGS, "cells": True, "keys": f"{tmp_path}/keys"}
    more = {"columns": ["ssn"], "deterministic": deterministic}
    run(EncryptTables(f"{tmp_path}/sealed", **settings, **more), f"{tables}/")
    assert tenants.calls["GenerateDataKey"] == 3
    clear_caches()
    run(DecryptTables(f"{tmp_path}/opened", **settings), f"{tmp_path}/sealed/")
    assert tenants.calls["Decrypt"] == (6 if deterministic else 3)
    read = [pq.read_table(path, partitioning=None) for path in sorted((tmp_path / "opened").rglob("*.parquet"))]
    assert [table.column("ssn").to_pylist() for table in read] == [[tenant] for tenant in TENANTS]


# ---------------------------------------------------------------------------------------------------- Beam's own IO


def outcome_of(source, elements=None):
    """Run a source, or a transform of elements, and return what comes out."""
    if elements is not None:
        return outcome([source], elements)
    from tests.transforms import test_records

    test_records._kept.clear()
    with pipeline() as p:
        _ = p | source | beam.Map(keep)
    return list(test_records._kept)


LINES = [f"{tenant}:{number}" for number in range(2) for tenant in TENANTS]


def test_lines_choose_their_keys_and_folders_say_which(tmp_path, tenants, allowed):  # noqa: F811
    writer = WriteEncryptedText(
        f"{tmp_path}/sealed/part", **SETTINGS, key_fields=of_line, file_name_suffix=".txt", header="head"
    )
    paths = outcome_of(writer, LINES)
    arns = under(tenants)
    names = {f"tenant={tenant}/part-00000-of-00001.txt": [arns[tenant]] for tenant in TENANTS}
    assert sorted(paths) == sorted(f"{tmp_path}/sealed/{name}" for name in names)
    assert keys_of(tmp_path / "sealed") == names
    assert sections_of(tmp_path / "sealed") == {name: (keys, name[7:11]) for name, keys in names.items()}
    assert listing(tmp_path / "sealed") == with_manifest(*names)
    assert tenants.calls == {"GenerateDataKey": 6}  # for each key one of its shard, and one of its section
    with open_shard(paths[0], key=allowed, context=ANY_CONTEXT) as shard:
        head, *lines = shard.read().decode().splitlines()
    assert head == "head"
    assert len({line[:4] for line in lines}) == 1
    clear_caches()
    more = {"skip_header_lines": 1}
    assert sorted(outcome_of(ReadEncryptedText(f"{tmp_path}/sealed/**", **SETTINGS, **more))) == sorted(LINES)
    reader = ReadAllEncryptedText(key=allowed, context=ANY_CONTEXT, **more)
    assert sorted(outcome_of(reader, [f"{tmp_path}/sealed/**"])) == sorted(LINES)
    assert listing(tmp_path / "sealed") == with_manifest(*names)


def test_a_prefix_says_the_key_of_all_lines(tmp_path, tenants):  # noqa: F811
    outcome_of(WriteEncryptedText(f"{tmp_path}/sealed/tenant=bolt/part", **SETTINGS), LINES)
    ((name, found),) = keys_of(tmp_path / "sealed").items()
    assert (name.partition("/")[0], found) == ("tenant=bolt", [under(tenants)["bolt"]])
    assert sections_of(tmp_path / "sealed/tenant=bolt") == {name.partition("/")[2]: (found, "bolt")}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "has no folder tenant=....*Where lines choose their keys, give key_fields=, a function of the line"),
        ({"key_fields": of_line, "num_shards": 3}, "num_shards: not where lines choose their keys"),
        ({"key_fields": of_line, "key": "aws-kms://alias/x", "context": None}, "key_fields= fills templates"),
        ({"key": AllowedKeys(["1" * 12])}, "is no key to write with"),
    ],
)
def test_what_lines_cannot_choose_is_refused(more, said):
    with pytest.raises(ValueError, match=said):
        WriteEncryptedText("sealed/part", **{**SETTINGS, **more})


def of_dict(element):
    return element["tenant"]


def of_folders(element):
    return f"tenant={element['tenant']}/year={element['year']}"


class Shown(fileio.TextSink):
    """A sink of dicts."""

    def write(self, record):
        super().write(json.dumps(record))


def test_destinations_fill_templates(tmp_path, tenants):  # noqa: F811
    elements = [{"tenant": tenant, "year": 2026} for tenant in TENANTS]
    for number, destination in enumerate((of_dict, of_folders)):
        context = {"tenant": "{tenant}", **({"year": "{year}"} if number else {})}
        key = KEY if not number else [KEY]
        writer = WriteEncryptedFiles(
            f"{tmp_path}/{number}",
            key=key,
            context=context,
            destination=destination,
            sink=Shown(),
            file_naming=fileio.destination_prefix_naming(".txt"),
        )
        outcome_of(writer, elements)
        found = keys_of(tmp_path / str(number))
        assert sorted(found.values()) == sorted([arn] for arn in under(tenants).values())
        tenant_of = {arn: tenant for tenant, arn in under(tenants).items()}
        assert sections_of(tmp_path / str(number)) == {name: (arns, tenant_of[arns[0]]) for name, arns in found.items()}


# ---------------------------------------------------------------------------------------------------------- Parquet

SCHEMA = pa.schema([("tenant", pa.string()), ("ssn", pa.string())])
ROWS = [{"tenant": tenant, "ssn": f"{tenant}-{number}"} for number in range(4) for tenant in TENANTS]


@pytest.mark.parametrize("kind", ["rows", "tables"])
def test_each_row_goes_to_a_file_of_its_key(tmp_path, tenants, allowed, kind):  # noqa: F811
    elements = ROWS if kind == "rows" else [pa.Table.from_pylist(ROWS, SCHEMA), pa.RecordBatch.from_pylist([], SCHEMA)]
    writer = WriteEncryptedParquet(f"{tmp_path}/sealed/part", SCHEMA, **SETTINGS)
    files = outcome_of(writer, elements)
    assert all(isinstance(file, EncryptedParquetFile) and file.rows == 4 for file in files)
    found = keys_of(tmp_path / "sealed")
    assert sorted(found) == [f"part-0000{number}-of-00003.parquet" for number in range(3)]
    assert sorted(found.values()) == sorted([arn] for arn in under(tenants).values())
    tenant_of = {arn: tenant for tenant, arn in under(tenants).items()}
    assert sections_of(tmp_path / "sealed") == {name: (arns, tenant_of[arns[0]]) for name, arns in found.items()}
    assert tenants.calls == {"GenerateDataKey": 6}  # for each key one of its file, and one of its section
    for file in files:
        with open_parquet(file.path, key=allowed, context=ANY_CONTEXT) as reader:
            table = reader.read()
            context = reader.key_file.context
        assert set(table.column("tenant").to_pylist()) == {context["tenant"]}
    rows = outcome_of(ReadEncryptedParquet(f"{tmp_path}/sealed/", key=allowed, context=ANY_CONTEXT))
    assert sorted(map(str, rows)) == sorted(map(str, ROWS))


def test_so_many_files_are_open_and_the_oldest_is_finished(tmp_path, tenants, monkeypatch):  # noqa: F811
    monkeypatch.setattr(parquet_bundle, "MAX_OPEN_FILES", 1)
    files = outcome_of(WriteEncryptedParquet(f"{tmp_path}/sealed/part", SCHEMA, **SETTINGS), ROWS[:4])
    assert sorted(file.rows for file in files) == [1, 1, 1, 1]
    assert tenants.calls == {"GenerateDataKey": 6}  # for each key one of its files, and one of its section
    assert len(sections_of(tmp_path / "sealed")) == 4


def test_no_rows_make_no_file_since_no_key_is_known(tmp_path, tenants):  # noqa: F811
    assert outcome_of(WriteEncryptedParquet(f"{tmp_path}/sealed/part", SCHEMA, **SETTINGS), []) == []
    assert not tenants.calls


def test_unbounded_rows_choose_their_keys(tmp_path, tenants):  # noqa: F811
    from tests.transforms import test_records

    test_records._kept.clear()
    stream = Stream().add_elements(ROWS[:3]).advance_watermark_to_infinity()
    with beam.Pipeline("BundleBasedDirectRunner") as p:
        _ = p | stream | WriteEncryptedParquet(f"{tmp_path}/sealed/part", SCHEMA, **SETTINGS) | beam.Map(keep)
    assert len(test_records._kept) == 3
    assert sorted(keys_of(tmp_path / "sealed").values()) == sorted([arn] for arn in under(tenants).values())


def test_what_rows_cannot_choose_is_refused(tmp_path, tenants):  # noqa: F811
    with pytest.raises(ValueError, match="num_shards puts rows of different keys together"):
        WriteEncryptedParquet(f"{tmp_path}/part", SCHEMA, **SETTINGS, num_shards=2)
    with pytest.raises(ValueError, match="is a template, and nothing fills it here"):
        create_parquet(f"{tmp_path}/a.parquet", SCHEMA, key=KEY)
    with pytest.raises(ValueError, match="is no key to write with"):
        create_parquet(f"{tmp_path}/a.parquet", SCHEMA, key=AllowedKeys(["1" * 12]))
    with pytest.raises(Exception, match="the field 'tenant', which the template of the key or context needs"):
        outcome_of(WriteEncryptedParquet(f"{tmp_path}/part", SCHEMA, **SETTINGS), [{"ssn": "1"}])
    assert not tenants.calls


# ------------------------------------------------------------------------------------- the command, rotate and verify


def command(capfd, *words):
    """Run the command; return its exit status and what it printed."""
    status = cli.main([str(word) for word in words])
    said = capfd.readouterr()
    return status, said.out or said.err


def test_the_command_takes_templates_and_allow_lists(data, tmp_path, tenants, capfd):  # noqa: F811
    words = ("--key", KEY, "--context", "tenant={tenant}")
    status, said = command(capfd, "encrypt", f"{data}/", "--output", f"{tmp_path}/sealed", *words, "--json")
    assert status == 0, said
    assert json.loads(said)["kms_calls_to_check"] == {"GenerateDataKey": 3}
    assert json.loads(said)["kms_calls"] == {"GenerateDataKey": 6}  # for each key one of its shards and of its section
    assert listing(tmp_path / "sealed") == with_manifest(*FILES)
    every = f"aws-kms://*?account={tenants.account}&alias=data-*"
    for number, reader in enumerate((words, ("--key", every, "--any-context"))):
        status, said = command(
            capfd, "decrypt", f"{tmp_path}/sealed/", "--output", f"{tmp_path}/{number}", *reader, "--json"
        )
        assert status == 0, said
        assert read_files(tmp_path / str(number)) == FILES
    status, said = command(capfd, "cat", f"{tmp_path}/sealed/tenant=acme/*", *words)
    assert (status, said) == (0, "acme:0\nacme:1\n")
    status, said = command(capfd, "verify", f"{tmp_path}/sealed/", "--key", every, "--any-context", "--json")
    assert (status, json.loads(said)["problems"]) == (0, 0)


def test_the_command_stops_before_the_job_where_a_path_does_not_say_its_tenant(data, tmp_path, tenants, capfd):  # noqa: F811
    write_files(data, {"other/a.csv": b"1"})
    status, said = command(capfd, "encrypt", f"{data}/", "--output", f"{tmp_path}/sealed", "--key", KEY)
    assert status == 1
    assert "other/a.csv has no folder tenant=..." in " ".join(said.split())
    assert "--path-fields" in said
    assert not listing(tmp_path / "sealed")
    assert not tenants.calls
    words = ("--key", KEY, "--path-fields", "{tenant}/*.csv", "--context", "of={tenant}")
    write_files(tmp_path / "plain", {"acme/a.csv": b"1"})
    assert command(capfd, "encrypt", f"{tmp_path}/plain/", "--output", f"{tmp_path}/sealed", *words)[0] == 0
    assert command(capfd, "decrypt", f"{tmp_path}/sealed/", "--output", f"{tmp_path}/opened", *words)[0] == 0
    assert read_files(tmp_path / "opened") == {"acme/a.csv": b"1"}


def test_a_dataset_of_many_tenants_is_rotated_and_verified_by_an_allow_list(data, tmp_path, tenants, allowed):  # noqa: F811
    dr = tenants.create_key("dr")
    run(EncryptFiles(f"{tmp_path}/sealed", **SETTINGS), f"{data}/")
    job = run(RotateKeys(allowed, add="aws-kms://alias/dr"), f"{tmp_path}/sealed/")
    assert job.counters["key_files_changed"] == 7  # of six shards, and the manifest
    assert tenants.calls["ReEncrypt"] == 6  # one for each data key: of the bundle, and of the sections
    assert sections_of(tmp_path / "sealed") == {name: ([under(tenants)[name[7:11]], dr], name[7:11]) for name in FILES}
    assert {tuple(each[1:]) for each in keys_of(tmp_path / "sealed").values()} == {(dr,)}
    assert "key_files_changed" not in run(RotateKeys(allowed, add="aws-kms://alias/dr"), f"{tmp_path}/sealed/").counters
    verified = run(VerifyShards(key=allowed, context=ANY_CONTEXT), f"{tmp_path}/sealed/").results
    assert len([file for file in verified if file.ok]) == len(verified) == 7  # the manifest is one of them
    # All tenants under one new key, which is on the list itself: what is done is done.
    tenants.create_key("data-all")
    narrow = AllowedKeys([tenants.account], aliases=["data-*"])
    run(RotateKeys(narrow, to="aws-kms://alias/data-all"), f"{tmp_path}/sealed/")
    arn = tenants._find("alias/data-all").arn
    assert {tuple(sorted(each)) for each in keys_of(tmp_path / "sealed").values()} == {tuple(sorted((dr, arn)))}
    again = run(RotateKeys(narrow, to="aws-kms://alias/data-all"), f"{tmp_path}/sealed/")
    assert again.counters == {"key_files": 7, **{n: c for n, c in again.counters.items() if n.startswith("kms_")}}
    wide = AllowedKeys([tenants.account])
    name, message = fails(RotateKeys(wide, to=f"aws-kms://{tenants.create_key()}"), f"{tmp_path}/sealed/")
    assert (name, "is wrapped by several keys of aws-kms://*?account=" in message) == ("WrongKeyError", True)
    name, message = fails(
        RotateKeys(AllowedKeys(["0" * 12]), add=f"aws-kms://{tenants.create_key()}"), f"{tmp_path}/sealed/"
    )
    assert (name, "is wrapped by" in message) == ("WrongKeyError", True)
    for where in ({"to": allowed}, {"add": allowed}, {"to": "aws-kms://alias/x", "remove": allowed}, {"to": KEY}):
        with pytest.raises(ValueError, match=r"is no key to write with|is a template, and nothing fills it here"):
            RotateKeys("aws-kms://alias/x", **where)


# ------------------------------------------------------------------------------------------------- crypto-shredding

SHRED = """
import sys
from beam_envelope import ANY_CONTEXT, open_shard
from beam_envelope.errors import EnvelopeError

folder, account, tenant = sys.argv[1:]
settings = {"key": f"aws-kms://*?account={account}", "context": ANY_CONTEXT}
try:
    with open_shard(f"{folder}/sealed/tenant={tenant}/0.csv", **settings) as shard:
        print(shard.read().decode().strip())
except EnvelopeError as error:
    print(type(error).__name__, error)
"""


def in_a_new_process(tmp_path, account, tenant):
    """Read a tenant's shard where no cache is warm."""
    script = ["-c", SHRED, str(tmp_path), account, tenant]
    done = subprocess.run([sys.executable, *script], capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr


def test_a_tenant_whose_key_is_to_be_deleted_is_unreadable_and_the_others_are_not(data, tmp_path, tenants):  # noqa: F811
    """FakeKms refuses as AWS does; moto goes on to decrypt with such a key."""
    arns = under(tenants)
    run(EncryptFiles(f"{tmp_path}/sealed", **SETTINGS), f"{data}/")
    store = {"keys": f"{tmp_path}/keys"}
    pairs = [(tenant, tenant.encode()) for tenant in TENANTS]
    records = outcome([EncryptRecords(**SETTINGS, **store, keyed=True, key_fields=of_pair)], pairs)
    dicts = [{"tenant": tenant, "card": "4111"} for tenant in TENANTS]
    cells = outcome([EncryptFields(["card"], **SETTINGS, **store)], dicts)
    reader = {"key": AllowedKeys([tenants.account]), "context": ANY_CONTEXT}
    readers = {
        "records": (DecryptRecords(**reader, **store, keyed=True), records),
        "cells": (DecryptFields(["card"], **reader, **store), cells),
    }
    shards = {tenant: tmp_path / f"sealed/tenant={tenant}/0.csv" for tenant in TENANTS}
    with open_shard(shards["acme"], **reader) as shard:
        assert shard.read() == b"acme:0\n"
    tenants.schedule_key_deletion("alias/data-acme")
    # A process that has the data key keeps it for UNWRAPPED_TTL_S.
    with open_shard(shards["acme"], **reader) as shard:
        assert shard.read() == b"acme:0\n"
    said = in_a_new_process(tmp_path, tenants.account, "acme")
    assert said.startswith(f"KeyAccessError {shards['acme']} cannot be opened: KMS key {arns['acme']} is disabled or")
    assert f"KMSInvalidStateException: {arns['acme']} is pending deletion" in said
    assert in_a_new_process(tmp_path, tenants.account, "bolt") == "bolt:0"
    clear_caches()
    with pytest.raises(KeyAccessError, match="is pending deletion"), open_shard(shards["acme"], **reader):
        pass
    for transform, elements in readers.values():
        of = {tenant: [each for each in elements if tenant in str(each)] for tenant in TENANTS}
        assert len(outcome([transform], [*of["bolt"], *of["coil"]])) == 2
        clear_caches()
        with pytest.raises(Exception, match=f"{arns['acme']} is pending deletion"):
            outcome([transform], of["acme"])
    with pytest.raises(Exception, match="is pending deletion"):  # nor can anything new be written for it
        run(EncryptFiles(f"{tmp_path}/new", **SETTINGS), f"{data}/tenant=acme/0.csv")
    tenants.enable_key("alias/data-acme")  # within the waiting period
    clear_caches()
    with open_shard(shards["acme"], **reader) as shard:
        assert shard.read() == b"acme:0\n"


def of_pair(pair):
    return {"tenant": pair[0]}


def test_moto_too_tells_tenants_apart_by_their_aliases(data, tmp_path, moto_server):
    kms = boto3.client("kms")
    ids = {}
    for tenant in TENANTS:
        ids[tenant] = kms.create_key()["KeyMetadata"]["KeyId"]
        kms.create_alias(AliasName=f"alias/data-{tenant}", TargetKeyId=ids[tenant])
    run(EncryptFiles(f"{tmp_path}/sealed", **SETTINGS), f"{data}/")
    clear_caches()
    allowed = AllowedKeys(["123456789012"], ["us-east-1"], ["data-b*"])
    run(DecryptFiles(f"{tmp_path}/opened", key=allowed, context=ANY_CONTEXT), f"{tmp_path}/sealed/tenant=bolt/*")
    assert read_files(tmp_path / "opened") == {"0.csv": b"bolt:0\n", "1.csv": b"bolt:1\n"}
    name, _ = fails(
        DecryptFiles(f"{tmp_path}/no", key=allowed, context=ANY_CONTEXT), f"{tmp_path}/sealed/tenant=coil/*"
    )
    assert name == "WrongKeyError"
    kms.delete_alias(AliasName="alias/data-acme")
    with (
        pytest.raises(WrongKeyError),
        open_shard(
            f"{tmp_path}/sealed/tenant=acme/0.csv",
            key=AllowedKeys(["123456789012"], aliases=["data-*"]),
            context=ANY_CONTEXT,
        ),
    ):
        pass


def test_the_readers_refuse_what_is_no_path_of_theirs(tmp_path, tenants):  # noqa: F811
    with pytest.raises(ValueError, match="path_fields= fills templates"):
        DecryptFiles(f"{tmp_path}", key="aws-kms://alias/x", path_fields="{tenant}/*")
    with pytest.raises(FormatError, match="has no folder tenant="):
        ReadEncryptedParquet(f"{tmp_path}/a.parquet", **SETTINGS, validate=False)._read._settings.open("a/b")
