"""The jobs that `test_kills.py` stops in the middle: what each writes, and how all of it is read again.

Each has a folder of its own below the `place` of a trial. All jobs of a trial read one folder of JSON lines.
"""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import pyarrow as pa

from beam_envelope import (
    DecryptRecords,
    EncryptFiles,
    EncryptRecords,
    ReadEncryptedParquet,
    ReadEncryptedText,
    RotateKeys,
    WriteEncryptedParquet,
    WriteEncryptedText,
    create_shard,
)
from beam_envelope.io.manifest import add_to_manifest, shard_on_store
from beam_envelope.keys.uri import open_keys
from tests.engines.branches import Step, as_text, rows_of, to_base64

KEY, NEW_KEY = "aws-kms://alias/etl", "aws-kms://alias/new"
CONTEXT = {"dataset": "people"}
N_FILES, N_ROWS, N_SHARDS, N_KEY_FILES = 8, 3_000, 8, 100
SCHEMA = pa.schema([("id", pa.int64()), ("email", pa.string())])


class KillJob(NamedTuple):
    """A job that is stopped.

    Attributes:
        write: from (begin, place, place of the data, if_exists) to the output of the writing transform.
        read: from (begin, place, key) to the lines that were written.
        key: the KMS key that opens them in the end.
        shards: whether what is written are shards with key files and a manifest.
    """

    write: Callable
    read: Callable
    key: str = KEY
    shards: bool = True


def row(number):
    """Return one made-up row."""
    return {"id": number, "email": f"somebody-{number}@example.org"}


def lines_of(file):
    """Return the lines of a data file."""
    return [as_text(row(file * N_ROWS + number)) for number in range(N_ROWS)]


def all_lines():
    """Return the lines of all data files."""
    return [line for file in range(N_FILES) for line in lines_of(file)]


def prepare(place):
    """Write the data, and the shards that are rotated, which hold the data's first file."""
    data, sealed = Path(place, "data"), Path(place, "rotate", "sealed")
    data.mkdir(parents=True)
    for file in range(N_FILES):
        (data / f"{file}.jsonl").write_text("".join(f"{line}\n" for line in lines_of(file)))
    lines = all_lines()
    for number in range(N_KEY_FILES):
        with create_shard(sealed / f"part-{number:03}", key=KEY, context=CONTEXT) as shard:
            shard.write("".join(f"{line}\n" for line in lines[number::N_KEY_FILES]).encode())
    shards = [shard_on_store(str(path)) for path in sorted(sealed.glob("part-*"))]
    add_to_manifest(f"{sealed}/", shards, open_keys(KEY), CONTEXT)


def start_trial(prepared, place):
    """Make the place of a trial out of what was prepared."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(Path(prepared, "rotate"), Path(place, "rotate"))
    Path(place, "data").symlink_to(Path(prepared, "data"))


def build(pipeline, names, place, if_exists):
    """Add jobs to a pipeline."""
    for name in names:
        _ = pipeline | name >> Step(
            lambda begin, name=name: JOBS[name].write(begin, f"{place}/{name}", f"{place}/data", if_exists)
        )


# --------------------------------------------------------------------------------------------------- the jobs


def _rows(begin, data):
    files = begin | beam.Create([f"{data}/{file}.jsonl" for file in range(N_FILES)]) | "Spread" >> beam.Reshuffle()
    return files | "Rows" >> beam.FlatMap(rows_of)


def _lines(begin, data):
    return _rows(begin, data) | "Lines" >> beam.Map(as_text)


def encrypt_files(begin, here, data, if_exists):
    """EncryptFiles with split_lines."""
    settings = {"key": KEY, "context": CONTEXT, "split_lines": "16KiB", "if_exists": if_exists}
    return begin | beam.Create([data]) | EncryptFiles(f"{here}/sealed", **settings)


def write_text(begin, here, data, if_exists):
    """WriteEncryptedText."""
    settings = {"key": KEY, "context": CONTEXT, "num_shards": N_SHARDS}
    return _lines(begin, data) | WriteEncryptedText(f"{here}/sealed/part", **settings)


def write_parquet(begin, here, data, if_exists):
    """WriteEncryptedParquet."""
    settings = {"key": KEY, "context": CONTEXT, "num_shards": N_SHARDS, "row_group_rows": 500}
    return _rows(begin, data) | WriteEncryptedParquet(f"{here}/sealed/part", SCHEMA, **settings)


def encrypt_records(begin, here, data, if_exists):
    """EncryptRecords into text."""
    sealed = _lines(begin, data) | EncryptRecords(key=KEY, keys=f"{here}/keys", context=CONTEXT)
    return sealed | beam.Map(to_base64) | beam.io.WriteToText(f"{here}/sealed/part", num_shards=N_SHARDS)


def rotate(begin, here, data, if_exists):
    """RotateKeys."""
    return begin | beam.Create([f"{here}/sealed/"]) | RotateKeys(KEY, to=NEW_KEY)


def read_text(begin, here, key):
    """ReadEncryptedText, of all that is in the folder."""
    return begin | ReadEncryptedText(f"{here}/sealed/*", key=key, context=CONTEXT, manifest="require")


def read_parquet(begin, here, key):
    """ReadEncryptedParquet."""
    rows = begin | ReadEncryptedParquet(f"{here}/sealed/*", key=key, context=CONTEXT, manifest="require")
    return rows | beam.Map(json.dumps, sort_keys=True)


def read_records(begin, here, key):
    """DecryptRecords."""
    sealed = begin | beam.io.ReadFromText(f"{here}/sealed/part-*") | beam.Map(base64.b64decode)
    return sealed | DecryptRecords(coder=str, key=key, keys=f"{here}/keys", context=CONTEXT)


JOBS = {
    "files": KillJob(encrypt_files, read_text),
    "text": KillJob(write_text, read_text),
    "parquet": KillJob(write_parquet, read_parquet),
    "records": KillJob(encrypt_records, read_records, shards=False),
    "rotate": KillJob(rotate, read_text, key=NEW_KEY),
}
