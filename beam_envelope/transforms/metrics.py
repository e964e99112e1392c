"""Counts of what was done: Beam metrics in the namespace `beam_envelope`, and progress for a local launcher."""

from __future__ import annotations

import time
from collections import Counter
from typing import Final

from apache_beam.metrics import Metrics

from beam_envelope.keys.provider import kms_calls
from beam_envelope.progress import append_progress

NAMESPACE: Final = "beam_envelope"
_INTERVAL_S: Final = 0.2


class Progress:
    """Counts for one thread: adds to Beam's metrics, and to the progress file a few times in a second.

    Use it as a context manager around the work on one file; what is left goes out at its end, also after an error.
    """

    def __init__(self) -> None:
        """Start from the KMS calls made so far."""
        self._counts: Counter[str] = Counter()
        self._kms_before = kms_calls.counts.copy()
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

    def _flush(self) -> None:
        calls = kms_calls.counts - self._kms_before
        self._kms_before += calls
        self._due = time.monotonic() + _INTERVAL_S
        for operation, count in calls.items():
            self._counts[f"kms_{operation}"] += count
        for name, count in self._counts.items():
            Metrics.counter(NAMESPACE, name).inc(count)
        append_progress(self._counts)
        self._counts.clear()
