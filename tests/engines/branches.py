"""Every transform of ours as a branch of a job: what is encrypted, how it is read again, and what must come out.

All branches read the files that `prepare` made, on the workers: a job's graph, which engines store, then holds no
plaintext. Each has a folder of its own below the `place` of a run: `sealed`, `keys`, and `opened` for what was read.
"""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.transforms.error_handling import CollectingErrorHandler

from beam_envelope import (
    DecryptColumns,
    DecryptFields,
    DecryptFiles,
    DecryptRecords,
    DecryptTables,
    EncryptColumns,
    EncryptFields,
    EncryptFiles,
    EncryptRecords,
    EncryptTables,
    ReadEncryptedParquet,
    ReadEncryptedParquetBatched,
    ReadEncryptedText,
    RotateKeys,
    VerifyShards,
    WriteEncryptedParquet,
    WriteEncryptedText,
    create_shard,
)

KEY, NEW_KEY, OTHER_KEY = "aws-kms://alias/etl", "aws-kms://alias/new", "aws-kms://alias/other"
CONTEXT = {"dataset": "people"}
CANARY = "CANARY-7f3a-4111"
N_FILES, N_ROWS = 4, 50
SCHEMA = pa.schema([("id", pa.int64()), ("email", pa.string()), ("amount", pa.float64())])


class Branch(NamedTuple):
    """One transform and its inverse.

    Attributes:
        encrypt: from (begin, place), where files are, to the output of the encrypting transform.
        decrypt: from (begin, place, key, handler) to texts, or to what the decrypting transform says of its files.
        writes: whether the decrypting transform writes files itself, below `opened`.
        handler: whether the decrypting transform takes an error handler; of the others, a wrong key fails the job, or,
            of `verify`, is what they say of each file.
        bundles: how many data keys a job may ask the KMS for at most, however many records there are.
    """

    encrypt: Callable
    decrypt: Callable
    writes: bool = False
    handler: bool = True
    bundles: int = N_FILES


class Step(beam.PTransform):
    """One step of a branch; its name makes those of its transforms unique in the job."""

    def __init__(self, build):
        super().__init__()
        self._build = build

    def expand(self, begin):
        return self._build(begin)


def row(file, number):
    """Return one made-up row."""
    return {"id": file * N_ROWS + number, "email": f"{CANARY}-{file}-{number}@example.org", "amount": number / 4}


def rows_of(path):
    """Read a file of JSON lines."""
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def table_of(path):
    """Read a file of JSON lines as a table."""
    return pa.Table.from_pylist(rows_of(path), SCHEMA)


def sources(place):
    """Return the files that all branches read."""
    return [f"{place}/data/{number}.jsonl" for number in range(N_FILES)]


def expected_rows():
    """Return all rows, sorted, as JSON."""
    return sorted(as_text(row(file, number)) for file in range(N_FILES) for number in range(N_ROWS))


def as_text(element):
    """Return a row as JSON."""
    return json.dumps(element, sort_keys=True)


def prepare(place):
    """Write the plain files of all branches, and shards for those that need some."""
    for name in BRANCHES:
        here = Path(place, name)
        (here / "data").mkdir(parents=True)
        for number, path in enumerate(sources(here)):
            Path(path).write_text("".join(as_text(row(number, n)) + "\n" for n in range(N_ROWS)))
            if name == "tables":
                (here / "tables").mkdir(exist_ok=True)
                pq.write_table(table_of(path), here / "tables" / f"{number}.parquet")
            elif name in {"rotate", "verify"}:
                with create_shard(here / "sealed" / Path(path).name, key=KEY, context=CONTEXT) as shard:
                    shard.write(Path(path).read_bytes())
    damaged = Path(place, "verify", "sealed", "3.jsonl")
    *whole, last = damaged.read_bytes()
    damaged.write_bytes(bytes([*whole, last ^ 1]))


def build(pipeline, step, names, place):
    """Add a step of some branches to a pipeline.

    Args:
        pipeline: is changed.
        step: `encrypt`; `decrypt`; `wrong key`, which decrypts with another key and must fail; or `wrong keys`, which
            does so with an error handler for each branch.
        names: the branches.
        place: the folder of the run.
    """
    for name in names:
        if step == "encrypt":
            _ = pipeline | name >> Step(lambda begin, name=name: BRANCHES[name].encrypt(begin, f"{place}/{name}"))
        else:
            shutil.rmtree(f"{place}/{name}/opened", ignore_errors=True)
            _ = pipeline | name >> Step(lambda begin, name=name: _decrypt(begin, step, name, f"{place}/{name}"))


def _decrypt(begin, step, name, here):
    branch, key = BRANCHES[name], KEY if step == "decrypt" else OTHER_KEY
    if step != "wrong keys" or not branch.handler:
        output = branch.decrypt(begin, here, key, None)
        return output if branch.writes else output | "Write" >> beam.io.WriteToText(f"{here}/opened/part")
    with CollectingErrorHandler() as failures:
        branch.decrypt(begin, here, key, failures)
    reasons = failures.output() | "Reasons" >> beam.Map(lambda failed: f"{failed.error}: {failed.message}")
    return reasons | "Failed" >> beam.io.WriteToText(f"{here}/opened/failed")


def read_back(place, name):
    """Return what was decrypted of a branch, in the form of `expected`."""
    opened = Path(place, name, "opened")
    if name == "split files":  # the parts of each file, joined in order
        whole = {}
        for path in sorted(opened.iterdir()):
            source = path.name.partition("-")[0] + ".jsonl"
            whole[source] = whole.get(source, b"") + path.read_bytes()
        return whole
    if name == "tables":
        return sorted(as_text(row) for path in opened.iterdir() for row in pq.read_table(path).to_pylist())
    if BRANCHES[name].writes:
        return {path.name: path.read_bytes() for path in opened.iterdir()}
    return sorted(line for path in opened.glob("part*") for line in path.read_text().splitlines())


def expected(place, name):
    """Return what has to come out of a branch."""
    if name == "verify":
        return sorted([*(f"{number}.jsonl True" for number in range(3)), "3.jsonl False"])
    if BRANCHES[name].writes and name != "tables":
        return {Path(path).name: Path(path).read_bytes() for path in sources(f"{place}/{name}")}
    rows = expected_rows()
    return sorted(rows * 2) if name == "parquet" else rows  # read as rows and as tables


# ------------------------------------------------------------------------------------------- on the workers


def to_base64(data):
    """Return bytes as a line of text."""
    return base64.b64encode(data).decode()


def from_base64(text):
    """The inverse of `to_base64`."""
    return base64.b64decode(text)


def table_to_base64(table):
    """Return a table as a line of text."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return to_base64(sink.getvalue().to_pybytes())


def table_from_base64(text):
    """The inverse of `table_to_base64`."""
    return pa.ipc.open_stream(from_base64(text)).read_all()


def rows_of_table(table):
    """Return the rows of a table as texts."""
    return [as_text(row) for row in table.to_pylist()]


def utf8(element):
    """Return a text as bytes."""
    return element.encode()


def said(file):
    """Return what VerifyShards says of a file, without its folder."""
    return f"{Path(file.path).name} {file.ok}"


def problem_of(file):
    """Return what is wrong with a file."""
    return file.problem


# --------------------------------------------------------------------------------------------- the branches


def _rows(begin, here):
    files = begin | "Sources" >> beam.Create(sources(here))
    return files | "Rows" >> beam.FlatMap(rows_of)


def _lines(begin, here):
    return _rows(begin, here) | "Lines" >> beam.Map(as_text)


def _sealed_lines(begin, here):
    return begin | "Sealed" >> beam.io.ReadFromText(f"{here}/sealed/part*")


def _element_settings(here, key=KEY):
    return {"key": key, "keys": f"{here}/keys", "context": CONTEXT}


def _write_lines(lines, here):
    return lines | "Write" >> beam.io.WriteToText(f"{here}/sealed/part")


def encrypt_files(begin, here, **settings):
    """EncryptFiles."""
    files = begin | beam.Create([f"{here}/data"])
    return files | EncryptFiles(f"{here}/sealed", key=KEY, context=CONTEXT, **settings)


def decrypt_files(begin, here, key, handler):
    """DecryptFiles."""
    transform = DecryptFiles(f"{here}/opened", key=key, context=CONTEXT).with_error_handler(handler)
    return begin | beam.Create([f"{here}/sealed"]) | transform


def split_files(begin, here):
    """EncryptFiles with split_lines."""
    return encrypt_files(begin, here, split_lines="2KiB")


def write_text(begin, here):
    """WriteEncryptedText."""
    return _lines(begin, here) | WriteEncryptedText(f"{here}/sealed/part", key=KEY, context=CONTEXT)


def read_text(begin, here, key, handler):
    """ReadEncryptedText."""
    return begin | ReadEncryptedText(f"{here}/sealed/part*", key=key, context=CONTEXT)


def write_path(begin, here):
    """Beam's WriteToText on an encrypted path; the key is that of the options or of the environment."""
    return _lines(begin, here) | beam.io.WriteToText(f"envelope+file://{here}/sealed/part")


def read_path(begin, here, key, handler):
    """Beam's ReadFromText on an encrypted path."""
    return begin | beam.io.ReadFromText(f"envelope+file://{here}/sealed/part*")


def write_parquet(begin, here):
    """WriteEncryptedParquet, with a column under a key of its own."""
    prefix, columns = f"{here}/sealed/part", {"email": NEW_KEY}
    return _rows(begin, here) | WriteEncryptedParquet(prefix, SCHEMA, key=KEY, columns=columns, context=CONTEXT)


def read_parquet(begin, here, key, handler):
    """ReadEncryptedParquet and ReadEncryptedParquetBatched."""
    pattern, settings = f"{here}/sealed/part*", {"key": [key, NEW_KEY], "context": CONTEXT}
    rows = begin | ReadEncryptedParquet(pattern, **settings) | "Texts" >> beam.Map(as_text)
    tables = begin | ReadEncryptedParquetBatched(pattern, **settings) | "Rows" >> beam.FlatMap(rows_of_table)
    return (rows, tables) | beam.Flatten()


def encrypt_records(begin, here):
    """EncryptRecords, compact."""
    sealed = _lines(begin, here) | EncryptRecords(**_element_settings(here))
    return _write_lines(sealed | beam.Map(to_base64), here)


def decrypt_records(begin, here, key, handler):
    """DecryptRecords, compact."""
    sealed = _sealed_lines(begin, here) | beam.Map(from_base64)
    return sealed | DecryptRecords(coder=str, **_element_settings(here, key)).with_error_handler(handler)


def encrypt_messages(begin, here):
    """EncryptRecords, self-contained."""
    sealed = _lines(begin, here) | EncryptRecords(key=KEY, format="aws-encryption-sdk", context=CONTEXT)
    return _write_lines(sealed | beam.Map(to_base64), here)


def decrypt_messages(begin, here, key, handler):
    """DecryptRecords, self-contained."""
    sealed = _sealed_lines(begin, here) | beam.Map(from_base64)
    transform = DecryptRecords(coder=str, key=key, format="aws-encryption-sdk", context=CONTEXT)
    return sealed | transform.with_error_handler(handler)


def encrypt_fields(begin, here):
    """EncryptFields."""
    sealed = _rows(begin, here) | EncryptFields(["email", "amount"], encoding="base64", **_element_settings(here))
    return _write_lines(sealed | beam.Map(as_text), here)


def decrypt_fields(begin, here, key, handler):
    """DecryptFields."""
    transform = DecryptFields(["email", "amount"], **_element_settings(here, key)).with_error_handler(handler)
    return _sealed_lines(begin, here) | beam.Map(json.loads) | transform | "Texts" >> beam.Map(as_text)


def encrypt_columns(begin, here):
    """EncryptColumns."""
    tables = begin | "Sources" >> beam.Create(sources(here)) | "Tables" >> beam.Map(table_of)
    sealed = tables | EncryptColumns(["email", "amount"], **_element_settings(here))
    return _write_lines(sealed | beam.Map(table_to_base64), here)


def decrypt_columns(begin, here, key, handler):
    """DecryptColumns."""
    transform = DecryptColumns(["email", "amount"], **_element_settings(here, key)).with_error_handler(handler)
    return _sealed_lines(begin, here) | beam.Map(table_from_base64) | transform | "Rows" >> beam.FlatMap(rows_of_table)


def encrypt_tables(begin, here):
    """EncryptTables."""
    return begin | beam.Create([f"{here}/tables"]) | EncryptTables(f"{here}/sealed", key=KEY, context=CONTEXT)


def decrypt_tables(begin, here, key, handler):
    """DecryptTables."""
    transform = DecryptTables(f"{here}/opened", key=key, context=CONTEXT).with_error_handler(handler)
    return begin | beam.Create([f"{here}/sealed"]) | transform


def rotate(begin, here):
    """RotateKeys."""
    return begin | beam.Create([f"{here}/sealed"]) | RotateKeys(KEY, to=NEW_KEY)


def decrypt_rotated(begin, here, key, handler):
    """DecryptFiles with the new key."""
    return decrypt_files(begin, here, NEW_KEY if key == KEY else KEY, handler)


def verify(begin, here, key, handler):
    """VerifyShards, of three shards that are whole and one that is not."""
    files = begin | beam.Create([f"{here}/sealed"]) | VerifyShards(key=key, context=CONTEXT)
    return files | beam.Map(said if key == KEY else problem_of)


def nothing(begin, here):
    """No step: the shards are there already."""
    return begin | beam.Create([0])


BRANCHES = {
    "files": Branch(encrypt_files, decrypt_files, writes=True),
    "split files": Branch(split_files, decrypt_files, writes=True, bundles=N_FILES * 3),
    "text": Branch(write_text, read_text, handler=False),
    "envelope+file": Branch(write_path, read_path, handler=False),
    "parquet": Branch(write_parquet, read_parquet, handler=False, bundles=N_FILES * 2),
    "records": Branch(encrypt_records, decrypt_records),
    "messages": Branch(encrypt_messages, decrypt_messages),
    "fields": Branch(encrypt_fields, decrypt_fields),
    "columns": Branch(encrypt_columns, decrypt_columns),
    "tables": Branch(encrypt_tables, decrypt_tables, writes=True),
    "rotate": Branch(rotate, decrypt_rotated, writes=True, bundles=0),
    "verify": Branch(nothing, verify, handler=False, bundles=0),
}
