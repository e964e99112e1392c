"""Make tests/vectors/value_v1.json, which docs/format.md explains: `python -m tests.vectors.make_value`."""

from __future__ import annotations

import json
from pathlib import Path

from beam_envelope.formats.value import encode_value
from tests.formats.test_value import VALUES

TARGET = Path(__file__).with_name("value_v1.json")
ABOUT = (
    "Values of Python and the plaintexts of their cells, version 1: type, 00, payload, in hex. Explained in "
    "docs/format.md."
)

if __name__ == "__main__":
    vectors = [
        {
            "name": name,
            "python": repr(value),
            "type": encode_value(value).partition(b"\x00")[0].decode(),
            "plaintext": encode_value(value).hex(),
        }
        for name, value in VALUES.items()
    ]
    TARGET.write_text(json.dumps({"about": ABOUT, "version": 1, "values": vectors}, indent=2) + "\n")
