"""What a measurement returns: rows of figures, and targets that they meet or miss."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measure import Samples, times_faster


@dataclass(frozen=True)
class Row:
    """One bar: the median of what was measured, with its lowest and highest value.

    Attributes:
        group: rows of one group compare with each other.
        name: who was measured.
        value: the median, in the unit of the measurement.
        low: the lowest value.
        high: the highest value.
        ours: whether it is this package.
        relative: how many times as fast as the first row of the group, by rounds; None where that says nothing.
        cpu_s_per_gb: seconds of processor time for 10^9 bytes; None where it was not measured.
    """

    group: str
    name: str
    value: float
    low: float
    high: float
    ours: bool = False
    relative: float | None = None
    cpu_s_per_gb: float | None = None


@dataclass(frozen=True)
class Target:
    """A promise of the package, and what was measured of it."""

    text: str
    value: float
    limit: float
    unit: str
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Whether the promise is kept."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Measurement:
    """All of one kind, for a table and a chart.

    Attributes:
        name: the word for `--only`.
        title: the heading.
        unit: of all rows.
        method: how it was measured, in a sentence or two.
        rows: in order.
        targets: in order.
        notes: what a reader has to know of this very run.
    """

    name: str
    title: str
    unit: str
    method: str
    rows: tuple[Row, ...]
    targets: tuple[Target, ...] = ()
    notes: tuple[str, ...] = ()


def speed_rows(group: str, samples: Samples, size: int, ours: Sequence[str]) -> list[Row]:
    """Return rows in MB/s (10^6 bytes of plaintext in a second) for samples of one interleaved run.

    Args:
        group: the group of the rows; its first contender is what the others are relative to.
        samples: by contender.
        size: bytes of plaintext in each run.
        ours: which contenders are this package.
    """
    rows = []
    first = next(iter(samples.values()))
    for name, runs in samples.items():
        speeds = [size / sample.wall_s / 1e6 for sample in runs]
        cpu = [sample.cpu_s / size * 1e9 for sample in runs if sample.cpu_s is not None]
        rows.append(
            Row(
                group,
                name,
                statistics.median(speeds),
                min(speeds),
                max(speeds),
                ours=name in ours,
                relative=times_faster(runs, first),
                cpu_s_per_gb=statistics.median(cpu) if cpu else None,
            )
        )
    return rows
