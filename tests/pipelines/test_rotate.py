"""pipelines/rotate.py: a Beam program that a runner takes."""

import json
import sys

import pytest
from apache_beam.io.filesystems import FileSystems
from apache_beam.runners.runner import PipelineState

from beam_envelope import LocalKms, open_shard
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.local import generate_local_key
from pipelines import rotate
from tests.running import encrypt, listing, with_manifest, write_files

IN_MEMORY = "--direct_running_mode=in_memory"


@pytest.fixture
def words(tmp_path, local_key, monkeypatch):
    """The command line to rotate two shards to the key `new`."""
    monkeypatch.setattr(FileSystems, "_pipeline_options", FileSystems._pipeline_options)
    generate_local_key(LocalKms(local_key.path, "new"))
    encrypt(write_files(tmp_path / "data", {"a": b"1", "sub/b": b"2"}), tmp_path / "sealed", local_key)
    clear_caches()
    return [f"{tmp_path}/sealed", "--from", str(local_key), "--to", f"{local_key}?name=new", IN_MEMORY]


def test_it_rotates_writes_the_log_and_returns_the_jobs_result(tmp_path, words, local_key):
    result = rotate.run([*words, "--log", f"{tmp_path}/log.jsonl"])
    assert result.wait_until_finish() == PipelineState.DONE
    with open_shard(tmp_path / "sealed/sub/b", key=f"{local_key}?name=new") as shard:
        assert shard.read() == b"2"
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["changed"] for row in rows] == [True, True, True]  # of two shards, and the manifest


def test_a_key_file_that_cannot_be_rotated_is_told_and_is_exit_status_1(tmp_path, words, monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["rotate", *words])
    assert rotate.main() == 0
    write_files(tmp_path / "sealed", {"_KEY_FOR_bad.json": b"{}"})
    assert rotate.main() == 1
    assert "_KEY_FOR_bad.json is not a readable key file" in caplog.text


def test_a_dry_run_changes_nothing(tmp_path, words):
    before = {path: path.read_bytes() for path in (tmp_path / "sealed").rglob("_*.json")}
    rotate.run([*words, "--dry-run"])
    assert {path: path.read_bytes() for path in before} == before


def test_an_earlier_log_is_kept(tmp_path, words):
    write_files(tmp_path, {"log.jsonl": b"of last year"})
    with pytest.raises(FileExistsError, match="the log exists, and is kept; name another"):
        rotate.run([*words, "--log", f"{tmp_path}/log.jsonl"])
    assert (tmp_path / "log.jsonl").read_bytes() == b"of last year"
    assert listing(tmp_path / "sealed") == with_manifest("a", "sub/b")


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        rotate.run(["--help"])
    assert ended.value.code == 0
    assert "python -m pipelines.rotate sealed/ --from" in capsys.readouterr().out
