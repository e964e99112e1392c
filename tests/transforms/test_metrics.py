"""Counts: in Beam's metrics, and in the file that a launcher on the same machine reads."""

from collections import Counter

import pytest
from apache_beam.metrics import Metrics

from beam_envelope.keys.provider import kms_calls
from beam_envelope.progress import PROGRESS_VARIABLE
from beam_envelope.transforms import metrics
from beam_envelope.transforms.metrics import Progress


@pytest.fixture
def counted(monkeypatch):
    """What reached Beam's metrics: namespace and name to count."""
    counts = Counter()

    class Inc:
        def __init__(self, name):
            self.name = name

        def inc(self, n=1):
            counts[self.name] += n

    monkeypatch.setattr(Metrics, "counter", lambda namespace, name: Inc(f"{namespace}:{name}"))
    return counts


@pytest.fixture
def progress_file(tmp_path, monkeypatch):
    """The launcher's file, empty."""
    path = tmp_path / "progress"
    path.touch()
    monkeypatch.setenv(PROGRESS_VARIABLE, str(path))
    return path


def test_counts_are_added_up_and_leave_at_the_end(counted, progress_file):
    with Progress() as progress:
        progress.add("files")
        progress.add("bytes_plaintext", 5)
        progress.add("bytes_plaintext", 7)
        assert counted == {}
    assert counted == {"beam_envelope:files": 1, "beam_envelope:bytes_plaintext": 12}
    assert progress_file.read_text() == "files=1 bytes_plaintext=12\n"


def test_counts_leave_a_few_times_in_a_second_meanwhile(counted, progress_file, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    with Progress() as progress:
        for _ in range(10):
            now[0] += 0.0626
            progress.add("bytes_plaintext", 1)
    lines = progress_file.read_text().splitlines()
    assert lines == ["bytes_plaintext=4", "bytes_plaintext=4", "bytes_plaintext=2"]
    assert counted == {"beam_envelope:bytes_plaintext": 10}


def test_what_was_done_before_an_error_counts(counted):
    progress = Progress()
    progress.add("bytes_plaintext", 3)
    progress.__exit__(OSError, OSError("disk"), None)
    assert counted == {"beam_envelope:bytes_plaintext": 3}


def test_kms_calls_of_this_thread_since_the_start_count_once(counted):
    kms_calls.counts["Decrypt"] += 5  # of an earlier file
    with Progress():
        kms_calls.counts["Decrypt"] += 1
        kms_calls.counts["GenerateDataKey"] += 2
    with Progress():
        pass
    assert counted == {"beam_envelope:kms_Decrypt": 1, "beam_envelope:kms_GenerateDataKey": 2}


def test_a_kms_call_counts_once_where_the_steps_of_a_pipeline_share_a_thread(counted):
    kms_calls.counts["Decrypt"] += 5
    first, second = Progress(), Progress()
    kms_calls.counts["Decrypt"] += 1
    with first:
        pass
    kms_calls.counts["Decrypt"] += 2
    third = Progress()
    for progress in (second, third):
        with progress:
            pass
    assert counted == {"beam_envelope:kms_Decrypt": 3}


def test_the_progress_of_a_bundle_that_failed_does_not_stay_open(counted):
    failed = Progress()
    del failed
    kms_calls.counts["Decrypt"] += 1
    with Progress():
        pass
    assert counted == {}


def test_counts_that_were_set_back_count_on(counted):
    kms_calls.counts["Decrypt"] += 5
    left_open = Progress()
    kms_calls.counts.clear()
    with Progress():
        kms_calls.counts["Decrypt"] += 2
    assert counted == {"beam_envelope:kms_Decrypt": 2}
    left_open.drop()


def test_without_a_launcher_only_beam_is_told(counted, monkeypatch, tmp_path):
    monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path / "gone"))
    with Progress() as progress:
        progress.add("files")
    assert counted == {"beam_envelope:files": 1}
    assert list(tmp_path.iterdir()) == []
