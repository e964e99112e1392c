"""EncryptFiles and DecryptFiles as whole jobs: one worker process against two."""

from __future__ import annotations

import os
import shutil
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from beam_envelope import DecryptFiles, EncryptFiles, EncryptTables, KeyProvider
from beam_envelope.console import quiet_workers
from beam_envelope.jobs import make_pipeline
from benchmarks import machine, peers
from benchmarks.data import check, check_equal, new_key, random_file
from benchmarks.measure import Sample, Samples, interleave, times_faster
from benchmarks.results import Measurement, Row, Target, speed_rows
from benchmarks.settings import MIB, Say, Settings

TWO_OVER_ONE: Final = 1.6
_LOOK_S: Final = 0.005
ONE: Final = "1 process"
TWO: Final = "2 processes"


class FirstFile(threading.Thread):
    """Notes when the first file appears in a folder: a worker has begun."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.seen_at = 0.0
        self._folder = folder
        self._done = threading.Event()

    def run(self) -> None:
        """Look until there is one."""
        while not self._done.wait(_LOOK_S):
            if any(self._folder.iterdir()):
                self.seen_at = time.time()
                return

    def stop(self) -> None:
        """Look no more."""
        self._done.set()
        self.join()


def run_job(
    transform: EncryptFiles | DecryptFiles | EncryptTables, pattern: str, output: Path, processes: int
) -> Sample:
    """Run one job in so many worker processes, and time its worker phase.

    Raises:
        SystemExit: the job ended without a file.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    options = PipelineOptions(direct_running_mode="multi_processing", direct_num_workers=processes)
    watch = FirstFile(output)
    with quiet_workers():
        start = time.perf_counter()
        pipeline = make_pipeline(options)
        _ = pipeline | beam.Create([pattern]) | transform
        watch.start()
        pipeline.run().wait_until_finish()
        whole_s = time.perf_counter() - start
    watch.stop()
    check(watch.seen_at > 0, "the job made no file")
    # A file takes its final name when it is whole; that sets its ctime.
    last = max(path.stat().st_ctime for path in output.iterdir())
    return Sample(last - watch.seen_at, whole_s=whole_s)


def measure_jobs(settings: Settings, say: Say) -> Measurement:
    """Measure both transforms, and beside them how far copying and the cipher alone scale on this machine."""
    total = settings.job_files * settings.size
    with machine.work_folder(3 * total, settings.folder) as folder:
        say(f"writing {settings.job_files} files of {settings.size / MIB:.4g} MiB")
        key = new_key(folder)
        plain, sealed, opened = (folder / name for name in ("plain", "sealed", "opened"))
        plain.mkdir()
        sources = [random_file(plain / f"part-{number:02}.bin", settings.size) for number in range(settings.job_files)]
        encrypt, decrypt = _measure_transforms((plain, sealed, opened), key, settings.job_rounds, say)
        for source in sources:
            check_equal(opened / source.name, source)
        shutil.rmtree(sealed)
        shutil.rmtree(opened)
        copy = _measure_pool("cp", peers.copy, sources, folder / "copies", settings.job_rounds, say)
        cipher_alone = partial(peers.native_encrypt, os.urandom(32))
        cipher = _measure_pool("the cipher alone", cipher_alone, sources, folder / "copies", settings.job_rounds, say)
        kind = machine.file_system(folder)
    groups = {"EncryptFiles": encrypt, "DecryptFiles": decrypt, peers.NATIVE: cipher, peers.CP: copy}
    rows: list[Row] = []
    for name, samples in groups.items():
        rows += speed_rows(name, samples, total, [ONE, TWO] if name.endswith("Files") else [])
    scaling = {name: times_faster(samples[TWO], samples[ONE]) for name, samples in groups.items()}
    return Measurement(
        "jobs",
        f"A job of {settings.job_files} files of {settings.size / MIB:.4g} MiB, in one and in two worker processes",
        "MB/s",
        f"Files in a folder on {kind}. The time is that of the workers' phase: from the first file that a worker "
        "starts to the last that takes its final name, seen in the output folder; starting Python and Beam in the "
        "workers is not in it. Each file is flushed to the disk before it takes its name. Below, for comparison, the "
        "same files through the cipher alone and through cp, in a pool of one and of two processes.",
        tuple(rows),
        tuple(
            Target(f"{name}, two processes against one", scaling[name], TWO_OVER_ONE, "x")
            for name in ("EncryptFiles", "DecryptFiles")
        ),
        _notes(encrypt, scaling, kind),
    )


def _measure_transforms(
    folders: tuple[Path, Path, Path], key: KeyProvider, rounds: int, say: Say
) -> tuple[Samples, Samples]:
    plain, sealed, opened = folders

    def encrypt(processes: int) -> Sample:
        transform = EncryptFiles(str(sealed), key=key, context=peers.CONTEXT)
        return run_job(transform, f"{plain}/*", sealed, processes)

    def decrypt(processes: int) -> Sample:
        transform = DecryptFiles(str(opened), key=key, context=peers.CONTEXT)
        return run_job(transform, f"{sealed}/*", opened, processes)

    results = []
    for name, job in (("EncryptFiles", encrypt), ("DecryptFiles", decrypt)):
        say(f"{name}, in one process and in two, {rounds} times")
        results.append(interleave({ONE: partial(job, 1), TWO: partial(job, 2)}, rounds, warm_up=False))
    return results[0], results[1]


def _measure_pool(
    name: str, convert: peers.Convert, sources: Sequence[Path], output: Path, rounds: int, say: Say
) -> Samples:
    """Measure a function over the files in one process and in two; the processes are there before."""
    say(f"{name}, in one process and in two")
    output.mkdir()
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as one,
        ProcessPoolExecutor(2, mp_context=get_context("spawn")) as two,
    ):
        for pool in (one, two):
            list(pool.map(time.sleep, [0.5] * 4))  # all processes start, and import what they need

        def run(pool: ProcessPoolExecutor) -> Sample:
            targets = [output / source.name for source in sources]
            start = time.perf_counter()
            list(pool.map(convert, sources, targets))
            sample = Sample(time.perf_counter() - start)
            for target in targets:
                target.unlink()
            return sample

        samples = interleave({ONE: partial(run, one), TWO: partial(run, two)}, rounds)
    output.rmdir()
    return samples


def _notes(encrypt: Samples, scaling: dict[str, float], kind: str) -> tuple[str, ...]:
    whole = ", ".join(
        f"{statistics.median(sample.whole_s or 0.0 for sample in samples):.1f} s in {name}"
        for name, samples in encrypt.items()
    )
    notes = [f"The whole EncryptFiles job, with the start of its worker processes: {whole}."]
    if machine.cores() < 2:
        notes.append("This machine has one core, so that two processes cannot be faster than one.")
    for name in (peers.CP, peers.NATIVE):
        if scaling[name] < TWO_OVER_ONE:
            what = "the disk or memory" if name == peers.CP else "the machine"
            notes.append(
                f"{name} in two processes is only {scaling[name]:.2f} times as fast as in one on this {kind}: "
                f"{what}, or what else was running, is a limit here for any program."
            )
    return tuple(notes)
