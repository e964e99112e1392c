"""How large and how often: the settings of a run. Sizes are in bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

MIB: Final = 1 << 20
GIB: Final = 1 << 30

Say: TypeAlias = Callable[[str], None]
"""Shows a line of progress."""


@dataclass(frozen=True)
class Settings:
    """What all measurements share.

    Attributes:
        size: bytes of random data in `shards` and `files`, and of each file in `jobs`.
        slow_size: bytes of the file in the comparison with peers that would take minutes on the large one.
        rounds: how often each contender is measured; the median counts.
        job_files: files in a job.
        job_rounds: how often each job, and each pipeline of `text`, runs.
        small_bytes: the small file of `memory`.
        large_bytes: the large file of `memory`.
        text_bytes: bytes of lines in `text`.
        parquet_bytes: bytes of the table of `parquet`, about.
        random_bytes: the shard of `random`.
        random_reads: how many reads `random` makes in a round.
        records: how many records a loop encrypts in a round.
        cells: how many cells a column has.
        pipeline_records: how many records a pipeline encrypts.
        folder: where files are made; None chooses one, in memory if there is room.
    """

    size: int = 256 * MIB
    slow_size: int = 64 * MIB
    rounds: int = 7
    job_files: int = 8
    job_rounds: int = 3
    small_bytes: int = 64 * MIB
    large_bytes: int = 4 * GIB
    text_bytes: int = 16 * MIB
    parquet_bytes: int = 150 * MIB
    random_bytes: int = GIB
    random_reads: int = 2000
    records: int = 100_000
    cells: int = 1_000_000
    pipeline_records: int = 500_000
    folder: Path | None = None


FULL: Final = Settings()
QUICK: Final = Settings(
    size=32 * MIB,
    slow_size=4 * MIB,
    rounds=3,
    job_rounds=1,
    large_bytes=512 * MIB,
    text_bytes=8 * MIB,
    parquet_bytes=16 * MIB,
    random_bytes=64 * MIB,
    random_reads=500,
    records=20_000,
    cells=100_000,
    pipeline_records=50_000,
)
