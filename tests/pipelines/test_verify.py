"""pipelines/verify.py: a Beam program that a runner takes."""

import json
import sys

import pytest
from apache_beam.io.filesystems import FileSystems
from apache_beam.runners.runner import PipelineState

from beam_envelope import jobs
from beam_envelope.keys.cache import clear_caches
from pipelines import verify
from tests.running import encrypt, read_files, write_files

IN_MEMORY = "--direct_running_mode=in_memory"


@pytest.fixture
def words(tmp_path, local_key, monkeypatch):
    """The command line to verify two shards."""
    monkeypatch.setattr(FileSystems, "_pipeline_options", FileSystems._pipeline_options)
    encrypt(write_files(tmp_path / "data", {"a": b"1", "sub/b": b"2"}), tmp_path / "sealed", local_key)
    clear_caches()
    return [f"{tmp_path}/sealed", "--key", str(local_key), IN_MEMORY]


def test_it_verifies_writes_the_log_and_returns_the_jobs_result(tmp_path, words):
    before = read_files(tmp_path / "sealed")
    result = verify.run([*words, "--log", f"{tmp_path}/log.jsonl"])
    assert result.wait_until_finish() == PipelineState.DONE
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sorted((row["path"], row["ok"], row["plaintext_bytes"]) for row in rows) == [
        (f"{tmp_path}/sealed/_MANIFEST.json", True, None),
        (f"{tmp_path}/sealed/a", True, 1),
        (f"{tmp_path}/sealed/sub/b", True, 1),
    ]
    assert read_files(tmp_path / "sealed") == before


def test_a_problem_is_told_and_is_exit_status_1(tmp_path, words, monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["verify", *words])
    assert verify.main() == 0
    assert "3 files were verified, and 0 have problems" in caplog.text
    write_files(tmp_path / "sealed", {"plain": b"1,2"})
    assert verify.main() == 1
    assert f"{tmp_path}/sealed/plain is not listed by the manifest" in caplog.text
    assert "4 files were verified, and 1 have problems" in caplog.text
    monkeypatch.setattr(sys, "argv", ["verify", *words, "--manifest=ignore"])
    assert verify.main() == 1
    assert f"{tmp_path}/sealed/plain is plain data" in caplog.text


def test_without_metrics_the_exit_status_comes_from_the_log(tmp_path, words, monkeypatch):
    monkeypatch.setattr(jobs, "counters", lambda _: {})
    monkeypatch.setattr(sys, "argv", ["verify", *words])
    with pytest.raises(jobs.EnvelopeError, match="the runner reports no metrics"):
        verify.main()
    monkeypatch.setattr(sys, "argv", ["verify", *words, "--log", f"{tmp_path}/1"])
    assert verify.main() == 0
    write_files(tmp_path / "sealed", {"plain": b"1,2"})
    monkeypatch.setattr(sys, "argv", ["verify", *words, "--log", f"{tmp_path}/2"])
    assert verify.main() == 1


def test_a_job_that_did_not_end_well_is_status_1(words, monkeypatch):
    class Result:
        state = PipelineState.FAILED

        def wait_until_finish(self):
            return None

    monkeypatch.setattr(sys, "argv", ["verify", *words])
    monkeypatch.setattr(verify, "run", Result)
    assert verify.main() == 1


def test_quick_is_passed_on(tmp_path, words):
    result = verify.run([*words, "--quick"])
    result.wait_until_finish()
    counters = jobs.counters(result)
    assert (counters["files"], counters.get("bytes_authenticated", 0)) == (3, 0)


def test_an_earlier_log_is_kept(tmp_path, words):
    write_files(tmp_path, {"log.jsonl": b"of last year"})
    with pytest.raises(FileExistsError, match="the log exists, and is kept; name another"):
        verify.run([*words, "--log", f"{tmp_path}/log.jsonl"])
    assert (tmp_path / "log.jsonl").read_bytes() == b"of last year"


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        verify.run(["--help"])
    assert ended.value.code == 0
    assert "python -m pipelines.verify sealed/ --key" in capsys.readouterr().out
