"""Counts of what was done: Beam metrics in the namespace `beam_envelope`, and progress for a local launcher."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from typing import Final

from apache_beam.metrics import Metrics

from beam_envelope.keys.provider import kms_calls
from beam_envelope.progress import append_progress

NAMESPACE: Final = "beam_envelope"
_INTERVAL_S: Final = 0.2


class _Reported(threading.local):
    """The KMS calls of this thread that are reported, or are none of ours, and who reports them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.open: weakref.WeakSet[Progress] = weakref.WeakSet()


_reported: Final = _Reported()


class Progress:
    """Counts for one thread: adds to Beam's metrics, and to the progress file a few times in a second.

    Use it as a context manager around the work on one file; what is left goes out at its end, also after an error.
    Where the steps of a pipeline share a thread, each has one open at the same time: a KMS call counts once, in the
    step that reports next.
    """

    def __init__(self) -> None:
        """Start from the KMS calls made so far, unless another one is open."""
        self._counts: Counter[str] = Counter()
        if not _reported.open or _reported.counts - kms_calls.counts:  # the latter: somebody set the counts back
            _reported.counts = kms_calls.counts.copy()
        _reported.open.add(self)
        self._due = time.monotonic() + _INTERVAL_S

    def add(self, name: str, count: int = 1) -> None:
        """Count something."""
        self._counts[name] += count
        if time.monotonic() >= self._due:
            self._flush()

    def __enter__(self) -> Progress:
        """Return itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Report what is left."""
        self._flush()
        self.drop()

    def drop(self) -> None:
        """Report no more, as when the bundle has failed."""
        _reported.open.discard(self)

    def _flush(self) -> None:
        calls = kms_calls.counts - _reported.counts
        _reported.counts += calls
        self._due = time.monotonic() + _INTERVAL_S
        for operation, count in calls.items():
            self._counts[f"kms_{operation}"] += count
        for name, count in self._counts.items():
            Metrics.counter(NAMESPACE, name).inc(count)
        append_progress(self._counts)
        self._counts.clear()
