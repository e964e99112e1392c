"""The machine: what it is, and a folder with room on it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.settings import MIB

_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  # a folder of our own is made in it
_SPARE_BYTES: Final = 1024 * MIB
_LIBRARIES: Final = ("apache-beam", "cryptography", "aws-encryption-sdk", "pyrage")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, str]:
    """Return what the figures depend on."""
    facts = {
        "cpu": _cpu_model(),
        "cores": str(cores()),
        "memory": f"{_memory('MemTotal') / (1 << 30):.0f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if hasattr(os, "getloadavg"):
        facts["load before"] = f"{os.getloadavg()[0]:.1f}"
    for library in ("beam-envelope", *_LIBRARIES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[library] = importlib.metadata.version(library)
    return facts


@contextlib.contextmanager
def work_folder(needed_bytes: int, chosen: Path | None = None) -> Iterator[Path]:
    """Make a folder with room for `needed_bytes`, and remove it at the end.

    Without a choice it is in memory (tmpfs) if that has the room: there a disk cannot hide what is measured.

    Raises:
        SystemExit: there is no room.
    """
    candidates = [chosen] if chosen is not None else [_SHARED_MEMORY, Path(tempfile.gettempdir())]
    for parent in candidates:
        if _room(parent) >= needed_bytes + _SPARE_BYTES:
            with tempfile.TemporaryDirectory(prefix="beam-envelope-bench-", dir=parent) as folder:
                yield Path(folder)
            return
    places = " or ".join(map(str, candidates))
    raise SystemExit(
        f"The benchmark needs {(needed_bytes + _SPARE_BYTES) / MIB:.0f} MiB of room in {places}. "
        "Name a folder that has it with --folder, or use --quick or a smaller --size"
    )


def file_system(path: Path) -> str:
    """Return the kind of file system that a path is on, such as tmpfs or ext4, where it can be told."""
    best, kind = "", "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            mount, name = line.split()[1:3]
            if len(mount) >= len(best) and Path(mount) in (path, *path.parents):
                best, kind = mount, name
    return kind


def _room(folder: Path) -> int:
    """Return how much may be written there: in memory, no more than memory has left."""
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        return 0
    free = shutil.disk_usage(folder).free
    return min(free, _memory("MemAvailable")) if file_system(folder) == "tmpfs" else free


def _memory(field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == field:
                return int(rest.split()[0]) * 1024
    return 0


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, model = line.partition(":")
            if name.strip() == "model name":
                return model.strip()
    return platform.processor() or platform.machine()
