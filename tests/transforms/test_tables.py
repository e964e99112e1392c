"""EncryptTables and DecryptTables: rows, types and metadata come back, and what cannot is a clear error."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import apache_beam as beam
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.transforms.display import DisplayData
from apache_beam.transforms.error_handling import CollectingErrorHandler

from beam_envelope import (
    ANY_CONTEXT,
    DataKeyPolicy,
    DecryptTables,
    EncryptedTable,
    EncryptTables,
    FailedFile,
    create_shard,
    open_parquet,
)
from beam_envelope.formats.keyfile import KeyFile, key_file_name
from beam_envelope.io.store import LocalStore
from beam_envelope.testing import find_plaintext
from beam_envelope.transforms import table_encrypt
from tests.formats.parquets import PEOPLE
from tests.running import fails, listing, with_manifest, write_files
from tests.tables import (
    CONTEXT,
    decrypt_tables,
    encrypt_tables,
    new_key,
    random_table,
    read_table,
    read_tables,
    same,
    write_tables,
)

PANDAS = pa.Table.from_pandas(
    pd.DataFrame({"n": [1, 2], "c": pd.Categorical(["x", "y"])}, index=pd.Index([5, 7], name="i"))
)
TREE = {
    "dt=2026-01-01/a.parquet": PEOPLE,
    "dt=2026-01-02/a.parquet": PEOPLE.slice(3),
    "dt=2026-01-02/b.parquet": PANDAS,
}
CANARY = "CANARY-7f3a-4111111111111111"


@pytest.fixture
def data(tmp_path):
    """A dataset in partition folders."""
    return write_tables(tmp_path / "data", TREE, row_group_size=4, compression="zstd")


@pytest.fixture
def pii(tmp_path):
    """A second KMS key."""
    return new_key(tmp_path / "pii" / "keyring.json")


# ---------------------------------------------------------------------------------------------- round trips


def test_a_dataset_comes_back_with_its_folders_types_and_metadata(tmp_path, data, local_key):
    encrypted, counters = encrypt_tables(data, tmp_path / "sealed", local_key)
    assert listing(tmp_path / "sealed") == with_manifest(*TREE)
    decrypted, _ = decrypt_tables(tmp_path / "sealed", tmp_path / "opened", local_key)
    assert same(read_tables(data), read_tables(tmp_path / "opened"))
    assert read_tables(tmp_path / "opened")["dt=2026-01-02/b.parquet"].to_pandas().index.name == "i"
    assert [result.rows for result in encrypted] == [result.rows for result in decrypted] == [10, 7, 2]
    assert counters["rows"] == 19
    assert counters["files"] == 3
    assert counters["kms_GenerateDataKey"] == 2  # for the files, and for the manifest
    assert counters["bytes_plaintext"] == sum(path.stat().st_size for path in data.rglob("*.parquet"))
    assert counters["bytes_ciphertext"] == sum(result.ciphertext_bytes for result in encrypted)
    assert all(result.ciphertext_bytes == Path(result.table).stat().st_size for result in encrypted)


def test_row_groups_and_codecs_are_kept(tmp_path, local_key):
    data = tmp_path / "data"
    codecs = {"id": "ZSTD", "text": "GZIP"}
    write_tables(data, {"a.parquet": random_table(1000), "none.parquet": random_table(0)}, row_group_size=300)
    write_tables(data, {"c.parquet": random_table(10)}, compression=codecs)
    encrypt_tables(data, tmp_path / "sealed", local_key)
    with open_parquet(tmp_path / "sealed/a.parquet", key=local_key, context=CONTEXT) as reader:
        assert [reader.read_row_group(number).num_rows for number in range(4)] == [300, 300, 300, 100]
    with open_parquet(tmp_path / "sealed/c.parquet", key=local_key, context=CONTEXT) as reader:
        group = reader._file.metadata.row_group(0)
        assert {group.column(number).path_in_schema: group.column(number).compression for number in range(2)} == codecs
    decrypt_tables(tmp_path / "sealed", tmp_path / "opened", local_key)
    metadata = pq.read_metadata(tmp_path / "opened/a.parquet")
    assert [metadata.row_group(number).num_rows for number in range(4)] == [300, 300, 300, 100]
    assert same(read_tables(data), read_tables(tmp_path / "opened"))


def test_row_groups_and_codecs_can_be_chosen(tmp_path, data, local_key):
    encrypt_tables(data, tmp_path / "sealed", local_key, row_group_rows=6, compression="none")
    decrypt_tables(tmp_path / "sealed", tmp_path / "opened", local_key, row_group_rows=5, compression="gzip")
    with open_parquet(tmp_path / "sealed/dt=2026-01-01/a.parquet", key=local_key, context=CONTEXT) as reader:
        assert reader.num_row_groups == 2
    metadata = pq.read_metadata(tmp_path / "opened/dt=2026-01-01/a.parquet")
    assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == [5, 5]
    assert metadata.row_group(0).column(0).compression == "GZIP"


def test_csv_and_json_become_parquet(tmp_path, local_key):
    files = {
        "day=1/a.csv": b"zip,n\n007,1\n",
        "day=1/b.jsonl": b'{"n":1}\n{"n":2.5,"s":"x"}\n',
        "_SUCCESS": b"",
        ".a.csv.crc": b"x",
        "_temporary/0/c.csv": b"half",
    }
    data = write_files(tmp_path / "data", files)
    results, _ = encrypt_tables(data, tmp_path / "sealed", local_key, column_types=None)
    assert [Path(result.table).name for result in results] == ["a.parquet", "b.parquet"]
    decrypt_tables(tmp_path / "sealed", tmp_path / "opened", local_key)
    opened = read_tables(tmp_path / "opened")
    assert opened["day=1/a.parquet"].to_pylist() == [{"zip": "007", "n": "1"}]
    assert opened["day=1/b.parquet"].to_pylist() == [{"n": 1.0, "s": None}, {"n": 2.5, "s": "x"}]


def test_csv_types_are_those_that_are_asked_for(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a.csv": b"zip,n,at\n007,1,2026-01-01T00:00:00Z\n"})
    columns = {"zip": "string", "at": "timestamp[us, UTC]"}
    encrypt_tables(data, tmp_path / "sealed", local_key, csv_types="inferred", column_types=columns)
    decrypt_tables(tmp_path / "sealed", tmp_path / "opened", local_key)
    assert read_table(tmp_path / "opened/a.parquet").schema.types == [
        pa.string(), pa.int64(), pa.timestamp("us", "UTC"),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- keys


def test_a_reader_with_one_of_two_keys_reads_the_other_columns(tmp_path, data, local_key, pii):
    source, columns = data / "dt=2026-01-01", {"ssn": pii, "address.zip": [pii], "name": None}
    (result,), counters = encrypt_tables(source, tmp_path / "sealed", local_key, columns=columns)
    assert counters["kms_GenerateDataKey"] == 3  # of the footer, of the columns, and of the manifest
    assert len(KeyFile.from_bytes(Path(result.key_file).read_bytes(), "").data_keys) == 2
    sealed, opened = tmp_path / "sealed", tmp_path / "opened"
    name, message = fails(DecryptTables(str(opened), key=local_key, context=CONTEXT), str(sealed))
    assert name == "WrongKeyError"
    assert "may not open these columns" in message
    assert "ssn, address.zip" in message
    assert listing(opened) == []
    decrypt_tables(sealed, tmp_path / "null", local_key, on_denied="null")
    nulls = read_table(tmp_path / "null/a.parquet")
    assert nulls.column("ssn").null_count == 10
    assert nulls.drop_columns(["ssn", "address"]).equals(PEOPLE.drop_columns(["ssn", "address"]))
    decrypt_tables(sealed, tmp_path / "drop", local_key, on_denied="drop", columns=["id", "ssn"])
    assert read_table(tmp_path / "drop/a.parquet").schema.names == ["id"]
    decrypt_tables(sealed, opened, [local_key, pii])
    assert same({"": read_table(data / "dt=2026-01-01/a.parquet")}, {"": read_table(opened / "a.parquet")})


def test_any_of_several_keys_opens_the_files(tmp_path, data, local_key, pii):
    encrypt_tables(data, tmp_path / "sealed", [local_key, pii])
    decrypt_tables(tmp_path / "sealed", tmp_path / "opened", pii)
    assert same(read_tables(data), read_tables(tmp_path / "opened"))


def test_the_bundles_files_share_data_keys_but_not_their_own(tmp_path, data, fake_kms):
    fake_kms.create_key("etl")
    fake_kms.create_key("pii")
    keys = {"key": "aws-kms://alias/etl", "columns": {"n": "aws-kms://alias/pii"}}
    results, counters = encrypt_tables(data / "dt=2026-01-02/b*", tmp_path / "sealed", **keys)
    write_tables(data, {"x/c.parquet": PANDAS, "x/d.parquet": PANDAS})
    results, counters = encrypt_tables(data / "x", tmp_path / "sealed", **keys)
    assert fake_kms.calls["GenerateDataKey"] == 6
    assert counters["kms_GenerateDataKey"] == 3  # for footers, for columns, and for the manifest
    assert len({result.key_id for result in results}) == 1
    assert len({Path(result.table).read_bytes() for result in results}) == 2
    decrypt_tables(tmp_path / "sealed", tmp_path / "opened", ["aws-kms://alias/etl", "aws-kms://alias/pii"])
    assert fake_kms.calls["Decrypt"] == 6  # one for each data key of two bundles, and for each section


def test_a_policy_limits_what_is_under_one_data_key(tmp_path, data, local_key):
    results, counters = encrypt_tables(data, tmp_path / "sealed", local_key, policy=DataKeyPolicy(max_records=1))
    assert counters["kms_GenerateDataKey"] == 3 + 1  # the manifest's
    assert len({result.key_id for result in results}) == 3


def test_another_context_does_not_open_it(tmp_path, data, local_key):
    encrypt_tables(data, tmp_path / "sealed", local_key)
    transform = DecryptTables(f"{tmp_path}/opened", key=local_key, context={"dataset": "other"})
    assert fails(transform, f"{tmp_path}/sealed")[0] == "ContextMismatchError"
    decrypt_tables(tmp_path / "sealed", tmp_path / "opened", local_key, context=ANY_CONTEXT)
    assert listing(tmp_path / "opened") == sorted(TREE)


# ---------------------------------------------------------------------------------------------------- cells


def test_cells_come_back_and_plain_pyarrow_reads_the_rest(tmp_path, data, local_key):
    settings = {"cells": True, "keys": f"{tmp_path}/keys"}
    columns = ["id", "ssn", "address.zip", "tags", "money", "colour"]
    source = data / "dt=2026-01-01"
    (result,), counters = encrypt_tables(
        source, tmp_path / "sealed", local_key, columns=columns, deterministic={"ssn": "person"}, **settings
    )
    assert (result.key_file, result.key_id) == ("", "")
    assert listing(tmp_path / "sealed") == ["a.parquet"]
    sealed = read_table(tmp_path / "sealed/a.parquet")
    assert sealed.column("ssn").type == sealed.column("id").type == pa.binary()
    assert sealed.select(["name", "at", "visits"]).equals(PEOPLE.select(["name", "at", "visits"]))
    assert counters["cells_encrypted"] > 40
    _, counters = decrypt_tables(
        tmp_path / "sealed", tmp_path / "opened", local_key, deterministic={"ssn": "person"}, **settings
    )
    assert same({"": read_table(source / "a.parquet")}, {"": read_table(tmp_path / "opened/a.parquet")})
    metadata = pq.read_metadata(tmp_path / "opened/a.parquet")
    assert metadata.num_row_groups == 3
    assert {metadata.row_group(0).column(number).compression for number in range(17)} == {"ZSTD"}
    assert counters["cells_decrypted"] > 40


def test_deterministic_cells_are_equal_across_files_and_bundles(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a.csv": b"m,n\nx,1\n", "b.csv": b"m,n\nx,2\n"})
    settings = {"cells": True, "keys": f"{tmp_path}/keys", "columns": ["m", "n"], "deterministic": ["m"]}
    for name in ("a", "b"):
        encrypt_tables(data / f"{name}.csv", tmp_path / "sealed", local_key, **settings)
    cells = [read_table(tmp_path / f"sealed/{name}.parquet").to_pylist()[0] for name in ("a", "b")]
    assert cells[0]["m"] == cells[1]["m"]
    assert cells[0]["n"] != cells[1]["n"]


def test_raw_cells_have_their_key_ids_beside_them(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a.csv": b"m,n\nx,1\ny,2\n"})
    settings = {"cells": True, "keys": f"{tmp_path}/keys"}
    encrypt_tables(data, tmp_path / "sealed", local_key, columns=["m"], layout="raw", **settings)
    assert read_table(tmp_path / "sealed/a.parquet").schema.names == ["m", "m_key_id", "n"]
    decrypt_tables(tmp_path / "sealed", tmp_path / "opened", local_key, **settings)
    assert read_table(tmp_path / "opened/a.parquet").to_pylist() == [{"m": "x", "n": "1"}, {"m": "y", "n": "2"}]


def test_cells_whose_metadata_other_software_dropped_are_found_by_name(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a.csv": b"m,n\nx,1\n"})
    settings = {"cells": True, "keys": f"{tmp_path}/keys"}
    encrypt_tables(data, tmp_path / "sealed", local_key, columns=["m"], **settings)
    table = read_table(tmp_path / "sealed/a.parquet")
    write_tables(tmp_path / "sealed", {"a.parquet": table.cast(pa.schema([("m", pa.binary()), ("n", pa.string())]))})
    transform = DecryptTables(f"{tmp_path}/opened", key=local_key, context=CONTEXT, **settings)
    name, message = fails(transform, f"{tmp_path}/sealed")
    assert name == "NotEncryptedError"
    assert "has no encrypted cells that say so in their metadata" in message
    decrypt_tables(tmp_path / "sealed", tmp_path / "opened", local_key, columns=["m"], **settings)
    assert read_table(tmp_path / "opened/a.parquet").to_pylist() == [{"m": "x", "n": "1"}]


# ------------------------------------------------------------------------------------------ refusals, errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"csv_types": "int"}, "csv_types is one of text, inferred, not 'int'"),
        ({"column_types": {"a": "int"}}, "'int' is no type"),
        ({"compression": "lzma"}, "compression is one of none, snappy, zstd, gzip, lz4, brotli, not 'lzma'"),
        ({"row_group_rows": 0}, "row_group_rows is above 0, not 0"),
        ({"if_exists": "maybe"}, "if_exists is one of error, skip, overwrite"),
        ({"keys": "k"}, r"keys= \(--keys\) goes with cells=True"),
        ({"deterministic": ["a"]}, r"deterministic= \(--deterministic\) goes with cells=True"),
        ({"layout": "raw"}, r"layout= \(--layout\) goes with cells=True"),
        ({"cells": True, "columns": ["a"]}, "cells need a key store"),
        ({"cells": True, "keys": "k"}, "cells need columns="),
        ({"cells": True, "keys": "k", "columns": {"a": "aws-kms://alias/x"}}, "give 'a' no key of its own"),
        ({"cells": True, "keys": "k", "columns": ["a"], "deterministic": ["b"]}, "'b' is to be deterministic, but"),
        ({"cells": True, "keys": "k", "columns": ["a"], "layout": "rare"}, "layout is 'compact' or 'raw'"),
        (
            {"cells": True, "keys": "k", "columns": ["a"], "layout": "raw", "deterministic": ["a"]},
            "raw cells are not deterministic",
        ),
    ],
)
def test_settings_that_do_not_go_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EncryptTables("out", key="aws-kms://alias/etl", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_denied": "skip"}, "on_denied is 'error', 'null' or 'drop', not 'skip'"),
        ({"keys": "k"}, r"keys= \(--keys\) goes with cells=True"),
        ({"cells": True}, "cells need their key store"),
        ({"cells": True, "keys": "k", "on_denied": "null"}, "on_denied is for the columns of encrypted Parquet"),
    ],
)
def test_settings_of_a_reader_that_do_not_go_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DecryptTables("out", key="aws-kms://alias/etl", **settings)


def test_one_text_is_no_list_of_columns():
    for settings in ({"columns": "ssn"}, {"cells": True, "keys": "k", "columns": ["a"], "deterministic": "a"}):
        with pytest.raises(TypeError, match=r"give \['"):
            EncryptTables("out", key="aws-kms://alias/etl", **settings)


def test_what_is_encrypted_already_is_refused(tmp_path, data, local_key):
    encrypt_tables(data, tmp_path / "sealed", local_key)
    again = EncryptTables(f"{tmp_path}/again", key=local_key)
    name, message = fails(again, f"{tmp_path}/sealed/**.parquet")
    assert name == "AlreadyEncryptedError"
    assert "a key file lies beside it" in message
    for key_file in (tmp_path / "sealed").rglob("_KEY_FOR_*"):
        key_file.unlink()
    name, message = fails(again, f"{tmp_path}/sealed/**.parquet")
    assert name == "AlreadyEncryptedError"
    assert "is encrypted Parquet already" in message
    settings = {"cells": True, "keys": f"{tmp_path}/keys", "columns": ["n"]}
    encrypt_tables(data / "dt=2026-01-02/b*", tmp_path / "cells", local_key, **settings)
    assert fails(EncryptTables(f"{tmp_path}/again", key=local_key, **settings), f"{tmp_path}/cells") == (
        "AlreadyEncryptedError",
        "the column 'n' is encrypted already. Decrypt it first, or leave it out",
    )
    assert listing(tmp_path / "again") == []


def test_two_files_that_would_become_one_are_refused(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a.csv": b"a\n1\n", "a.jsonl": b'{"a":1}\n'})
    _, message = fails(EncryptTables(f"{tmp_path}/sealed", key=local_key), f"{data}/*")
    assert f"{data}/a.csv and {data}/a.jsonl would both become {tmp_path}/sealed/a.parquet" in message


def test_a_folder_without_tables_and_files_that_are_none_are_refused(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"_SUCCESS": b""})
    transform = EncryptTables(f"{tmp_path}/sealed", key=local_key)
    assert "only files that belong to no dataset match" in fails(transform, str(data))[1]
    write_files(data, {"a.txt": b"x"})
    assert "a.txt is no table" in fails(transform, str(data))[1]


def test_a_column_that_is_not_there_is_refused_and_named(tmp_path, data, local_key, pii):
    source = f"{data}/dt=2026-01-01"
    sealed = f"{tmp_path}/sealed"
    for settings in ({"columns": {"sn": pii}}, {"columns": ["sn"], "cells": True, "keys": f"{tmp_path}/keys"}):
        name, message = fails(EncryptTables(sealed, key=local_key, **settings), source)
        assert name == "FormatError"
        assert message.startswith(f"{source}/a.parquet: there is no column 'sn'")
    encrypt_tables(source, sealed, local_key)
    _, message = fails(DecryptTables(f"{tmp_path}/opened", key=local_key, context=CONTEXT, columns=["sn"]), sealed)
    assert "there is no column 'sn'" in message


def test_what_concerns_one_file_goes_to_the_error_handler(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a.csv": b"a\n1\n", "b.csv": b"a,b\n" + CANARY.encode(), "c.parquet": b"x"})
    failed = []
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        with CollectingErrorHandler() as handler:
            transform = EncryptTables(f"{tmp_path}/sealed", key=local_key).with_error_handler(handler)
            _ = pipeline | beam.Create([str(data)]) | transform
        _ = handler.output() | beam.Map(tuple) | beam.Map(_note, f"{tmp_path}/failed")
    failed = sorted(FailedFile(*json.loads(line)) for line in (tmp_path / "failed").read_text().splitlines())
    assert [(Path(file.source).name, file.error) for file in failed] == [
        ("b.csv", "FormatError"), ("c.parquet", "FormatError"),
    ]  # fmt: skip
    assert CANARY not in str(failed)
    assert listing(tmp_path / "sealed") == with_manifest("a.parquet")


def _note(element, path):
    with open(path, "a") as stream:
        stream.write(json.dumps(element) + "\n")


def test_the_kms_is_never_dead_lettered(tmp_path, data, fake_kms):
    fake_kms.create_key("etl")
    fake_kms.deny("GenerateDataKey", "alias/etl")
    pipeline = beam.Pipeline(runner="FnApiRunner")
    with CollectingErrorHandler() as handler:
        transform = EncryptTables(f"{tmp_path}/sealed", key="aws-kms://alias/etl").with_error_handler(handler)
        _ = pipeline | beam.Create([str(data)]) | transform
    _ = handler.output() | beam.Map(_note, f"{tmp_path}/failed")
    with pytest.raises(Exception, match="kms:GenerateDataKey"):
        pipeline.run()
    assert listing(tmp_path / "sealed") == []


def test_a_file_that_lost_its_key_file_or_is_a_shard_is_refused(tmp_path, data, local_key):
    encrypt_tables(data, tmp_path / "sealed", local_key)
    (tmp_path / "sealed/dt=2026-01-01" / key_file_name("a.parquet")).unlink()
    transform = DecryptTables(f"{tmp_path}/opened", key=local_key, context=CONTEXT)
    assert fails(transform, f"{tmp_path}/sealed/dt=2026-01-01/")[0] == "KeyFileMissingError"
    with create_shard(tmp_path / "shard.parquet", key=local_key, context=CONTEXT) as shard:
        shard.write(b"x")
    assert fails(transform, f"{tmp_path}/shard.parquet")[0] == "FormatError"
    assert listing(tmp_path / "opened") == []


# --------------------------------------------------------------------------------------------------- skip


def test_skip_leaves_alone_what_is_whole_and_does_the_rest(tmp_path, data, local_key):
    sealed, opened = tmp_path / "sealed", tmp_path / "opened"
    encrypt_tables(data, sealed, local_key)
    (sealed / "dt=2026-01-01" / key_file_name("a.parquet")).unlink()
    with (sealed / "dt=2026-01-02/a.parquet").open("r+b") as stream:
        stream.truncate(1000)
    results, counters = encrypt_tables(data, sealed, local_key, if_exists="skip")
    assert [(result.skipped, result.rows) for result in results] == [(False, 10), (False, 7), (True, None)]
    assert (counters["files"], counters["files_skipped"]) == (2, 1)
    decrypt_tables(sealed, opened, local_key)
    write_tables(opened, {"dt=2026-01-01/a.parquet": PEOPLE.slice(1)})
    results, counters = decrypt_tables(sealed, opened, local_key, if_exists="skip")
    assert [result.skipped for result in results] == [False, True, True]
    assert same(read_tables(data), read_tables(opened))
    before = (sealed / "_MANIFEST.json").read_bytes()
    encrypt_tables(data / "dt=2026-01-01/", sealed / "dt=2026-01-01", local_key, if_exists="overwrite")
    (sealed / "_MANIFEST.json").write_bytes(before)  # as if that job had been killed before its end
    results, _ = encrypt_tables(data, sealed, local_key, if_exists="skip")
    assert [result.skipped for result in results] == [False, True, True]
    decrypt_tables(sealed, opened, local_key, if_exists="overwrite")


def test_skip_refuses_the_files_of_another_dataset_and_redoes_those_of_other_columns(tmp_path, data, local_key, pii):
    source = f"{data}/dt=2026-01-01"
    encrypt_tables(source, tmp_path / "sealed", local_key)
    other = EncryptTables(f"{tmp_path}/sealed", key=local_key, context={"dataset": "other"}, if_exists="skip")
    assert fails(other, source)[0] == "ContextMismatchError"
    (result,), _ = encrypt_tables(source, tmp_path / "sealed", local_key, columns={"ssn": pii}, if_exists="skip")
    assert not result.skipped


def test_skip_knows_cells(tmp_path, data, local_key):
    settings = {"cells": True, "keys": f"{tmp_path}/keys"}
    source, sealed = data / "dt=2026-01-02/b*", tmp_path / "sealed"
    encrypt_tables(source, sealed, local_key, columns=["n"], **settings)
    (result,), _ = encrypt_tables(source, sealed, local_key, columns=["n"], if_exists="skip", **settings)
    assert result.skipped
    (result,), _ = encrypt_tables(source, sealed, local_key, columns=["n", "c"], if_exists="skip", **settings)
    assert not result.skipped


def test_error_is_what_becomes_of_an_output_that_exists(tmp_path, data, local_key):
    encrypt_tables(data, tmp_path / "sealed", local_key)
    _, message = fails(EncryptTables(f"{tmp_path}/sealed", key=local_key), str(data))
    assert "the output exists (3 of 3 do)" in message


# ------------------------------------------------------------------------------------------ what gets out


@pytest.mark.parametrize("cells", [False, True])
def test_no_plaintext_is_in_the_output_or_in_temporary_files(tmp_path, local_key, monkeypatch, cells):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    table = pa.table({"a": [CANARY] * 1000, "b": [f"{CANARY}{number}" for number in range(1000)]})
    data = write_tables(tmp_path / "data", {"a.parquet": table}, compression="none", use_dictionary=False)
    write_files(data, {"b.csv": b"a,b\n" + f"{CANARY},{CANARY}\n".encode() * 9})
    settings = {"cells": True, "keys": f"{tmp_path}/keys", "columns": ["a", "b"]} if cells else {}
    encrypt_tables(data, tmp_path / "sealed", local_key, compression="none", **settings)
    assert find_plaintext(data, CANARY.encode()) == [data / "a.parquet", data / "b.csv"]
    folders = [tmp_path / "sealed", tmp_path / "keys", scratch]
    assert find_plaintext([folder for folder in folders if folder.exists()], CANARY.encode()) == []


def test_a_failure_midway_leaves_nothing(tmp_path, local_key, monkeypatch):
    data = write_tables(tmp_path / "data", {"a.parquet": random_table(1000)}, row_group_size=100)
    groups = iter(range(3))

    def fail(self, table, values, progress):
        if next(groups, None) is None:
            raise OSError(28, "No space left on device")
        return table

    monkeypatch.setattr(table_encrypt.EncryptParquetDoFn, "seal", fail)
    name, message = fails(EncryptTables(f"{tmp_path}/sealed", key=local_key), str(data))
    assert "No space left on device" in message, name
    assert listing(tmp_path / "sealed") == []


def test_display_data_shows_no_values_of_the_context(data):
    keys = {"key": "aws-kms://alias/etl", "context": {"dataset": "hidden"}}
    shown = DisplayData.create_from(EncryptTables("out", columns={"ssn": "aws-kms://alias/pii"}, **keys)).items
    values = {item.key: item.value for item in shown}
    assert values == {
        "output": "out/",
        "if_exists": "error",
        "key": "aws-kms://alias/etl",
        "columns": "ssn",
        "context": "dataset",
    }
    for transform in (
        EncryptTables("out", cells=True, keys="k", columns=["ssn"], **keys),
        DecryptTables("out", **keys),
        DecryptTables("out", cells=True, keys="k", **keys),
    ):
        assert "hidden" not in str(DisplayData.create_from(transform).items)


def test_results_have_types_that_other_steps_can_use(tmp_path, data, local_key):
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        results = pipeline | beam.Create([str(data)]) | EncryptTables(f"{tmp_path}/sealed", key=local_key)
        assert results.element_type == EncryptedTable
        _ = results | beam.Map(lambda result: result.rows)


# ----------------------------------------------------------------------------------------------- S3, memory


def test_tables_on_s3(moto_server, tmp_path, local_key):
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="lake")
    pq.write_table(PEOPLE, tmp_path / "a.parquet", row_group_size=4)
    client.upload_file(str(tmp_path / "a.parquet"), "lake", "raw/dt=1/a.parquet")
    client.put_object(Bucket="lake", Key="raw/dt=1/b.csv", Body=b"a,b\n1,2\n")
    client.put_object(Bucket="lake", Key="raw/dt=1/c.jsonl", Body=b'{"a":1}\n')
    client.put_object(Bucket="lake", Key="raw/_SUCCESS", Body=b"")
    encrypt_tables("s3://lake/raw/**", "s3://lake/sealed/", local_key)
    names = {item["Key"] for item in client.list_objects_v2(Bucket="lake", Prefix="sealed/")["Contents"]}
    assert names == {f"sealed/{name}" for name in with_manifest("dt=1/a.parquet", "dt=1/b.parquet", "dt=1/c.parquet")}
    decrypt_tables("s3://lake/sealed/**", tmp_path / "opened", local_key)
    assert read_table(tmp_path / "opened/dt=1/a.parquet").equals(PEOPLE)
    assert read_table(tmp_path / "opened/dt=1/b.parquet").to_pylist() == [{"a": "1", "b": "2"}]
    assert read_table(tmp_path / "opened/dt=1/c.parquet").to_pylist() == [{"a": 1}]
    cells = {"cells": True, "keys": "s3://lake/keys/"}
    encrypt_tables("s3://lake/raw/dt=1/b.csv", "s3://lake/cells/", local_key, columns=["a"], **cells)
    decrypt_tables("s3://lake/cells/**", tmp_path / "opened2", local_key, **cells)
    assert read_table(tmp_path / "opened2/b.parquet").to_pylist() == [{"a": "1", "b": "2"}]


_PEAK = """
import resource, sys
from beam_envelope.transforms.plan import Task
from beam_envelope.transforms.metrics import Progress
from beam_envelope import EncryptTables, DecryptTables
source, target, opened, key, size = sys.argv[1:]
for transform, task in (
    (EncryptTables("x", key=key), Task(source, int(size), target, 0, int(size))),
    (DecryptTables("x", key=key), Task(target, int(size), opened, 0, int(size))),
):
    transform.work.start_bundle()
    transform.work.do(task, Progress())
    transform.work.finish_bundle()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, local_key, kind):
    peaks = []
    for rows in (1_000, 1_500_000):
        path = tmp_path / f"{rows}.{kind}"
        if kind == "parquet":
            with pq.ParquetWriter(path, random_table(1).schema) as writer:
                for start in range(0, rows, 100_000):
                    writer.write_table(random_table(min(100_000, rows - start), start))
        else:
            line = b"%s,%s\n" if kind == "csv" else b'{"a":"%s","b":"%s"}\n'
            with path.open("wb") as stream:
                if kind == "csv":
                    stream.write(b"a,b\n")
                for _ in range(rows // 1000):
                    stream.write(b"".join(line % (os.urandom(4).hex().encode(), b"x" * 90) for _ in range(1000)))
        words = [path, tmp_path / f"{rows}-sealed.parquet", tmp_path / f"{rows}-open.parquet", local_key]
        program = [sys.executable, "-c", _PEAK, *map(str, words), str(path.stat().st_size)]
        peaks.append(int(subprocess.run(program, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] - peaks[0] < 250, peaks
    assert LocalStore().size(f"{tmp_path}/1500000.{kind}") > 120e6 or kind == "parquet"
