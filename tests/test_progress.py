"""The progress file: lines of counts from many workers to one launcher."""

import multiprocessing

import pytest

from beam_envelope.progress import PROGRESS_VARIABLE, ProgressFile, append_progress


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The launcher's file, empty."""
    file = tmp_path / "progress"
    file.touch()
    monkeypatch.setenv(PROGRESS_VARIABLE, str(file))
    return file


def test_counts_add_up_across_looks(path):
    reader = ProgressFile(path)
    assert reader.read() == {}
    append_progress({"files": 1, "bytes_plaintext": 10})
    assert reader.read() == {"files": 1, "bytes_plaintext": 10}
    append_progress({"bytes_plaintext": 5})
    append_progress({"bytes_plaintext": 6, "kms_Decrypt": 1})
    assert reader.read() == {"files": 1, "bytes_plaintext": 21, "kms_Decrypt": 1}
    assert reader.read() == {"files": 1, "bytes_plaintext": 21, "kms_Decrypt": 1}


def test_half_a_line_waits_for_its_other_half(path):
    reader = ProgressFile(path)
    path.write_text("files=1\nfiles=2")
    assert reader.read()["files"] == 1
    path.write_text("files=1\nfiles=23\n")
    assert reader.read()["files"] == 24


def test_nothing_is_written_where_nobody_reads(tmp_path, monkeypatch):
    monkeypatch.delenv(PROGRESS_VARIABLE, raising=False)
    append_progress({"files": 1})
    monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path / "gone"))
    append_progress({"files": 1})
    assert list(tmp_path.iterdir()) == []


def test_no_counts_are_no_line(path):
    append_progress({})
    assert path.read_bytes() == b""


def _append_often():
    for _ in range(200):
        append_progress({"files": 1, "bytes_plaintext": 1000})


def test_lines_of_workers_at_the_same_time_do_not_mix(path):
    workers = [multiprocessing.get_context("fork").Process(target=_append_often) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert ProgressFile(path).read() == {"files": 800, "bytes_plaintext": 800_000}
