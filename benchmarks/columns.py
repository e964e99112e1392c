"""Columns of cells: EncryptColumns' work on Arrow strings, beside a loop over the cells and Spark's aes_encrypt."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from beam_envelope import DataKeyPolicy
from beam_envelope.formats.dataset_key import DeterministicEncryptor
from beam_envelope.formats.keystore import LocalKeyStore
from beam_envelope.formats.record import RecordDecryptor, RecordEncryptor
from beam_envelope.formats.table import decrypt_columns, encrypt_columns
from benchmarks.data import check, new_key
from benchmarks.machine import work_folder
from benchmarks.measure import Sample, Samples, interleave, timed
from benchmarks.peers import CONTEXT, OURS
from benchmarks.records import BARE, rate_rows, ratio
from benchmarks.results import Measurement, Target
from benchmarks.settings import MIB, Say, Settings

SPARK: Final = "Spark aes_encrypt, local[1]"
DISTINCT: Final = "all distinct"
FEW: Final = "1 000 distinct"
MAX_TIMES_BARE: Final = 1.25
MIN_TIMES_SPARK: Final = 3
MIN_TIMES_DISTINCT: Final = 50
_STAT: Final = "/proc/{}/stat"


def measure_columns(settings: Settings, say: Say) -> Measurement:
    """Measure a column of strings, by cell."""
    n = settings.cells
    emails = pa.array([f"user-{number}@example.com" for number in range(n)])
    few = pa.array([f"user-{number % 1000}@example.com" for number in range(n)])
    with work_folder(MIB, settings.folder) as folder:
        key = new_key(folder)
        store = LocalKeyStore(folder / "keys")
        encryptor = RecordEncryptor([key], store, CONTEXT, DataKeyPolicy(max_age_s=3600))
        decryptor = RecordDecryptor([key], store, CONTEXT)
        dataset_key = DeterministicEncryptor([key], store, CONTEXT)
        table = pa.table({"email": emails})
        encrypt = partial(encrypt_columns, columns=["email"], encryptor=encryptor)
        decrypt = partial(decrypt_columns, columns=["email"], decryptor=decryptor)
        equal = partial(encrypt, deterministic={"email": "email"}, dataset_key=dataset_key)
        sealed = encrypt(table)
        check(decrypt(sealed).equals(table), "a column was not decrypted to what it was")
        tables = {DISTINCT: table, FEW: pa.table({"email": few})}
        equals = {name: equal(of) for name, of in tables.items()}
        check(all(decrypt(equals[name]).equals(tables[name]) for name in tables), "a deterministic column differs")

        say("cells")
        with _spark(n) as spark:
            contenders = {
                BARE: _per_cell(partial(_bare_encrypt, emails), n),
                OURS: _per_cell(partial(encrypt, table), n),
                **({} if spark is None else {SPARK: lambda: Sample(spark() / n)}),
            }
            write = interleave(contenders, settings.rounds)
        bare = _bare_sealed(emails)
        read = interleave(
            {BARE: _per_cell(partial(_bare_decrypt, *bare), n), OURS: _per_cell(partial(decrypt, sealed), n)},
            settings.rounds,
        )
        say("deterministic")
        det_write = interleave({name: _per_cell(partial(equal, of), n) for name, of in tables.items()}, settings.rounds)
        det_read = interleave(
            {name: _per_cell(partial(decrypt, of), n) for name, of in equals.items()}, settings.rounds
        )
    return Measurement(
        "columns",
        f"A column of {n:,} strings, one thread",
        "cells/CPU s",
        "encrypt_columns and decrypt_columns, Arrow in and out, against a loop of AESGCM.encrypt(os.urandom(12), cell, "
        "header) over a list of the same cells, which makes no Arrow column, and against Spark's aes_encrypt over the "
        "same strings, cached, written nowhere (its start is not counted). Deterministic: the same column with few and "
        "with many distinct values. All by processor time.",
        (
            *rate_rows("encrypt", write, [OURS]),
            *rate_rows("decrypt", read, [OURS]),
            *rate_rows("encrypt, deterministic", det_write, [DISTINCT, FEW]),
            *rate_rows("decrypt, deterministic", det_read, [DISTINCT, FEW]),
        ),
        tuple(_targets(write, det_write, det_read)),
        () if SPARK in write else ("Spark was not measured: it takes Java and pyspark.",),
    )


def _targets(write: Samples, det_write: Samples, det_read: Samples) -> Iterator[Target]:
    text = "time of the bare AESGCM loop over the cells"
    yield Target(f"encrypt a column: {text}", ratio(write[OURS], write[BARE]), MAX_TIMES_BARE, "x", at_least=False)
    if SPARK in write:
        times = ratio(write[SPARK], write[OURS])
        yield Target("encrypt a column: against Spark's aes_encrypt, per core", times, MIN_TIMES_SPARK, "x")
    for name, samples in (("encrypt", det_write), ("decrypt", det_read)):
        times = ratio(samples[DISTINCT], samples[FEW])
        yield Target(f"{name} deterministically: few distinct values against all", times, MIN_TIMES_DISTINCT, "x")


def _per_cell(work: Callable[[], object], n: int) -> Callable[[], Sample]:
    return lambda: Sample((timed(work).cpu_s or 0.0) / n)


def _bare_encrypt(cells: pa.Array) -> list[bytes]:
    encrypt, header = AESGCM(os.urandom(32)).encrypt, os.urandom(17)
    return [encrypt(os.urandom(12), cell, header) for cell in cells.cast(pa.binary()).to_pylist()]


def _bare_sealed(cells: pa.Array) -> tuple[AESGCM, bytes, list[tuple[bytes, bytes]]]:
    gcm, header = AESGCM(os.urandom(32)), os.urandom(17)
    nonces = [os.urandom(12) for _ in range(len(cells))]
    plain = cells.cast(pa.binary()).to_pylist()
    return gcm, header, [(nonce, gcm.encrypt(nonce, cell, header)) for nonce, cell in zip(nonces, plain, strict=True)]


def _bare_decrypt(gcm: AESGCM, header: bytes, sealed: list[tuple[bytes, bytes]]) -> list[bytes]:
    decrypt = gcm.decrypt
    return [decrypt(nonce, cell, header) for nonce, cell in sealed]


@contextlib.contextmanager
def spark_session(cores: int) -> Iterator[Any]:
    """Give a Spark session on so many cores of this machine, or None where there is no Spark."""
    if importlib.util.find_spec("pyspark") is None or (shutil.which("java") is None and "JAVA_HOME" not in os.environ):
        yield None
        return
    from pyspark.sql import SparkSession  # noqa: PLC0415  # of the extra `bench`; it starts Java

    settings = {"spark.ui.enabled": "false", "spark.log.level": "ERROR", "spark.driver.memory": "2g"}
    session: Any = SparkSession.builder.master(f"local[{cores}]").config(map=settings).getOrCreate()
    try:
        yield session
    finally:
        session.stop()


@contextlib.contextmanager
def _spark(n: int) -> Iterator[Callable[[], float] | None]:
    """Give a call that has Spark encrypt the same strings on one core, and returns the processor time that took.

    None where there is no Spark, or no Linux to tell its processor time: its Java has threads besides the one that
    encrypts, which take a second core.
    """
    with spark_session(1) as session:
        if session is None or not Path(_STAT.format("self")).exists():
            yield None
            return
        from pyspark.sql import functions  # noqa: PLC0415

        email = functions.concat(functions.lit("user-"), functions.col("id"), functions.lit("@example.com"))
        frame = session.range(n).select(email.alias("email")).cache()
        frame.count()
        sealed = frame.selectExpr(f"aes_encrypt(email, unhex('{os.urandom(32).hex()}'))")
        java = session.sparkContext._gateway.proc.pid  # noqa: SLF001  # no public name

        def run() -> float:
            before = _processor_s(java)
            sealed.write.format("noop").mode("overwrite").save()
            return _processor_s(java) - before

        yield run


def _processor_s(process: int) -> float:
    """Return the processor time of a process, from Linux (proc(5))."""
    fields = Path(_STAT.format(process)).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
