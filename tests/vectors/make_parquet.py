"""Make tests/vectors/parquet_v1.json, which docs/format.md explains: `python -m tests.vectors.make_parquet`.

Run it only for a new version of the format; see make.py. The keys are public: never use them for data.
"""

from __future__ import annotations

import base64
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa

from beam_envelope.keys.local import LocalKms
from tests.formats.parquets import SealedParquet
from tests.vectors.make import keyring

TARGET = Path(__file__).with_name("parquet_v1.json")
ABOUT = (
    "Encrypted Parquet files of beam_envelope, version 1, with the keys that open them. Explained in docs/format.md. "
    "The keys are public."
)
CONTEXT = {"dataset": "vectors"}
ROWS = [
    {"id": 1, "name": "Ann", "ssn": "123-45-6789", "address": {"zip": "10115", "city": "Berlin"}, "tags": ["a", None]},
    {"id": 2, "name": None, "ssn": "987-65-4321", "address": None, "tags": []},
    {"id": 3, "name": "Zoë", "ssn": None, "address": {"zip": None, "city": "Łódź"}, "tags": None},
]
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("name", pa.string()),
        ("ssn", pa.string()),
        ("address", pa.struct([("zip", pa.string()), ("city", pa.string())])),
        ("tags", pa.list_(pa.string())),
    ]
)
VECTORS: dict[str, dict[str, Any]] = {
    "uniform": {"about": "all under one key", "key": "first"},
    "by-column": {
        "about": "footer and rest under one key",
        "key": "first",
        "columns": {"ssn": "second", "tags": "third"},
    },
    "plain-rest": {"about": "the others are plain", "columns": {"ssn": "second", "address.zip": "third"}},
}


def make() -> dict[str, Any]:
    """Return the document."""
    keyrings = {name: keyring(f"parquet {name}") for name in ("first", "second", "third")}
    files = []
    with tempfile.TemporaryDirectory() as folder:
        keys = {}
        for name, document in keyrings.items():
            path = Path(folder, f"{name}.json")
            path.touch(mode=0o600)
            path.write_text(json.dumps(document))
            keys[name] = LocalKms(path)
        for name, vector in VECTORS.items():
            columns = {column: keys[key] for column, key in vector.get("columns", {}).items()} or None
            sealed = SealedParquet(
                pa.Table.from_pylist(ROWS, SCHEMA),
                row_group_size=2,
                context=CONTEXT,
                key=keys.get(vector.get("key", "")),
                columns=columns,
            )
            footer_key, column_keys = sealed.parquet_keys(list(keys.values()))
            files.append(
                {
                    "name": name,
                    "about": vector["about"],
                    "key": vector.get("key"),
                    "columns": vector.get("columns", {}),
                    "context": CONTEXT,
                    "footer_key": footer_key.hex(),
                    "column_keys": [key.hex() for key in column_keys],
                    "key_file": sealed.key_file.decode(),
                    "file": base64.b64encode(sealed.file).decode(),
                }
            )
    return {"about": ABOUT, "keyrings": keyrings, "rows": ROWS, "files": files}


if __name__ == "__main__":
    TARGET.write_text(json.dumps(make(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
