"""Timing of contenders in turn, peak memory of a process, and other processes to measure in."""

from __future__ import annotations

import gc
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

_STATUS: Final = Path("/proc/self/status")
_MAX_S: Final = 600


@dataclass(frozen=True)
class Sample:
    """One run.

    Attributes:
        wall_s: seconds on the clock.
        cpu_s: seconds of processor time of this process, if measured.
        whole_s: seconds with what comes before and after, such as the start of workers, if measured.
    """

    wall_s: float
    cpu_s: float | None = None
    whole_s: float | None = None


Samples: TypeAlias = dict[str, list[Sample]]
"""By contender; those of one round stand at the same index."""


def timed(work: Callable[[], object]) -> Sample:
    """Run `work` once; the garbage collector waits meanwhile."""
    gc.collect()
    gc.disable()
    try:
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        return Sample(time.perf_counter() - wall, time.process_time() - cpu)
    finally:
        gc.enable()


def interleave(
    contenders: Mapping[str, Callable[[], Sample]],
    rounds: int,
    *,
    warm_up: bool = True,
    before_round: Callable[[int], None] | None = None,
) -> Samples:
    """Measure A B A B ...: the speed of a machine drifts, and this way it drifts for all alike.

    Args:
        contenders: each runs once and returns its sample.
        rounds: how often each is measured.
        warm_up: run each once more at the start and drop that.
        before_round: told the number of the round, from 1.

    Returns:
        For each contender its samples, in order.
    """
    if warm_up:
        for run in contenders.values():
            run()
    samples: Samples = {name: [] for name in contenders}
    for number in range(1, rounds + 1):
        if before_round is not None:
            before_round(number)
        for name, run in contenders.items():
            samples[name].append(run())
    return samples


def times_faster(fast: Sequence[Sample], slow: Sequence[Sample]) -> float:
    """Return how many times faster `fast` is: the median over the rounds of the two times in the same round."""
    return statistics.median(b.wall_s / a.wall_s for a, b in zip(fast, slow, strict=True))


def peak_memory() -> int:
    """Return the peak of this process's resident memory, in bytes.

    Linux's VmHWM starts anew with each program; `ru_maxrss` there begins at that of the process that started it.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_module(module: str, *arguments: str) -> str:
    """Run `python -m module arguments` and return what it printed.

    Raises:
        RuntimeError: it failed; the message is the end of its output.
        subprocess.TimeoutExpired: it took more than ten minutes.
    """
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=_MAX_S,
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout
