"""Encrypted Parquet beside plain Parquet: the writer and the reader, a pipeline, and a whole job beside Spark's."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from beam_envelope import KeyProvider, create_parquet, open_parquet
from benchmarks.columns import spark_session
from benchmarks.data import check, new_key
from benchmarks.machine import work_folder
from benchmarks.measure import Sample, Samples, interleave, timed
from benchmarks.peers import CONTEXT, OURS
from benchmarks.records import ratio
from benchmarks.results import Measurement, Row, Target, speed_rows
from benchmarks.settings import MIB, Say, Settings
from benchmarks.shards import Drop

PLAIN: Final = "plain Parquet"
SPARK: Final = "Spark, plain, local[2]"
MAX_WRITE: Final = 1.15
MAX_READ: Final = 1.20
MAX_PIPELINE: Final = 1.15
MIN_TIMES_SPARK: Final = 1.0
_FILES: Final = 8
_ROW_BYTES: Final = 78
_OPTIONS: Final[dict[str, Any]] = {"compression": "snappy"}


def measure_parquet(settings: Settings, say: Say) -> Measurement:
    """Measure all."""
    table = _table(settings.parquet_bytes // _ROW_BYTES)
    size = table.nbytes
    with work_folder(12 * size, settings.folder) as folder:
        key = new_key(folder)
        say("a file in memory")
        write, read = _file(table, key, settings.rounds)
        say("a pipeline")
        parts = folder / "plain"
        parts.mkdir()
        rows = -(-table.num_rows // _FILES)
        for number in range(_FILES):
            part = table.slice(number * rows, rows)
            pq.write_table(part, parts / f"part-{number}.parquet", row_group_size=rows, **_OPTIONS)
        pipeline = interleave(
            {
                PLAIN: partial(_timed_pipeline, parts, folder / "out", None),
                OURS: partial(_timed_pipeline, parts, folder / "out", key),
            },
            settings.job_rounds,
            before_round=lambda number: say(f"a pipeline, round {number} of {settings.job_rounds}"),
        )
        say("a job beside Spark")
        job = _jobs(parts, folder, key, settings)
    groups = {"write": write, "read": read, "pipeline": pipeline, "job, 2 processes": job}
    bars: list[Row] = []
    for name, samples in groups.items():
        bars += speed_rows(name, samples, size, [OURS])
    targets = [
        Target("write Parquet: processor time of plain", _cpu(write), MAX_WRITE, "x", at_least=False),
        Target("read Parquet: processor time of plain", _cpu(read), MAX_READ, "x", at_least=False),
        Target("read, encrypt, write in a pipeline: of plain", _cpu(pipeline), MAX_PIPELINE, "x", at_least=False),
    ]
    if SPARK in job:
        targets.append(Target("EncryptTables, against Spark", ratio(job[SPARK], job[OURS]), MIN_TIMES_SPARK, "x"))
    return Measurement(
        "parquet",
        f"Parquet, a table of {size / MIB:.0f} MiB in memory, snappy, {_FILES} row groups, all columns encrypted",
        "MB/s",
        "create_parquet and open_parquet against pyarrow's ParquetWriter and ParquetFile, one thread, from and to "
        "memory; ReadFromParquetBatched into WriteEncryptedParquet against WriteToParquetBatched, in Beam's in-memory "
        "runner; EncryptTables over 8 files in two worker processes (their phase, as in `jobs`) against Spark on two "
        "cores, which reads and writes the same files without encrypting (its start is not counted). MB are of the "
        "table in memory.",
        tuple(bars),
        tuple(targets),
        () if SPARK in job else ("Spark was not measured: it takes Java and pyspark.",),
    )


def _table(n: int) -> pa.Table:
    generator = np.random.default_rng(20)
    numbers = generator.integers(0, 2**40, n)
    return pa.table(
        {
            "id": numbers,
            "price": generator.random(n),
            "rate": generator.random(n).round(3),
            "country": pa.array(np.array(["DE", "FR", "IT", "ES", "PL"])[generator.integers(0, 5, n)]),
            "email": pa.array([f"user{number}@example.com" for number in numbers.tolist()]),
            "note": pa.array([f"note {number % 1_000_003}" for number in numbers.tolist()]),
        }
    )


def _file(table: pa.Table, key: KeyProvider, rounds: int) -> tuple[Samples, Samples]:
    row_group = -(-table.num_rows // _FILES)

    def write_plain(sink: Any) -> None:
        with pq.ParquetWriter(sink, table.schema, **_OPTIONS) as writer:
            writer.write_table(table, row_group_size=row_group)

    def write_ours(sink: Any, key_file: BinaryIO) -> None:
        with create_parquet(sink, table.schema, key=key, context=CONTEXT, key_file=key_file, **_OPTIONS) as writer:
            writer.write_table(table, row_group_size=row_group)

    plain, ours, key_file = io.BytesIO(), io.BytesIO(), io.BytesIO()
    write_plain(plain)
    write_ours(ours, key_file)

    def read_plain() -> pa.Table:
        return pq.ParquetFile(io.BytesIO(plain.getbuffer())).read(use_threads=False)

    def read_ours() -> pa.Table:
        source = cast("BinaryIO", io.BytesIO(ours.getbuffer()))
        with open_parquet(source, key=key, context=CONTEXT, key_file=key_file.getvalue()) as reader:
            return reader.read()

    check(read_ours().equals(table) and read_plain().equals(table), "a table was not read as it was written")
    write = interleave(
        {
            PLAIN: lambda: timed(lambda: write_plain(Drop())),
            OURS: lambda: timed(lambda: write_ours(Drop(), io.BytesIO())),
        },
        rounds,
    )
    return write, interleave({PLAIN: lambda: timed(read_plain), OURS: lambda: timed(read_ours)}, rounds)


def _timed_pipeline(parts: Path, output: Path, key: KeyProvider | None) -> Sample:
    shutil.rmtree(output, ignore_errors=True)
    return timed(partial(_pipeline, parts, output, key))


def _pipeline(parts: Path, output: Path, key: KeyProvider | None) -> None:
    import apache_beam as beam  # noqa: PLC0415  # it takes seconds to import, and other measurements need none of it
    from apache_beam.options.pipeline_options import PipelineOptions  # noqa: PLC0415

    from beam_envelope import WriteEncryptedParquet  # noqa: PLC0415

    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    schema = pq.read_schema(parts / "part-0.parquet")
    prefix = str(output / "part")
    sink: Any = (
        beam.io.WriteToParquetBatched(prefix, schema, codec="snappy", file_name_suffix=".parquet")
        if key is None
        else WriteEncryptedParquet(prefix, schema, key=key, context=CONTEXT, **_OPTIONS)
    )
    with beam.Pipeline("FnApiRunner", options=PipelineOptions([])) as pipeline:
        _ = pipeline | beam.io.ReadFromParquetBatched(f"{parts}/*.parquet") | sink


def _jobs(parts: Path, folder: Path, key: KeyProvider, settings: Settings) -> Samples:
    from beam_envelope import EncryptTables  # noqa: PLC0415
    from benchmarks.jobs import run_job  # noqa: PLC0415

    output = folder / "sealed"
    transform = EncryptTables(str(output), key=key, context=CONTEXT)
    ours = partial(run_job, transform, f"{parts}/*", output, 2)
    with _spark_job(parts, folder / "spark") as spark:
        contenders = {OURS: ours, **({} if spark is None else {SPARK: partial(timed, spark)})}
        return interleave(contenders, settings.job_rounds)


@contextlib.contextmanager
def _spark_job(parts: Path, output: Path) -> Iterator[Callable[[], object] | None]:
    with spark_session(2) as session:
        yield (
            None
            if session is None
            else lambda: session.read.parquet(str(parts)).write.mode("overwrite").parquet(str(output))
        )


def _cpu(samples: Samples) -> float:
    """Return our processor time as a multiple of the plain one's: the median over the rounds."""
    pairs = zip(samples[OURS], samples[PLAIN], strict=True)
    return statistics.median((ours.cpu_s or 0) / (plain.cpu_s or 1) for ours, plain in pairs)
