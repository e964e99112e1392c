"""What a person sees: messages without tracebacks, and progress on stderr."""

import os
import pty
import re
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from beam_envelope import KeyAccessError, console
from beam_envelope.console import JobProgress, describe, quiet_workers
from beam_envelope.progress import PROGRESS_VARIABLE, append_progress
from tests.running import write_files

TRACEBACK = """\
Traceback (most recent call last):
  File "apache_beam/runners/common.py", line 1512, in apache_beam.runners.common.DoFnRunner.process
  File "/x/files.py", line 10, in do
    raise TamperedError(msg)
{first}: sealed/a.csv was changed: chunk 3 does not authenticate. Restore it from a copy

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/x/sdk_worker.py", line 300, in _execute
{last}: sealed/a.csv was changed: chunk 3 does not authenticate. Restore it from a copy [while running 'Decrypt']
"""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyAccessError("there is no keyring"), "there is no keyring"),
        (FileNotFoundError(2, "no file matches", "data/*"), "data/*: no file matches"),
        (OSError(28, "No space left on device", "sealed/a"), "sealed/a: the disk is full"),
        (OSError("no name at all"), "no name at all"),
        (
            RuntimeError("PermissionError: [Errno 13] Permission denied: 'a' [while running 'Encrypt/ParDo(X)']"),
            "Permission denied: 'a'",
        ),
        (
            RuntimeError(TRACEBACK.format(first="TamperedError", last="RuntimeError")),
            "sealed/a.csv was changed: chunk 3 does not authenticate. Restore it from a copy",
        ),
        (
            RuntimeError(TRACEBACK.format(first="x", last="beam_envelope.errors.TamperedError")),
            "sealed/a.csv was changed: chunk 3 does not authenticate. Restore it from a copy",
        ),
        (ValueError(""), "ValueError"),
        (RuntimeError("KeyboardInterrupt [while running 'Encrypt']"), "KeyboardInterrupt"),
        (KeyAccessError("the key \x1b[2Jgreen\u202e"), "the key \\x1b[2Jgreen\\u202e"),
    ],
)
def test_an_error_is_told_without_the_runners_traceback(error, message):
    assert describe(error) == message


def test_what_workers_write_to_stderr_stays_off_the_screen(capfd):
    with quiet_workers():
        os.write(2, b"INFO:worker: chatter\n")
        console.errors.print("for the person")
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "for the person\nafterwards\n"


def test_the_last_words_of_workers_are_in_the_notes_of_the_error(capfd):
    def die():
        with quiet_workers():
            os.write(2, b"x" * 10_000 + b"the worker was out of memory\n")
            raise RuntimeError("worker died")

    with pytest.raises(RuntimeError, match="worker died") as caught:
        die()
    (note,) = caught.value.__notes__
    assert note.endswith("the worker was out of memory\n")
    assert len(note) == 4000
    assert capfd.readouterr().err == ""


def test_elsewhere_than_on_a_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(console, "_LINE_S", 0.05)
    with JobProgress("Encrypting", 3, 4_000_000) as progress:
        append_progress({"files": 1, "bytes_plaintext": 1_000_000, "kms_GenerateDataKey": 1})
        append_progress({"files_skipped": 1, "bytes_skipped": 500_000})
        progress._stop.wait(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Encrypting 3 files, 4.0 MB ..."
    assert len(lines) > 2
    assert re.fullmatch(r"1\.5 MB of 4\.0 MB, [\d.]+ [kM]B/s, \d+ s left, 2/3 files, 1 KMS call", lines[-1])


def test_one_file_is_one_file(capsys):
    with JobProgress("Decrypting", 1, 5):
        pass
    assert capsys.readouterr().err == "Decrypting 1 file, 5 bytes ...\n"


def test_the_progress_file_goes_with_the_job(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def fail():
        with JobProgress("Encrypting", 1, 1):
            assert [os.environ[PROGRESS_VARIABLE]] == [str(path) for path in tmp_path.iterdir()]
            raise OSError("disk")

    threads = threading.active_count()
    with pytest.raises(OSError, match="disk"):
        fail()
    assert list(tmp_path.iterdir()) == []
    assert PROGRESS_VARIABLE not in os.environ
    assert threading.active_count() == threads


def on_a_terminal(forker, *words):
    """Run a command whose stderr is a terminal; return its exit status and what the terminal got."""
    terminal, its_end = pty.openpty()
    shown = bytearray()

    def read():
        while True:
            try:
                shown.extend(os.read(terminal, 4096))
            except OSError:  # Linux: the last writer is gone
                return

    reader = threading.Thread(target=read)
    reader.start()
    status, _ = forker.run(*words, stderr=os.ttyname(its_end))
    os.close(its_end)
    reader.join()
    os.close(terminal)
    return status, shown.decode()


@pytest.mark.skipif(sys.platform != "linux", reason="a terminal ends differently elsewhere")
def test_on_a_terminal_progress_is_a_bar_with_files_bytes_and_calls(tmp_path, local_key, forker):
    data = write_files(tmp_path / "data", {"a": b"1" * 3_000_000, "b": b"2" * 1_000_000})
    words = ("encrypt", f"{data}/*", "--output", tmp_path / "sealed", "--key", local_key)
    status, shown = on_a_terminal(forker, *words)
    assert status == 0, shown
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "━" in text
    assert "4.0/4.0 MB" in text
    assert "2/2 files, 2 KMS calls" in text  # for the data key of the shards, and for that of the manifest
    assert Path(tmp_path / "sealed/a").exists()
    assert "Encrypting 2 files" not in text  # that line is for logs


def test_no_message_moves_the_cursor_or_the_colours_of_a_terminal():
    """Key files and file names may come from somebody hostile."""
    assert console.printable("a\x1b[31m\x07b\u202e \u00e9\n") == "a\\x1b[31m\\x07b\\u202e \u00e9\n"
    assert console.describe(ValueError("no \x1b]0;title\x07")) == "no \\x1b]0;title\\x07"
