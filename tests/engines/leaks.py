"""Looks for plaintext in all files below some folders, all the time that a job runs: engines delete much at its end."""

import contextlib
import os
import threading
from pathlib import Path

from beam_envelope.testing import find_plaintext


class LeakWatch:
    """Within a `with` block, looks into each file that is new or changed, and once more at the end.

    Attributes:
        found: the files that held the needle.
        looked_into: how many files were read.
    """

    def __init__(self, folders, needle):
        self.found, self.looked_into = set(), 0
        self._folders, self._needle = folders, needle
        self._seen = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._error = None

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_error):
        self._done.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        self._look()

    def _watch(self):
        try:
            while not self._done.wait(0.2):
                self._look()
        except Exception as error:  # noqa: BLE001  # a watch that ended early has seen nothing: the test must fail
            self._error = error

    def _look(self):
        for folder in self._folders:
            for place, _, names in os.walk(folder):  # which, other than rglob, bears folders that go meanwhile
                for path in (Path(place, name) for name in names if not name.endswith(".jar")):
                    with contextlib.suppress(OSError):  # it went meanwhile
                        if path.is_file() and not path.is_symlink():
                            self._look_into(path)

    def _look_into(self, path):
        status = path.stat()
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        if status.st_size and self._seen.get(path) != version:
            self._seen[path] = version
            self.found.update(map(str, find_plaintext([path], self._needle)))
            self.looked_into += 1
