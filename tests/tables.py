"""Datasets of tables for tests: written below a folder, encrypted, decrypted, read."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from beam_envelope import DecryptTables, EncryptTables, LocalKms
from beam_envelope.keys.local import generate_local_key
from tests.running import run

CONTEXT = {"dataset": "people"}


def write_tables(folder, tables, **options):
    """Write Parquet files below a folder: a dict of relative paths and tables. Return the folder."""
    for name, table in tables.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, **options)
    return Path(folder)


def read_table(path):
    """Read one Parquet file, without what its folders say."""
    return pq.read_table(path, partitioning=None)


def read_tables(folder):
    """Return the Parquet files below a folder: a dict of relative paths and tables."""
    return {str(path.relative_to(folder)): read_table(path) for path in sorted(Path(folder).rglob("*.parquet"))}


def same(one, other):
    """Whether two datasets have equal files, with all metadata."""
    return one.keys() == other.keys() and all(
        _plain(table).equals(_plain(other[name])) and table.schema.equals(other[name].schema, check_metadata=True)
        for name, table in one.items()
    )


def _plain(table):
    """Return a table whose columns do not depend on how values were put into dictionaries."""
    kinds = [getattr(kind, "value_type", kind) if pa.types.is_dictionary(kind) else kind for kind in table.schema.types]
    return table.cast(pa.schema(list(zip(table.schema.names, kinds, strict=True))))


def encrypt_tables(source, output, key, **settings):
    """Encrypt one source: a path, a pattern or a folder."""
    return run(EncryptTables(str(output), key=key, **{"context": CONTEXT, **settings}), str(source))


def decrypt_tables(source, output, key, **settings):
    """Decrypt one source: a path, a pattern or a folder."""
    return run(DecryptTables(str(output), key=key, **{"context": CONTEXT, **settings}), str(source))


def new_key(path):
    """Return a LocalKms on a fresh keyring."""
    key = LocalKms(path)
    generate_local_key(key)
    return key


def random_table(rows, seed=0):
    """Return a table that hardly compresses, of about 100 bytes a row."""
    import numpy as np

    random = np.random.default_rng(seed)
    texts = pa.array([random.bytes(40).hex() for _ in range(min(rows, 5000))])
    return pa.table(
        {"id": random.integers(0, 1 << 60, rows), "text": texts.take(pa.array(np.arange(rows) % len(texts)))}
    )
