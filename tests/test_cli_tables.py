"""The command with tables: encrypt --format=parquet, decrypt, inspect and cat."""

import json

import pyarrow as pa
import pytest
from apache_beam.io.filesystems import FileSystems

from beam_envelope import cli, open_parquet, table_arguments
from beam_envelope.testing import find_plaintext
from tests.formats.parquets import PEOPLE
from tests.running import listing, read_files, with_manifest, write_files
from tests.tables import read_table, read_tables, same, write_tables

CONTEXT = ("--context", "dataset=people")
TREE = {"dt=1/a.parquet": PEOPLE, "dt=2/b.parquet": PEOPLE.slice(5)}


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """Run the command in this process, in a folder that holds `people`: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FileSystems, "_pipeline_options", FileSystems._pipeline_options)
    write_tables("people", TREE)

    def run_words(*words):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as ended:
            status = ended.code
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return run_words


@pytest.fixture
def key(run):
    """A keyring with two keys."""
    run("keygen", "--key", "local-kms://keyring.json")
    run("keygen", "--key", "local-kms://keyring.json?name=pii")
    return "local-kms://keyring.json"


def test_a_dataset_round_trips(run, key, tmp_path):
    words = ("--output", "sealed", "--key", key, *CONTEXT, "--format=parquet")
    columns = ("--columns", f"ssn,address.zip={key}?name=pii")
    status, out, err = run("encrypt", "people/", *words, *columns)
    assert (status, out[:25]) == (0, "Encrypted 2 files, 15 row"), err
    assert "KMS calls: 3 GenerateDataKey, and 2 to check the key first." in out
    assert listing("sealed") == with_manifest(*TREE)
    assert find_plaintext(tmp_path / "sealed", b"123-45-00") == []
    with open_parquet("sealed/dt=1/a.parquet", key=key, context={"dataset": "people"}) as reader:
        assert [leaf for leaf, access in reader.columns.items() if access == "denied"] == ["ssn", "address.zip"]
    status, _, err = run("decrypt", "sealed/", "--output", "opened", "--key", key, *CONTEXT)
    assert status == 1
    assert "may not open these columns of sealed/dt=1/a.parquet: ssn, address.zip" in err
    assert listing("opened") == []
    both = ("--key", key, "--key", f"{key}?name=pii")
    status, out, err = run("decrypt", "sealed/", "--output", "opened", *both, *CONTEXT, "--json")
    assert status == 0, err
    assert json.loads(out)["rows"] == 15
    assert same(read_tables("people"), read_tables("opened"))
    status, _, _ = run(
        "decrypt", "sealed/", "--output", "some", "--key", key, *CONTEXT, "--columns=id,ssn", "--on-denied=null"
    )
    assert status == 0
    assert read_table("some/dt=1/a.parquet").column("ssn").null_count == 10


def test_cells_round_trip(run, key):
    cells = ("--cells", "--keys", "keys")
    words = ("--format=parquet", *cells, "--columns=ssn,id", "--deterministic", "ssn=person", "--key", key, *CONTEXT)
    status, _, err = run("encrypt", "people/", "--output", "sealed", *words)
    assert status == 0, err
    assert listing("sealed") == list(TREE)
    assert read_table("sealed/dt=1/a.parquet").column("ssn").type == pa.binary()
    words = ("--output", "opened", "--key", key, *CONTEXT, *cells)
    status, _, err = run("decrypt", "sealed/", *words)
    assert status == 1
    assert "it was encrypted under the scope 'person'" in err or "'person'" in err
    status, _, err = run("decrypt", "sealed/", *words, "--deterministic", "ssn=person")
    assert status == 0, err
    assert same(read_tables("people"), read_tables("opened"))


def test_a_folder_of_shards_and_tables_is_decrypted_in_one_job(run, key):
    write_files("people", {"note.txt": b"hello"})
    assert run("encrypt", "people/*/*", "--output", "sealed", "--key", key, *CONTEXT, "--format=parquet")[0] == 0
    assert run("encrypt", "people/note.txt", "--output", "sealed", "--key", key, *CONTEXT)[0] == 0
    status, _, err = run("decrypt", "sealed/", "--output", "opened", "--key", key, *CONTEXT)
    assert status == 0, err
    assert read_files("opened")["note.txt"] == b"hello"
    assert same(read_tables("people"), read_tables("opened"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--columns", "sn=local-kms://keyring.json?name=pii"), "people/dt=1/a.parquet: there is no column 'sn'"),
        (("--columns", "sn", "--cells", "--keys=keys"), "people/dt=1/a.parquet: there is no column 'sn'"),
        (("--columns", "ssn=alias/pii"), "--columns ssn=alias/pii: write NAME, or NAME=KEY with the URI of a key"),
        (("--columns", "ssn=kms://x"), "the key 'kms://x' does not start with a scheme that is known"),
        (("--split-lines=1MiB",), "--split-lines goes with --format=shard"),
        (("--cells", "--columns=ssn"), "cells need a key store: pass keys= (--keys)"),
        (("--column-type", "ssn"), "--column-type ssn: write NAME=TYPE, such as age=int64, each name once"),
    ],
)
def test_mistakes_stop_the_job_before_it_starts(run, key, words, message):
    status, _, err = run("encrypt", "people/", "--output", "sealed", "--key", key, "--format=parquet", *words)
    assert (status, message in err) == (1, True), err
    assert "ncrypting" not in err
    assert listing("sealed") == listing("keys") == []


def test_options_of_tables_are_refused_for_shards(run, key):
    for words in (("--columns=ssn",), ("--cells",), ("--csv-types=inferred",), ("--row-group-rows=9",)):
        status, _, err = run("encrypt", "people/", "--output", "sealed", "--key", key, *words)
        assert (status, f"{words[0].partition('=')[0]} goes with --format=parquet" in err) == (1, True), err
    status, _, err = run("encrypt", "people/", "--output", "sealed", "--key", key, "--compression=gzip")
    assert (status, "compression is one of none, zstd" in err) == (1, True)


def test_a_value_that_is_not_of_its_type_is_not_shown(run, key):
    write_files("people", {"c.csv": b"id,ssn\n1,123-45-6789\n"})
    words = ("--output", "sealed", "--key", key, "--format=parquet", "--column-type=ssn=int64")
    status, _, err = run("encrypt", "people/c.csv", *words)
    assert status == 1
    assert "people/c.csv, row 2: a value of the column 'ssn' is not of the type int64" in err
    assert "6789" not in err


def test_inspect_lists_encrypted_parquet_and_cat_refuses_it(run, key):
    words = ("--output", "sealed", "--key", key, *CONTEXT, "--format=parquet", "--columns", f"ssn={key}?name=pii")
    run("encrypt", "people/dt=1/", *words)
    status, out, _ = run("inspect", "sealed")
    assert status == 0
    first, second, summary = out.splitlines()[1:4]
    assert first.startswith("sealed/a.parquet")
    assert " Parquet " in first
    assert "columns: " in second
    assert "pii" in second
    assert "1 shard, " in summary
    assert summary.endswith("2 KMS keys.")
    (entry,) = json.loads(run("inspect", "sealed", "--json")[1])
    assert (entry["cipher"], entry["plaintext_bytes"], entry["problem"]) == ("parquet-aes-gcm-v1", None, "")
    assert ["pii" in name for (name,) in entry["column_kms_keys"]] == [True]
    status, out, err = run("cat", "sealed/a.parquet", "--key", key, *CONTEXT)
    assert (status, out) == (1, "")
    assert "sealed/a.parquet is encrypted Parquet, not a shard. Decrypt it with `beam-envelope decrypt`" in err


def test_skip_finishes_a_job(run, key):
    words = ("encrypt", "people/", "--output", "sealed", "--key", key, "--format=parquet", "--if-exists=skip")
    assert run(*words)[0] == 0
    (listing_before := read_files("sealed")).pop("dt=2/b.parquet")
    import os

    os.unlink("sealed/dt=2/b.parquet")
    _, out, _ = run(*words)
    assert out.startswith("Encrypted 1 file, 1 skipped, 5 rows")
    after = read_files("sealed")
    assert {name: after[name] for name in listing_before if "dt=1" in name} == {
        name: content for name, content in listing_before.items() if "dt=1" in name
    }


def test_columns_are_parsed_by_the_scheme_of_the_key():
    arn = "aws-kms://arn:aws:kms:eu-west-1:111122223333:key/a,b=c?region=eu-west-1"
    assert table_arguments.parse_columns(["id", "a,b.c=" + arn, "a=local-kms://k?name=x", "id"]) == {
        "id": None,
        "a": [arn, "local-kms://k?name=x"],
        "b.c": [arn],
    }
    for text in ("", "a,", "=aws-kms://x", "a=b", "a=b=aws-kms://x"):
        with pytest.raises(ValueError, match="write NAME, or NAME=KEY"):
            table_arguments.parse_columns([text])
