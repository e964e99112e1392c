"""Our results as rows: what engines in other languages have to decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
from apache_beam import coders
from apache_beam.portability.api import schema_pb2
from apache_beam.typehints.schemas import schema_from_element_type

import beam_envelope
from beam_envelope.transforms.row_types import register_rows
from beam_envelope.transforms.verify_plan import Part

RESULTS = ["EncryptedFile", "DecryptedFile", "FailedFile", "FailedRecord", "RotatedFile", "VerifiedFile"]
RESULTS += ["EncryptedTable", "DecryptedTable", "EncryptedParquetFile"]


class Mixed(NamedTuple):
    """Every kind of field that our results have."""

    name: str
    size: int
    whole: bool
    data: bytes | None
    keys: Sequence[str]


register_rows(Mixed)


@pytest.mark.parametrize("row_type", [*(getattr(beam_envelope, name) for name in RESULTS), Part])
def test_no_field_has_a_type_that_only_python_knows(row_type):
    fields = schema_from_element_type(row_type).fields
    assert [field.name for field in fields] == list(row_type._fields)
    assert {field.type.WhichOneof("type_info") for field in fields} <= {"atomic_type", "array_type"}


def test_the_bytes_are_those_that_beam_specifies():
    coder = coders.registry.get_coder(Mixed)
    assert isinstance(coder, coders.RowCoder)
    # Number of fields, null fields as a bit map, then each: beam:coder:row:v1 of Beam's model.
    row = Mixed("ab", 300, True, None, ["k"])
    assert coder.encode(row) == b"\x05\x01\x08" + b"\x02ab" + b"\xac\x02" + b"\x01" + b"\x00\x00\x00\x01\x01k"
    assert coder.decode(coder.encode(row)) == row


def test_a_field_that_may_be_missing_is_nullable():
    data = schema_from_element_type(Mixed).fields[3].type
    assert (data.nullable, data.atomic_type) == (True, schema_pb2.BYTES)
