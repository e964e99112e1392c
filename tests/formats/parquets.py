"""Parquet files in memory for the tests of this folder, and the keys inside of them, found as docs/format.md says."""

import base64
import datetime as dt
import decimal
import io
import json
import re

import pyarrow as pa
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from beam_envelope.formats.keyfile import KeyFile
from beam_envelope.formats.parquet import create_parquet, open_parquet

CONTEXT = {"dataset": "people"}

PEOPLE = pa.table(
    {
        "id": pa.array(range(10), pa.int64()),
        "name": [f"name {number}" for number in range(10)],
        "ssn": pa.array([None if number == 4 else f"123-45-{number:04d}" for number in range(10)]),
        "address": pa.array(
            [None, {"zip": None, "geo": None}] + [{"zip": f"{n}", "geo": {"lat": n / 2, "lon": -n}} for n in range(8)],
            pa.struct([("zip", pa.string()), ("geo", pa.struct([("lat", pa.float64()), ("lon", pa.float64())]))]),
        ),
        "tags": pa.array([["a", "b"], [], None, [None], *[["t"]] * 6]),
        "visits": pa.array([[{"day": 1, "place": "x"}], [], None, *[[{"day": 2, "place": None}]] * 7]),
        "scores": pa.array([[("k", 1), ("l", None)], [], None, *[[("m", 2)]] * 7], pa.map_(pa.string(), pa.int64())),
        "colour": pa.array(
            ["red", "green", "red", None, "red", "blue", "red", "red", "red", "red"]
        ).dictionary_encode(),
        "money": pa.array([decimal.Decimal(number) / 100 for number in range(10)], pa.decimal128(12, 2)),
        "at": pa.array(
            [dt.datetime(2026, 1, 1 + number, tzinfo=dt.timezone.utc) for number in range(10)],
            pa.timestamp("us", "UTC"),
        ),
        "day": pa.array([dt.date(2026, 1, 1 + number) for number in range(10)]),
        "blob": pa.array([bytes([number]) * number for number in range(10)], pa.large_binary()),
        "flag": pa.array([number % 3 == 0 for number in range(10)]),
    },
    metadata={"made by": "a test"},
)
LEAVES = [
    *("id", "name", "ssn", "address.zip", "address.geo.lat", "address.geo.lon", "tags.list.element"),
    *("visits.list.element.day", "visits.list.element.place", "scores.key_value.key", "scores.key_value.value"),
    *("colour", "money", "at", "day", "blob", "flag"),
]


class SealedParquet:
    """An encrypted Parquet file in memory: its bytes, and its key file's."""

    def __init__(self, table, *, row_group_size=4, context=CONTEXT, **settings):
        stream, key_file = io.BytesIO(), io.BytesIO()
        with create_parquet(stream, table.schema, context=context, key_file=key_file, **settings) as writer:
            writer.write_table(table, row_group_size)
        self.table = table
        self.file, self.key_file = stream.getvalue(), key_file.getvalue()

    def open(self, key, file=None, **settings):
        """Open these bytes, or others, with the key file."""
        stream = io.BytesIO(self.file if file is None else bytes(file))
        return open_parquet(stream, key=key, key_file=self.key_file, **{"context": CONTEXT, **settings})

    def parquet_keys(self, keys):
        """Return Parquet's own keys: the footer's, and those of the columns in order, from the first row group.

        It follows docs/format.md and the Parquet specification (Encryption.md, 5.4), and uses neither our reader nor
        pyarrow. `keys` opens all data keys.
        """
        key_file = KeyFile.from_bytes(self.key_file, "k")
        binding = key_file.binding()
        footer_bytes = int.from_bytes(self.file[-8:-4], "little")
        tail = self.file[-8 - footer_bytes : -8]
        unique = tail[4:12]
        (material,) = re.findall(rb'\{"keyMaterialType":[^{}]*\}', tail)
        footer_key = self._unwrap(material, keys, key_file, binding)
        sealed = tail[tail.index(material) + len(material) + 1 :]
        assert int.from_bytes(sealed[:4], "little") == len(sealed) - 4
        footer = AESGCM(footer_key).decrypt(sealed[4:16], sealed[16:], unique + b"\0")  # module type 0: the footer
        materials = re.findall(rb'\{"keyMaterialType":[^{}]*\}', footer)
        return footer_key, list(
            dict.fromkeys(self._unwrap(material, keys, key_file, binding) for material in materials)
        )

    @staticmethod
    def _unwrap(material, keys, key_file, binding):
        document = json.loads(material)
        name = document["masterKeyID"]
        wrapped = key_file.data_keys[int(name[1:])].wrapped_keys
        for key in keys:
            for form in wrapped:
                if key.may_open(form):
                    with key.unwrap(form, key_file.context) as data_key:
                        kdf = HKDFExpand(hashes.SHA512(), 32, b"beam-envelope/parquet@v1\0" + binding)
                        wrapping_key = kdf.derive(data_key.material)
                    token = base64.b64decode(document["wrappedDEK"])
                    return AESGCM(wrapping_key).decrypt(token[:12], token[12:], binding + name.encode())
        raise AssertionError(name)
