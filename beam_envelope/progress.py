"""How workers tell a launcher on the same machine what they did: lines of numbers, appended to one file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

PROGRESS_VARIABLE: Final = "BEAM_ENVELOPE_PROGRESS"
"""The environment variable, set by the launcher, that names the file."""


def append_progress(counts: Mapping[str, int]) -> None:
    """Append counts to the launcher's file, if there is one."""
    path = os.environ.get(PROGRESS_VARIABLE)
    if not path or not counts:
        return
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:  # the launcher is gone, or on another machine
        return
    try:
        os.write(handle, (" ".join(f"{name}={count}" for name, count in counts.items()) + "\n").encode())
    finally:
        os.close(handle)


class ProgressFile:
    """The launcher's side: adds up what came since it last looked."""

    def __init__(self, path: Path) -> None:
        """Start at the top of the file."""
        self.counts: Counter[str] = Counter()
        self._path, self._offset = path, 0

    def read(self) -> Counter[str]:
        """Return the counts so far; half a line waits for the next look."""
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            lines = stream.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._offset += len(whole)
        for pair in whole.decode().split():
            name, _, count = pair.partition("=")
            self.counts[name] += int(count)
        return self.counts
