"""Records, one by one and in a pipeline: compact envelopes and AWS Encryption SDK messages, beside their peers."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from beam_envelope import DataKeyPolicy, KeyProvider
from beam_envelope.formats.keystore import LocalKeyStore
from beam_envelope.formats.record import RecordDecryptor, RecordEncryptor
from benchmarks.data import check, new_key
from benchmarks.machine import work_folder
from benchmarks.measure import Sample, Samples, interleave, timed
from benchmarks.peers import CONTEXT, ESDK, OURS, esdk_records
from benchmarks.results import Measurement, Row, Target
from benchmarks.settings import MIB, Say, Settings

BARE: Final = "AESGCM alone"
MESSAGES: Final = "beam_envelope, SDK messages"
IDENTITY: Final = "identity Map"
SIZES: Final = (100, 1000)
MAX_TIMES_BARE: Final = 1.6
MIN_TIMES_ESDK: Final = 60
MIN_TIMES_ESDK_MESSAGES: Final = 12
MAX_TIMES_IDENTITY: Final = 1.25
_SLOWER: Final = 100  # so many times fewer records for a peer that would take minutes


def measure_records(settings: Settings, say: Say) -> Measurement:
    """Measure records in a loop, by peers that encrypt one message at a time."""
    rows: list[Row] = []
    targets: list[Target] = []
    with work_folder(MIB, settings.folder) as folder:
        key = new_key(folder)
        for size in SIZES:
            say(f"records of {size} bytes")
            write, read = _loops(size, settings, key, folder)
            for group, samples in ((f"encrypt, {size} B", write), (f"decrypt, {size} B", read)):
                rows += rate_rows(group, samples, [OURS, MESSAGES])
                targets += [
                    Target(
                        f"{group}: time of bare AESGCM.encrypt",
                        ratio(samples[OURS], write[BARE]),
                        MAX_TIMES_BARE,
                        "x",
                        at_least=False,
                    ),
                    Target(
                        f"{group}: against {ESDK}, caching", ratio(samples[ESDK], samples[OURS]), MIN_TIMES_ESDK, "x"
                    ),
                    Target(
                        f"{group}, SDK messages: against {ESDK}",
                        ratio(samples[ESDK], samples[MESSAGES]),
                        MIN_TIMES_ESDK_MESSAGES,
                        "x",
                    ),
                ]
    return Measurement(
        "records",
        "Records in a loop, one process, one thread",
        "records/s",
        "RecordEncryptor and RecordDecryptor, and AWS Encryption SDK messages of ours, against a loop of "
        "AESGCM.encrypt(os.urandom(12), record, header), and against aws-encryption-sdk with its caching materials "
        "manager (suite 0x0478, a raw AES key: no KMS is in it). Every one keeps its data key for the whole loop.",
        tuple(rows),
        tuple(targets),
    )


def measure_record_pipeline(settings: Settings, say: Say) -> Measurement:
    """Measure EncryptRecords in a pipeline against a Map that does nothing."""
    rows: list[Row] = []
    targets = []
    with work_folder(MIB, settings.folder) as folder:
        key = new_key(folder)
        for size in SIZES:
            contenders = {
                IDENTITY: partial(_pipeline, settings.pipeline_records, size, None, folder),
                OURS: partial(_pipeline, settings.pipeline_records, size, key, folder),
            }
            samples = interleave(
                {name: partial(timed, run) for name, run in contenders.items()},
                settings.job_rounds,
                before_round=lambda number, size=size: say(f"{size} bytes, round {number} of {settings.job_rounds}"),  # type: ignore[misc]  # a default, as a loop's variable needs it
            )
            cpu = {
                name: [Sample((run.cpu_s or 0.0) / settings.pipeline_records) for run in runs]
                for name, runs in samples.items()
            }
            rows += rate_rows(f"{size} B", cpu, [OURS])
            target = f"EncryptRecords, {size} B: processor time of a pipeline with an identity Map"
            targets.append(Target(target, ratio(cpu[OURS], cpu[IDENTITY]), MAX_TIMES_IDENTITY, "x", at_least=False))
    return Measurement(
        "pipeline",
        f"EncryptRecords in a pipeline of {settings.pipeline_records:,} records",
        "records/CPU s",
        "Beam's in-memory runner: the records are made, encrypted (or passed on by a Map that does nothing), shuffled "
        "and counted. Processor time of the whole pipeline.",
        tuple(rows),
        tuple(targets),
    )


def rate_rows(group: str, samples: Samples, ours: Sequence[str]) -> list[Row]:
    """Return rows in records per second for samples of the seconds that one record takes."""
    first = next(iter(samples.values()))
    rows = []
    for name, runs in samples.items():
        rates = [1 / run.wall_s for run in runs]
        relative = ratio(first, runs)
        rows.append(Row(group, name, statistics.median(rates), min(rates), max(rates), name in ours, relative))
    return rows


def ratio(slow: Sequence[Sample], fast: Sequence[Sample]) -> float:
    """Return how many times as long `slow` takes: the median over the rounds."""
    return statistics.median(a.wall_s / b.wall_s for a, b in zip(slow, fast, strict=True))


def _loops(size: int, settings: Settings, key: KeyProvider, folder: Path) -> tuple[Samples, Samples]:
    from beam_envelope.formats.esdk import MessageDecryptor, MessageEncryptor  # noqa: PLC0415

    n_records = settings.records
    store, record = LocalKeyStore(folder / "keys"), os.urandom(size)
    header, bare = os.urandom(17), AESGCM(AESGCM.generate_key(256))
    encryptor = RecordEncryptor([key], store, CONTEXT, DataKeyPolicy(max_age_s=3600))
    decryptor = RecordDecryptor([key], store, CONTEXT)
    message_encryptor = MessageEncryptor(key.generate_data_key(CONTEXT), CONTEXT)
    message_decryptor = MessageDecryptor([key], CONTEXT)
    sdk_encrypt, sdk_decrypt = esdk_records()
    sealed, message, sdk_message = encryptor.encrypt(record), message_encryptor.encrypt(record), sdk_encrypt(record)
    nonce = os.urandom(12)
    bare_sealed = bare.encrypt(nonce, record, header)
    for opened in (
        decryptor.decrypt(sealed),
        message_decryptor.decrypt(message),
        sdk_decrypt(sdk_message),
        bare.decrypt(nonce, bare_sealed, header),
    ):
        check(opened == record, "a record was not decrypted to what it was")

    def bare_loop(n_times: int) -> None:
        for _ in range(n_times):
            bare.encrypt(os.urandom(12), record, header)

    def bare_open_loop(n_times: int) -> None:
        for _ in range(n_times):
            bare.decrypt(nonce, bare_sealed, header)

    write = {
        BARE: _per_record(bare_loop, n_records),
        OURS: _per_record(_loop(encryptor.encrypt, record), n_records),
        MESSAGES: _per_record(_loop(message_encryptor.encrypt, record), n_records // 10),
        ESDK: _per_record(_loop(sdk_encrypt, record), n_records // _SLOWER),
    }
    read = {
        BARE: _per_record(bare_open_loop, n_records),
        OURS: _per_record(_loop(decryptor.decrypt, sealed), n_records),
        MESSAGES: _per_record(_loop(message_decryptor.decrypt, message), n_records // 10),
        ESDK: _per_record(_loop(sdk_decrypt, sdk_message), n_records // _SLOWER),
    }
    return interleave(write, settings.rounds), interleave(read, settings.rounds)


def _loop(work: Callable[[bytes], bytes], argument: bytes) -> Callable[[int], None]:
    def run(n_times: int) -> None:
        for _ in range(n_times):
            work(argument)

    return run


def _per_record(loop: Callable[[int], None], n_times: int) -> Callable[[], Sample]:
    return lambda: Sample(timed(partial(loop, n_times)).wall_s / n_times)


def _pipeline(n_records: int, size: int, key: KeyProvider | None, folder: Path) -> None:
    import apache_beam as beam  # noqa: PLC0415  # it takes seconds to import, and other measurements need none of it
    from apache_beam.options.pipeline_options import PipelineOptions  # noqa: PLC0415

    from beam_envelope import EncryptRecords  # noqa: PLC0415

    per_seed = 1000
    record = os.urandom(size)
    step: Any = (
        beam.Map(lambda element: element).with_output_types(bytes)
        if key is None
        else EncryptRecords(key=key, keys=str(folder / "keys"), context=CONTEXT)
    )
    with beam.Pipeline("FnApiRunner", options=PipelineOptions([])) as pipeline:
        _ = (
            pipeline
            | beam.Create(range(n_records // per_seed))
            | "Make" >> beam.FlatMap(lambda _: [record] * per_seed).with_output_types(bytes)
            | "Step" >> step
            | beam.Reshuffle()
            | beam.combiners.Count.Globally()
        )
