"""What the tests of encrypted Parquet in Beam share: keys, pipelines and readings."""

import apache_beam as beam
import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions

from beam_envelope import WriteEncryptedParquet
from beam_envelope.io.parquet_read import find_parquet, open_parquet_at

SCHEMA = pa.schema([pa.field("id", pa.int64(), nullable=False), ("name", pa.string()), ("ssn", pa.string())])
ROWS = [{"id": n, "name": f"CANARY-NAME-{n:05}", "ssn": f"CANARY-SSN-{n:05}"} for n in range(1000)]

_kept = []


def pipeline(*flags, runner="FnApiRunner"):
    return beam.Pipeline(runner, options=PipelineOptions(list(flags)))


def keep(element):
    _kept.append(element)


def collect(begin, transform=None):
    """Run a reader in a pipeline of its own; return its elements."""
    _kept.clear()
    with pipeline() as p:
        elements = p | begin
        _ = (elements if transform is None else elements | transform) | "Keep" >> beam.Map(keep)
    return list(_kept)


def write(prefix, key, elements=ROWS, schema=SCHEMA, **options):
    """Write elements; return what the transform says of the files."""
    _kept.clear()
    with pipeline() as p:
        files = p | beam.Create(elements) | WriteEncryptedParquet(str(prefix), schema, key=key, **options)
        _ = files | "Keep" >> beam.Map(keep)
    return sorted(_kept)


def rows_of(pattern, key, context=None):
    """Return the rows of each file that a pattern matches, without Beam's readers."""
    found = {}
    for path in find_parquet(str(pattern))[1]:
        with open_parquet_at(path, key, context) as reader:
            found[path.rpartition("/")[2]] = reader.read().to_pylist()
    return found


def all_rows(pattern, key, context=None):
    return sorted((row for rows in rows_of(pattern, key, context).values() for row in rows), key=lambda row: row["id"])


def error_of(caught):
    """Return the text of a runner's error."""
    return repr(caught.value)
