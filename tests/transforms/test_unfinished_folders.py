"""What a stopped job leaves in a folder of its own: no reader takes it for data, and nobody is stopped by it."""

import json
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from beam_envelope import VerifyShards, WriteEncryptedText, cli
from beam_envelope.formats.keyfile import is_unfinished
from beam_envelope.inventory import Inventory
from tests.running import decrypt, encrypt, listing, read_files, run, write_files

LEFT = "_TMP_" + "0123456789abcdef" * 2
CONTENTS = {"a": b"alpha\n", "b": b"beta\n"}


def fail_at_the_end(line):
    if line == "99":
        raise ValueError("no more")
    return line


@pytest.fixture
def sealed(tmp_path, local_key):
    """A dataset beside which a job that was stopped left whole shards, key files, and a manifest."""
    data = write_files(tmp_path / "data", CONTENTS)
    encrypt(data, tmp_path / "sealed", local_key)
    encrypt(data, tmp_path / "sealed" / LEFT, local_key, manifest=False)
    Path(tmp_path, "sealed", LEFT, "_MANIFEST.json").write_bytes(b"{}")
    Path(tmp_path, "sealed", LEFT, "a").unlink()
    return tmp_path / "sealed"


def test_write_encrypted_text_leaves_unfinished_files_in_such_a_folder(tmp_path, local_key):
    pipeline = beam.Pipeline("FnApiRunner", options=PipelineOptions([]))
    lines = pipeline | beam.Create([str(number) for number in range(100)]) | beam.Map(fail_at_the_end)
    _ = lines | WriteEncryptedText(f"{tmp_path}/sealed/part", key=local_key)
    with pytest.raises(Exception, match="no more"):
        pipeline.run()
    below = [path for path in Path(tmp_path, "sealed").rglob("*") if not path.is_dir()]
    assert all(is_unfinished(str(path)) for path in below)
    (folder,) = Path(tmp_path, "sealed").iterdir()
    assert is_unfinished(f"{folder}/x")


def test_folders_of_other_names_are_looked_into():
    assert is_unfinished(f"{LEFT}/part")
    assert is_unfinished(f"s3://bucket/sealed/{LEFT}/sub/part")
    assert is_unfinished("sealed/_TMP_part")
    assert not is_unfinished(f"sealed/x{LEFT}/part")
    assert not is_unfinished("_TMP_mine/sealed/part")
    assert not is_unfinished(f"sealed/{LEFT}0/part")


@pytest.mark.parametrize("manifest", ["require", "use", "ignore"])
def test_a_folder_is_decrypted_without_it(sealed, tmp_path, local_key, manifest):
    decrypt(sealed, tmp_path / "opened", local_key, manifest=manifest)
    assert read_files(tmp_path / "opened") == CONTENTS


@pytest.mark.parametrize("manifest", ["require", "ignore"])
def test_verify_says_that_it_is_unfinished(sealed, local_key, manifest):
    rows = run(VerifyShards(key=local_key, manifest=manifest), f"{sealed}").results
    left = {f"{sealed}/{LEFT}/{name}" for name in ("_KEY_FOR_a.json", "_MANIFEST.json", "b")}
    assert all(row.ok for row in rows)
    assert {row.path for row in rows if row.kind == "unfinished"} == left


def test_the_manifest_command_does_not_list_it(sealed, local_key, capsys):
    assert cli.main(["manifest", str(sealed), "--key", str(local_key), "--add", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["listed"], said["not_listed"], said["added"]) == (2, [], 0)


def test_the_inventory_says_that_it_is_unfinished(sealed):
    entries = {entry.path: entry.kind for entry in Inventory([str(sealed)]).entries()}
    below = [name for name in listing(sealed) if name.startswith(LEFT)]
    assert [entries.pop(f"{sealed}/{name}") for name in below] == ["unfinished"] * 4
    assert sorted(entries.values()) == ["manifest", "shard", "shard"]


def test_shards_of_a_stopped_job_with_other_numbers_are_refused(tmp_path, local_key):
    """A job that is stopped just before it lists its shards, and run again with another number of them."""

    def write(lines, number, *, manifest):
        with beam.Pipeline("FnApiRunner", options=PipelineOptions([])) as pipeline:
            transform = WriteEncryptedText(f"{tmp_path}/part", key=local_key, num_shards=number, manifest=manifest)
            _ = pipeline | beam.Create(lines) | transform

    write(["1", "2", "3"], 3, manifest=False)
    write(["1", "2", "3"], 2, manifest=True)
    rows = run(VerifyShards(key=local_key, manifest="require"), f"{tmp_path}/part-*").results
    refused = {Path(row.path).name for row in rows if "is not listed by the manifest" in row.problem}
    assert refused == {f"part-0000{number}-of-00003" for number in range(3)}
