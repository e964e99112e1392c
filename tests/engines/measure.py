"""Measures our transforms on Flink, on an idle machine: `python -m tests.engines.measure`, with `--quick` to try it.

Three questions, of which `--only` takes one:

- `scale`: how much faster two TaskManagers encrypt whole files than one;
- `cost`: how much longer each transform takes than the same pipeline without encryption;
- `memory`: the peak memory of launcher and workers with very many files and shards, on Flink and without it.

Flink's own durations of jobs are taken, without submission, and the processor time of workers and TaskManagers. A run
of the same job on next to nothing is the start-up, which is taken off both. Each is run `--repeat` times, and the least
counts. It prints JSON, also into `--json FILE`.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pyarrow.parquet as pq

from beam_envelope.testing import FakeKms
from tests.engines import measure_jobs
from tests.engines.flink import FlinkCluster
from tests.engines.server import clean_environment, descendants, kill_session, tail

MIB = 1 << 20
TWO_PROCESSES = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]


class Usage:
    """Within a `with` block, watches a launcher, and some processes with the workers below them.

    Attributes:
        launcher: the peak memory of the launcher, in bytes.
        worker: the peak memory of the largest worker.
    """

    def __init__(self, launcher, above_workers):
        self.launcher = self.worker = 0
        self._pid, self._above = launcher, above_workers
        self._before, self._now = self._processor_times(), {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_error):
        self._done.set()
        self._thread.join()

    def _watch(self):
        while not self._done.wait(0.2):
            self.launcher = max(self.launcher, _peak(self._pid))
            for pid in self._above:
                workers = [child for child, words in descendants(pid).items() if "sdk_worker_main" in words]
                self.worker = max([self.worker, *map(_peak, workers)])
            self._now |= self._processor_times()

    def _processor_times(self):
        return {pid: _processor_time(pid) for above in self._above for pid in (above, *descendants(above))}

    def processor_s(self):
        """Return the processor time that all but the launcher took, in seconds."""
        return round(sum(now - self._before.get(pid, 0.0) for pid, now in self._now.items()), 3)


def _processor_time(pid):
    """Return the processor time of a process up to now, in seconds."""
    with contextlib.suppress(OSError):
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _peak(pid):
    """Return the most memory that a process has had, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class Bench:
    """Runs jobs, on Flink or not.

    Args:
        place: the folder of all files.
        environment: what leads workers to the KMS.
        task_managers: of the Flink cluster; 0: two processes of Beam's own runner.
    """

    def __init__(self, place, environment, task_managers):
        self.place, self.environment = Path(place), environment
        self.cluster = None
        self._stack = contextlib.ExitStack()
        self.options = TWO_PROCESSES
        if task_managers:
            folder = Path(tempfile.mkdtemp(dir=place, prefix="flink-"))
            self.cluster = FlinkCluster(folder / "cluster", task_managers, environment=environment)
            self._stack.callback(self.cluster.stop)
            flink = [word for word in self.cluster.options if not word.startswith("--parallelism")]
            self.options = [*flink, f"--parallelism={task_managers}"]

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self._stack.close()

    def run(self, job, data, shards=0):
        """Run a job once.

        Returns:
            Its seconds, the processor time of workers and TaskManagers in seconds, and the peak memory of the launcher
            and of the largest worker in MiB.
        """
        output = self.place / "output"
        shutil.rmtree(output, ignore_errors=True)
        environment = clean_environment(self.place, self.environment)
        words = [job, "--data", data, "--output", output, "--shards", shards, *self.options]
        log = self.place / "job.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.engines.measure_jobs", *map(str, words)],
                stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True,
            )  # fmt: skip
        managers = self.cluster.task_managers.values() if self.cluster else []
        above = [process.pid, *(manager.pid for manager in managers)]
        try:
            with Usage(process.pid, above) as usage:
                said, _ = process.communicate()
        finally:
            kill_session(process.pid)
        if process.returncode:
            sys.exit(f"{job} failed; {log} ends with:\n{tail(log)}")
        seconds = json.loads(said)["seconds"]
        if self.cluster is not None:
            newest = max(self.cluster.rest("/jobs/overview")["jobs"], key=lambda job: job["start-time"])
            seconds = newest["duration"] / 1000
            if restarts := self.cluster.restarts(newest["jid"]):
                sys.stderr.write(f"{job}: Flink started it again {restarts} times, and its time counts; see {log}\n")
        shutil.rmtree(output, ignore_errors=True)
        return {
            "seconds": seconds,
            "processor_s": usage.processor_s(),
            "launcher_mib": usage.launcher // MIB,
            "worker_mib": usage.worker // MIB,
        }

    def net(self, job, data, small, repeat):
        """Return the seconds of a job, those of the same job on next to nothing, and the processor time less that's."""
        small_runs = [self.run(job, small) for _ in range(repeat)]
        runs = [self.run(job, data) for _ in range(repeat)]
        start_up, whole = (min(run["seconds"] for run in each) for each in (small_runs, runs))
        processor = [min(run["processor_s"] for run in each) for each in (small_runs, runs)]
        net = {"net_s": round(whole - start_up, 3), "net_processor_s": round(processor[1] - processor[0], 3)}
        return {"start_up_s": start_up, "whole_s": whole, **net}


def _ratio(above, below):
    return round(above / below, 3) if below > 0 else None


def scale(place, environment, sizes):
    """Time EncryptFiles on one and on two TaskManagers."""
    data = _files(place / "files", sizes.files, sizes.file_mib * MIB)
    small = _files(place / "small", sizes.files, 1)
    found = {}
    for number in (1, 2):
        with Bench(place, environment, number) as bench:
            found[f"task_managers_{number}"] = bench.net("encrypt_files", data, small, sizes.repeat)
    one, two = (found[f"task_managers_{number}"]["net_s"] for number in (1, 2))
    shutil.rmtree(data)
    return {"files": sizes.files, "file_mib": sizes.file_mib, **found, "speed_up": _ratio(one, two)}


def cost(place, environment, sizes):
    """Time each transform and its like without encryption."""
    pairs = {name: pair for name, pair in measure_jobs.PAIRS.items() if not sizes.pair or name in sizes.pair}
    kinds = {"files", *(measure_jobs.INPUTS.get(name, "lines") for name in pairs)}
    data, small = (_inputs(place / name, kinds, sizes, small=name == "small") for name in ("data", "small"))
    found = {"files": sizes.files, "file_mib": sizes.file_mib, "lines_mib": sizes.lines_mib}
    with Bench(place, environment, 2) as bench:
        bench.run("copy_files", small["files"])  # the first job of a cluster takes longer
        for name, pair in pairs.items():
            kind = measure_jobs.INPUTS.get(name, "lines")
            plain, sealed = (bench.net(job.__name__, data[kind], small[kind], sizes.repeat) for job in pair)
            ratios = {f"ratio_{unit}": _ratio(sealed[unit], plain[unit]) for unit in ("net_s", "net_processor_s")}
            found[name] = {"plain": plain, "encrypted": sealed, **ratios}
            sys.stderr.write(f"{name}: {json.dumps(found[name])}\n")
    return found


def _inputs(place, kinds, sizes, *, small):
    """Write files of random bytes; lines of 100 bytes, or orders of 1000, and both as tables; return their folders."""
    folders = {name: place / name for name in ("files", "lines", "tables", "orders", "order-tables")}
    place.mkdir()
    _files(folders["files"], sizes.files, 1 if small else sizes.file_mib * MIB)
    mib = 0 if small else sizes.lines_mib
    if kinds & {"lines", "tables"}:
        _lines(folders["lines"], folders["tables"], mib, 100, measure_jobs.row_of, measure_jobs.SCHEMA)
    if kinds & {"orders", "order-tables"}:
        _lines(folders["orders"], folders["order-tables"], mib, 1000, measure_jobs.order_of, measure_jobs.ORDERS)
    return folders


def _lines(texts, tables, mib, line_bytes, to_row, schema):
    """Write 8 files of lines, of so many MiB together, and each as a Parquet file that has its rows 8 times."""
    texts.mkdir()
    tables.mkdir()
    digits = line_bytes - 11  # beside the number, a space, and the line's end
    for number in range(8):
        path = texts / f"{number}.txt"
        count = mib * MIB // 8 // line_bytes or 1
        path.write_text("".join(f"{n:09} {secrets.token_hex(digits // 2 + 1)[:digits]}\n" for n in range(count)))
        table = measure_jobs.table_of(path, to_row, schema)
        with pq.ParquetWriter(tables / f"{number}.parquet", schema) as writer:
            for _ in range(8 if mib else 1):
                writer.write_table(table)


def memory(place, environment, sizes):
    """Look at the peak memory with many small files, and with many shards."""
    many = _files(place / "many", sizes.small_files, 1024)
    lines = place / "many-lines"
    lines.mkdir(exist_ok=True)
    (lines / "lines.txt").write_text("".join(f"{number:09}\n" for number in range(sizes.shards * 4)))
    found = {"small_files": sizes.small_files, "shards": sizes.shards}
    for name, task_managers in (("two processes", 0), ("Flink, two TaskManagers", 2)):
        with Bench(place, environment, task_managers) as bench:
            found[name] = {
                "EncryptFiles": bench.run("encrypt_files", many),
                "WriteEncryptedText": bench.run("encrypted_text", lines, sizes.shards),
            }
    shutil.rmtree(many)
    return found


def _files(folder, number, size):
    """Write files of random bytes, in blocks; return the folder. Large ones are one file by several names."""
    folder.mkdir(exist_ok=True)
    block = os.urandom(min(size, MIB))
    for name in range(number):
        path = folder / f"{name:06}"
        if name and size > MIB:
            path.hardlink_to(folder / f"{0:06}")
            continue
        with path.open("wb") as stream:
            for _ in range(max(1, size // MIB)):
                stream.write(block)
    return folder


def main():
    """Measure; print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("scale", "cost", "memory"))
    parser.add_argument("--pair", action="append", choices=measure_jobs.PAIRS, help="of `cost`: this transform only")
    parser.add_argument("--quick", action="store_true", help="very small sizes, once: to see that it runs")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--file-mib", type=int, default=512)
    parser.add_argument("--lines-mib", type=int, default=128)
    parser.add_argument("--small-files", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--place", help="where to put some GiB (default: the temporary folder)")
    parser.add_argument("--json", help="write what was found into this file too")
    sizes = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and so end what was started
    if sizes.quick:
        sizes.files, sizes.file_mib, sizes.lines_mib, sizes.small_files, sizes.shards, sizes.repeat = 4, 2, 1, 50, 10, 1
    place = Path(tempfile.mkdtemp(dir=sizes.place, prefix="measure-"))
    found = {"cores": len(os.sched_getaffinity(0))}
    try:
        with FakeKms() as kms:
            kms.create_key("alias/etl")
            for part in (scale, cost, memory):
                if sizes.only in {None, part.__name__}:
                    found[part.__name__] = part(place, kms.environment(), sizes)
                    sys.stderr.write(f"{part.__name__}: {json.dumps(found[part.__name__])}\n")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    if sizes.json:
        Path(sizes.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
