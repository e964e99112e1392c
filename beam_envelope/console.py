"""What a person sees while a job runs: a progress bar on a terminal, a line now and then elsewhere. Goes to stderr."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from beam_envelope.progress import PROGRESS_VARIABLE, ProgressFile

_LOOK_S: Final = 0.25
_LINE_S: Final = 10.0
_FILE_WIDTH: Final = 10_000
_LAST_WORDS: Final = 4000

errors: Final = Console(stderr=True, highlight=False, soft_wrap=True)
# A table that goes into a file or a pipe is as wide as its text; only a screen cuts it.
output: Final = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)


def printable(text: str) -> str:
    """Return a text in which nothing moves a terminal's cursor or colours: key files and file names may be hostile."""
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)


def describe(error: BaseException) -> str:
    """Return an error for a person: what happened, without the runner's traceback around it."""
    return printable(_describe(error))


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        label = {errno.ENOSPC: "the disk is full"}.get(error.errno or 0, error.strerror)
        return f"{error.filename}: {label}"
    return _last_error(str(error)) or f"{type(error).__name__}"


def _last_error(text: str) -> str:
    """Take the message out of a worker's traceback, which runners put into the text of a RuntimeError."""
    lines = [line for line in text.splitlines() if line.strip()]
    marks = [
        index for index, line in enumerate(lines) if not line.startswith(" ") and "Error: " in line.split(" ")[0] + " "
    ]
    if "Traceback (most recent call last)" in text and marks:
        text = "\n".join(lines[marks[-1] :]).partition(": ")[2]
    text = text.partition(" [while running")[0].strip()
    return re.sub(r"^(\w+Error: )?(\[Errno \d+\] )?", "", text)


@contextmanager
def quiet_workers() -> Iterator[None]:
    """Keep what worker processes of this machine write to stderr off the screen: their log, at INFO from the start.

    What went wrong in a worker comes back as the job's error; the last of what it wrote is in that error's notes.
    """
    sys.stderr.flush()
    screen = os.dup(2)
    with tempfile.TemporaryFile() as log, os.fdopen(screen, "w", closefd=False) as stream:
        os.dup2(log.fileno(), 2)
        errors.file = stream
        try:
            yield
        except BaseException as error:
            log.seek(0)
            notes = [*getattr(error, "__notes__", ()), log.read()[-_LAST_WORDS:].decode(errors="replace")]
            error.__notes__ = notes  # type: ignore[attr-defined]  # BaseException.add_note is of Python 3.11
            raise
        finally:
            os.dup2(screen, 2)
            errors.file = None  # type: ignore[assignment]  # rich then takes what sys.stderr is at the time
            os.close(screen)


@contextmanager
def checking(arguments: argparse.Namespace) -> Iterator[None]:
    """Keep the workers that `--check-workers` starts off the screen, and say what is going on."""
    if not arguments.check_workers:
        yield
        return
    errors.print("Checking the keys on the workers ...")
    with contextlib.nullcontext() if arguments.verbose else quiet_workers():
        yield


def tell(text: str) -> None:
    """Print a text of several lines as it is, but for what would move the cursor."""
    errors.print(printable(text), markup=False, soft_wrap=True)


class JobProgress:
    """Shows the progress of a job of this machine's workers: files, bytes, rate, time left, KMS calls.

    Workers elsewhere do not report here; then only the first line shows.

    Args:
        verb: `Encrypting`, say.
        n_files: how many files or parts there are.
        n_bytes: how many bytes they have; None for key files, of which only the number counts.
    """

    def __init__(self, verb: str, n_files: int, n_bytes: int | None) -> None:
        """Show nothing yet."""
        self._verb, self._n_files, self._n_bytes = verb, n_files, n_bytes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> JobProgress:
        """Start to watch."""
        handle, name = tempfile.mkstemp(prefix="beam-envelope-progress-")
        os.close(handle)
        self._path = Path(name)
        self._file = ProgressFile(self._path)
        os.environ[PROGRESS_VARIABLE] = name
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop and clean up."""
        self._stop.set()
        self._thread.join()
        os.environ.pop(PROGRESS_VARIABLE, None)
        self._path.unlink(missing_ok=True)

    def _watch(self) -> None:
        if errors.is_terminal:
            self._show_bar()
        else:
            self._print_lines()

    def _show_bar(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            *(() if self._n_bytes is None else (DownloadColumn(), TransferSpeedColumn())),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        total = self._n_files if self._n_bytes is None else self._n_bytes
        with Progress(*columns, console=errors) as bar:
            task = bar.add_task(self._verb, total=total or None, note="starting workers")
            stopped = False
            while not stopped:
                stopped = self._stop.wait(_LOOK_S)
                counts = self._file.read()
                if counts:
                    done = _done_files(counts) if self._n_bytes is None else _done_bytes(counts)
                    bar.update(task, completed=done, note=self._note(counts))

    def _print_lines(self) -> None:
        start = time.monotonic()
        files = f"{self._n_files} {self._noun}{'' if self._n_files == 1 else 's'}"
        n_bytes = self._n_bytes
        errors.print(f"{self._verb} {files}{'' if n_bytes is None else f', {decimal(n_bytes)}'} ...")
        while not self._stop.wait(_LINE_S):
            counts = self._file.read()
            if n_bytes is None:
                errors.print(self._note(counts))
                continue
            done = _done_bytes(counts)
            rate = done / (time.monotonic() - start)
            left = f", {(n_bytes - done) / rate:.0f} s left" if rate else ""
            total = f"{decimal(done)} of {decimal(n_bytes)}"
            errors.print(f"{total}, {decimal(int(rate))}/s{left}, {self._note(counts)}")

    @property
    def _noun(self) -> str:
        return "key file" if self._n_bytes is None else "file"

    def _note(self, counts: Counter[str]) -> str:
        calls = sum(count for name, count in counts.items() if name.startswith("kms_"))
        return f"{_done_files(counts)}/{self._n_files} {self._noun}s, {calls} KMS call{'' if calls == 1 else 's'}"


def _done_files(counts: Counter[str]) -> int:
    names = ("files", "files_skipped", "key_files", "key_files_failed")
    return sum(counts[name] for name in names)


def _done_bytes(counts: Counter[str]) -> int:
    return counts["bytes_plaintext"] + counts["bytes_authenticated"] + counts["bytes_skipped"]
