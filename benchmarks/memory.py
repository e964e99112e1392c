"""Peak memory with a large file against a small one, each in a process of its own.

`python -m benchmarks.memory ACTION SOURCE TARGET KEY` does one thing and prints the peak in bytes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from beam_envelope import KeyProvider, create_shard, open_key, open_shard
from benchmarks.data import check, check_zeros, new_key
from benchmarks.machine import work_folder
from benchmarks.measure import peak_memory, run_module
from benchmarks.peers import CONTEXT
from benchmarks.results import Measurement, Row, Target
from benchmarks.settings import MIB, Say, Settings

MAX_GROWTH_MIB: Final = 64.0
ACTIONS: Final = ("create_shard", "open_shard", "EncryptFiles", "DecryptFiles")


def measure_peak(settings: Settings, say: Say) -> Measurement:
    """Measure all four ways with both sizes."""
    peaks: dict[tuple[str, int], int] = {}
    sizes = (settings.small_bytes, settings.large_bytes)
    with work_folder(2 * max(sizes), settings.folder) as folder:
        key = new_key(folder)
        for size in sizes:
            say(f"a file of {size / MIB:.4g} MiB")
            plain = folder / "plain" / "zeros.bin"
            plain.parent.mkdir(exist_ok=True)
            with plain.open("wb") as stream:
                stream.truncate(size)  # a hole: it reads as zeros and takes no room
            sealed, opened = folder / "sealed" / plain.name, folder / "opened" / plain.name
            for action, source, target in (
                ("create_shard", plain, sealed),
                ("open_shard", sealed, opened),
                ("EncryptFiles", plain, sealed),
                ("DecryptFiles", sealed, opened),
            ):
                say(f"{action}, {size / MIB:.4g} MiB")
                printed = run_module("benchmarks.memory", action, str(source), str(target), str(key))
                peaks[action, size] = int(printed.split()[-1])
                if target == opened:
                    if action == "DecryptFiles":
                        with opened.open("rb") as stream:
                            check_zeros(stream, size)
                    sealed.unlink()
                    opened.unlink(missing_ok=True)
    growth = {action: (peaks[action, sizes[1]] - peaks[action, sizes[0]]) / MIB for action in ACTIONS}
    rows = []
    for action in ACTIONS:
        for size in sizes:
            peak = peaks[action, size] / MIB
            rows.append(Row(action, f"{size / MIB:.4g} MiB", peak, peak, peak, ours=True))
    return Measurement(
        "memory",
        f"Peak memory with a file of {sizes[1] / MIB:.4g} MiB and of {sizes[0] / MIB:.4g} MiB",
        "MiB",
        "The most resident memory (VmHWM) that a process had which did this and nothing else. The transforms run in "
        "Beam's in-memory runner, the work on the files in the same process; most of their memory is Beam itself.",
        tuple(rows),
        tuple(
            Target(f"{action}, more memory for the large file", growth[action], MAX_GROWTH_MIB, "MiB", at_least=False)
            for action in ACTIONS
        ),
    )


def act(action: str, source: Path, target: Path, key: KeyProvider) -> None:
    """Do one of the four."""
    if action == "create_shard":
        buffer = memoryview(bytearray(MIB))
        with source.open("rb", buffering=0) as reader, create_shard(target, key=key, context=CONTEXT) as writer:
            while count := reader.readinto(buffer):
                writer.write(buffer[:count])
    elif action == "open_shard":
        with open_shard(source, key=key, context=CONTEXT) as shard:
            size = os.stat(source.parents[1] / "plain" / source.name).st_size
            check_zeros(shard, size)
    else:
        _run_transform(action, source, target, key)


def _run_transform(action: str, source: Path, target: Path, key: KeyProvider) -> None:
    import apache_beam as beam  # noqa: PLC0415  # not in the memory of the plain functions
    from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions  # noqa: PLC0415

    from beam_envelope import DecryptFiles, EncryptFiles  # noqa: PLC0415
    from beam_envelope.jobs import make_pipeline  # noqa: PLC0415

    make = EncryptFiles if action == "EncryptFiles" else DecryptFiles
    options = PipelineOptions()
    pipeline = make_pipeline(options, n_tasks=1)  # one file: no worker processes, all is done in this one
    check(options.view_as(DirectOptions).direct_running_mode == "in_memory", "the job runs in other processes")
    transform = make(str(target.parent), key=key, context=CONTEXT, if_exists="overwrite")
    _ = pipeline | beam.Create([str(source)]) | transform
    pipeline.run().wait_until_finish()
    check(target.exists(), f"{action} made no file")


if __name__ == "__main__":
    _action, _source, _target, _key = sys.argv[1:]
    act(_action, Path(_source), Path(_target), open_key(_key))
    print(peak_memory())
