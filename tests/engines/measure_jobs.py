"""The jobs that `measure.py` times, each with its like without encryption. As a program it runs one of them."""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io import fileio
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineState

from beam_envelope import (
    EncryptColumns,
    EncryptFields,
    EncryptFiles,
    EncryptRecords,
    EncryptTables,
    WriteEncryptedParquet,
    WriteEncryptedText,
    jobs,
)
from tests.engines.branches import as_text, table_to_base64, to_base64, utf8

KEY = "aws-kms://alias/etl"
SCHEMA = pa.schema([("id", pa.int64()), ("text", pa.string())])

# An order as ETL jobs have them: of 1000 bytes, in a number and ten texts, of which two are of a person.
NAMES = [f"f{number}" for number in range(10)]
PERSONAL = ["f3", "f7"]
ORDERS = pa.schema([("id", pa.int64()), *((name, pa.string()) for name in NAMES)])
SEALED_ORDERS = pa.schema([(one.name, pa.binary() if one.name in PERSONAL else one.type) for one in ORDERS])


def _target(file, output):
    target = Path(output, Path(file.path).name)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _on_disk(target):
    """Be sure that a file is on the disk, as our writers are."""
    with target.open("rb+") as stream:
        os.fsync(stream.fileno())
    return str(target)


def _copy_in_kernel(file, output):
    """Copy a file as only local disks can: no byte of it comes into this process."""
    target = _target(file, output)
    shutil.copyfile(file.path, target)
    return _on_disk(target)


def _copy(file, output):
    """Copy a file through Beam's filesystems, in blocks, as any step must that looks at the bytes."""
    target = _target(file, output)
    with FileSystems.open(file.path) as source, FileSystems.create(str(target)) as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
    return _on_disk(target)


def _copy_table(file, output):
    """Copy a Parquet file through Arrow, by row groups."""
    with pq.ParquetFile(file.path) as table, pq.ParquetWriter(_target(file, output), table.schema_arrow) as writer:
        for number in range(table.num_row_groups):
            writer.write_table(table.read_row_group(number))
    return file.path


def row_of(line):
    """Return a line as a row of `SCHEMA`."""
    return {"id": int(line[:9]), "text": line[10:]}


def order_of(line):
    """Return a line as a row of `ORDERS`."""
    size = (len(line) - 10) // len(NAMES)
    starts = range(10, len(line), size)
    return {"id": int(line[:9]), **{name: line[at : at + size] for name, at in zip(NAMES, starts, strict=False)}}


def table_of(path, to_row=row_of, schema=SCHEMA):
    """Return the lines of a file as a table."""
    return pa.Table.from_pylist([to_row(line) for line in Path(path).read_text().splitlines()], schema)


def _lines(begin, data):
    return begin | beam.io.ReadFromText(f"{data}/*") | beam.Reshuffle()


def copy_files(begin, data, output, shards):
    """Files, copied."""
    files = begin | fileio.MatchFiles(f"{data}/*") | beam.Reshuffle()
    return files | "Copy" >> beam.Map(_copy, output)


def copy_files_in_kernel(begin, data, output, shards):
    """Files, copied by the kernel."""
    files = begin | fileio.MatchFiles(f"{data}/*") | beam.Reshuffle()
    return files | "Copy" >> beam.Map(_copy_in_kernel, output)


def encrypt_files(begin, data, output, shards):
    """EncryptFiles."""
    return begin | beam.Create([f"{data}/*"]) | EncryptFiles(output, key=KEY, if_exists="overwrite")


def plain_text(begin, data, output, shards):
    """Beam's WriteToText."""
    return _lines(begin, data) | beam.io.WriteToText(f"{output}/part", num_shards=shards)


def encrypted_text(begin, data, output, shards):
    """WriteEncryptedText."""
    return _lines(begin, data) | WriteEncryptedText(f"{output}/part", key=KEY, num_shards=shards)


def plain_records(begin, data, output, shards):
    """Records in base64."""
    coded = _lines(begin, data) | beam.Map(utf8) | "Base64" >> beam.Map(to_base64)
    return coded | beam.io.WriteToText(f"{output}/part", num_shards=shards)


def encrypted_records(begin, data, output, shards):
    """EncryptRecords in base64."""
    sealed = _lines(begin, data) | EncryptRecords(key=KEY, keys=f"{output}/keys")
    return sealed | "Base64" >> beam.Map(to_base64) | beam.io.WriteToText(f"{output}/part", num_shards=shards)


def encrypted_messages(begin, data, output, shards):
    """EncryptRecords, self-contained, in base64."""
    sealed = _lines(begin, data) | EncryptRecords(key=KEY, format="aws-encryption-sdk")
    return sealed | "Base64" >> beam.Map(to_base64) | beam.io.WriteToText(f"{output}/part", num_shards=shards)


def plain_fields(begin, data, output, shards):
    """Rows as JSON."""
    texts = _lines(begin, data) | beam.Map(row_of) | "JSON" >> beam.Map(as_text)
    return texts | beam.io.WriteToText(f"{output}/part", num_shards=shards)


def encrypted_fields(begin, data, output, shards):
    """EncryptFields of one of two fields, as JSON."""
    rows = _lines(begin, data) | beam.Map(row_of)
    sealed = rows | EncryptFields(["text"], key=KEY, keys=f"{output}/keys", encoding="base64")
    return sealed | "JSON" >> beam.Map(as_text) | beam.io.WriteToText(f"{output}/part", num_shards=shards)


def _tables(begin, data):
    return (
        begin
        | fileio.MatchFiles(f"{data}/*")
        | beam.Reshuffle()
        | "Tables" >> beam.Map(lambda file: table_of(file.path))
    )


def plain_columns(begin, data, output, shards):
    """Tables in Arrow's format, in base64."""
    texts = _tables(begin, data) | "Base64" >> beam.Map(table_to_base64)
    return texts | beam.io.WriteToText(f"{output}/part", num_shards=shards)


def encrypted_columns(begin, data, output, shards):
    """EncryptColumns of one of two columns."""
    sealed = _tables(begin, data) | EncryptColumns(["text"], key=KEY, keys=f"{output}/keys")
    texts = sealed | "Base64" >> beam.Map(table_to_base64)
    return texts | beam.io.WriteToText(f"{output}/part", num_shards=shards)


def plain_order_fields(begin, data, output, shards):
    """Orders as JSON."""
    texts = _lines(begin, data) | beam.Map(order_of) | "JSON" >> beam.Map(as_text)
    return texts | beam.io.WriteToText(f"{output}/part", num_shards=shards)


def encrypted_order_fields(begin, data, output, shards):
    """EncryptFields of two of eleven fields, as JSON."""
    rows = _lines(begin, data) | beam.Map(order_of)
    sealed = rows | EncryptFields(PERSONAL, key=KEY, keys=f"{output}/keys", encoding="base64")
    return sealed | "JSON" >> beam.Map(as_text) | beam.io.WriteToText(f"{output}/part", num_shards=shards)


def plain_order_columns(begin, data, output, shards):
    """Parquet, read and written by Beam."""
    tables = begin | beam.io.ReadFromParquetBatched(f"{data}/*")
    return tables | beam.io.WriteToParquetBatched(f"{output}/part", ORDERS, num_shards=shards)


def encrypted_order_columns(begin, data, output, shards):
    """EncryptColumns of two of eleven columns, between Beam's reading and writing of Parquet."""
    tables = begin | beam.io.ReadFromParquetBatched(f"{data}/*")
    sealed = tables | EncryptColumns(PERSONAL, key=KEY, keys=f"{output}/keys")
    return sealed | beam.io.WriteToParquetBatched(f"{output}/part", SEALED_ORDERS, num_shards=shards)


def plain_parquet(begin, data, output, shards):
    """Beam's WriteToParquet."""
    rows = _lines(begin, data) | beam.Map(row_of)
    return rows | beam.io.WriteToParquet(f"{output}/part", SCHEMA, num_shards=shards)


def encrypted_parquet(begin, data, output, shards):
    """WriteEncryptedParquet."""
    rows = _lines(begin, data) | beam.Map(row_of)
    return rows | WriteEncryptedParquet(f"{output}/part", SCHEMA, key=KEY, num_shards=shards)


def copy_tables(begin, data, output, shards):
    """Parquet files, copied through Arrow."""
    files = begin | fileio.MatchFiles(f"{data}/*") | beam.Reshuffle()
    return files | "Copy" >> beam.Map(_copy_table, output)


def encrypt_tables(begin, data, output, shards):
    """EncryptTables."""
    return begin | beam.Create([f"{data}/*"]) | EncryptTables(output, key=KEY, if_exists="overwrite")


PAIRS = {
    "EncryptFiles": (copy_files, encrypt_files),
    "EncryptFiles, the kernel's copy": (copy_files_in_kernel, encrypt_files),
    "EncryptTables": (copy_tables, encrypt_tables),
    "WriteEncryptedText": (plain_text, encrypted_text),
    "WriteEncryptedParquet": (plain_parquet, encrypted_parquet),
    "EncryptRecords": (plain_records, encrypted_records),
    "EncryptRecords, messages": (plain_records, encrypted_messages),
    "EncryptFields": (plain_fields, encrypted_fields),
    "EncryptFields, orders": (plain_order_fields, encrypted_order_fields),
    "EncryptColumns": (plain_columns, encrypted_columns),
    "EncryptColumns, orders": (plain_order_columns, encrypted_order_columns),
}
"""Each transform of ours and its like without encryption."""
INPUTS = {
    "EncryptFiles": "files",
    "EncryptFiles, the kernel's copy": "files",
    "EncryptTables": "tables",
    "EncryptFields, orders": "orders",
    "EncryptColumns, orders": "order-tables",
}
"""Their inputs, where they are not lines of 100 bytes."""
JOBS = {job.__name__: job for pair in PAIRS.values() for job in pair}


def main():
    """Run one job; print how long it took, in JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--shards", type=int, default=0)
    arguments, options = parser.parse_known_args()
    start = time.monotonic()
    pipeline = jobs.make_pipeline(PipelineOptions(options))
    _ = JOBS[arguments.job](pipeline, arguments.data, arguments.output, arguments.shards)
    with jobs.fail_when_a_worker_dies():
        result = pipeline.run()
        state = result.wait_until_finish() or result.state
    if state != PipelineState.DONE:
        sys.exit(f"the job ended as {state}")
    sys.stdout.write(json.dumps({"seconds": time.monotonic() - start}) + "\n")


if __name__ == "__main__":
    main()
