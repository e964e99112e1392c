"""Columns by their paths: what a name means, what is read as a whole, and nulls in the place of what is missing."""

import pyarrow as pa
import pytest

from beam_envelope.formats.parquet_columns import Paths, conform, leaf_count, leaf_paths, units, with_nulls
from tests.formats.parquets import LEAVES, PEOPLE

GEO = pa.struct([("lat", pa.float64()), ("lon", pa.float64())])


@pytest.mark.parametrize(
    ("data_type", "count"),
    [
        (pa.int64(), 1),
        (pa.null(), 1),
        (pa.dictionary(pa.int32(), pa.string()), 1),
        (GEO, 2),
        (pa.list_(GEO), 2),
        (pa.list_(pa.int8(), 3), 1),
        (pa.map_(pa.string(), GEO), 3),
        (pa.struct([("a", GEO), ("b", pa.large_list(pa.map_(pa.string(), pa.int8())))]), 4),
        (pa.uuid(), 1),
    ],
    ids=str,
)
def test_leaves_are_counted_as_parquet_has_them(data_type, count):
    assert leaf_count(data_type) == count
    assert len(leaf_paths(pa.schema([("c", data_type)]), {})) == count


def test_structs_are_read_leaf_by_leaf_and_lists_and_maps_as_a_whole():
    assert units(PEOPLE.schema, LEAVES) == [
        *((leaf,) for leaf in LEAVES[:7]),
        tuple(LEAVES[7:9]),
        tuple(LEAVES[9:11]),
        *((leaf,) for leaf in LEAVES[11:]),
    ]


def test_leaves_are_found_in_the_order_in_which_pyarrow_reads_them():
    paths = Paths(LEAVES, PEOPLE.schema)
    assert paths.find(["flag", "address.geo.lon", "id", "address.zip", "flag"]) == [
        *("flag", "address.zip", "address.geo.lon", "id")
    ]
    assert paths.find(PEOPLE.schema.names) == LEAVES
    assert paths.find([]) == []
    assert paths.below("address.geo") == ["address.geo.lat", "address.geo.lon"]
    with pytest.raises(ValueError, match=r"^there is no column 'geo'; there are id, name, .*, \.\.\.\. Name one, or"):
        Paths([*LEAVES, *"abcdef"]).below("geo")


def test_missing_columns_and_fields_are_null():
    schema = pa.schema([("a", pa.int64()), ("s", pa.struct([("x", pa.int64()), ("g", GEO)])), ("l", pa.list_(GEO))])
    read = pa.table({"s": pa.array([{"g": {"lon": 1.0}}, None, {"g": None}])}).to_batches()[0]
    for batch, rows in ((read, slice(0, 3)), (read.slice(1, 2), slice(1, 3))):  # also where arrays have an offset
        made = conform(batch, schema)
        made.validate(full=True)
        assert made.schema == schema
        assert (
            made.to_pylist()
            == [
                {"a": None, "s": {"x": None, "g": {"lat": None, "lon": 1.0}}, "l": None},
                {"a": None, "s": None, "l": None},
                {"a": None, "s": {"x": None, "g": None}, "l": None},
            ][rows]
        )


def test_what_was_read_for_a_filter_only_goes():
    read = pa.table({"a": [1, 2], "s": [{"x": 1, "y": 2}, None]}).to_batches()[0]
    schema = pa.schema([("s", pa.struct([("y", pa.int64())]))])
    assert conform(read, schema).to_pylist() == [{"s": {"y": 2}}, {"s": None}]
    assert conform(read, pa.schema([])).num_rows == 2


def test_only_denied_fields_become_nullable():
    inner = pa.struct([pa.field("x", pa.int64(), nullable=False), pa.field("y", pa.int64(), nullable=False)])
    schema = pa.schema([pa.field(name, inner, nullable=False) for name in "ab"], metadata={"m": "n"})
    made = with_nulls(schema, ["a.x", "a.y", "b.x", "b.y"], {"a.x", "a.y", "b.y"})
    assert (made.field("a").nullable, made.field("b").nullable) == (True, False)
    assert [made.field("b").type.field(name).nullable for name in "xy"] == [False, True]
    assert made.metadata == {b"m": b"n"}
    assert with_nulls(schema, ["a.x", "a.y", "b.x", "b.y"], set()) == schema
