"""Columns of a Parquet file by their paths: which a name means, what may be left out, and nulls in their place.

A *leaf* is a column as Parquet stores it, named by its path (`address.zip`, `tags.list.element`). A *unit* is what is
read or denied as a whole: a leaf, or all leaves of a list or map. Structs are read leaf by leaf.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

_REFUSED_OPTIONS: Final = {
    "bloom_filter_options": "Parquet libraries cannot encrypt bloom filters yet",
    "encryption_properties": "the encryption is what key, columns and context say",
    "filesystem": "pass a local path or an open stream",
    "metadata_collector": "the metadata of an encrypted file cannot be taken out of it",
}


def leaf_paths(schema: pa.Schema, options: Mapping[str, Any]) -> list[str]:
    """Return the paths of the leaves that a file of this schema, written with these options, has.

    Raises:
        ValueError: an option does not go with encryption, or pyarrow refuses the value of one, or the schema.
        TypeError: there is no such option.
    """
    for option, why in _REFUSED_OPTIONS.items():
        if options.get(option) is not None:
            raise ValueError(f"{option} does not go with encryption: {why}. Leave it out")
    stream = io.BytesIO()
    try:
        pq.ParquetWriter(stream, schema, **options).close()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"pyarrow writes no file of this schema with these options: {error}") from None
    parquet_schema = pq.ParquetFile(stream).metadata.schema
    return [parquet_schema.column(number).path for number in range(len(parquet_schema))]


class Paths:
    """The leaves of a file, found by their paths or by those of the groups and columns that they are in."""

    def __init__(self, leaves: Sequence[str], schema: pa.Schema | None = None) -> None:
        """Take the leaves in the order of the file; the schema is needed for `find` only."""
        self.leaves = tuple(leaves)
        self._by_prefix: dict[str, list[int]] = {}
        for number, leaf in enumerate(leaves):
            parts = leaf.split(".")
            for count in range(1, len(parts) + 1):
                self._by_prefix.setdefault(".".join(parts[:count]), []).append(number)
        tops = (
            [] if schema is None else [top for top, field in enumerate(schema) for _ in range(leaf_count(field.type))]
        )
        self._top_of = tops

    def below(self, name: str) -> list[str]:
        """Return the leaves that a name means: that of the leaf itself, or of any group or column around it.

        Raises:
            ValueError: there is none.
        """
        return [self.leaves[number] for number in self._numbers(name)]

    def find(self, names: Sequence[str]) -> list[str]:
        """Return the leaves that some names mean, in the order in which pyarrow gives them.

        That is: columns in the order of their first mention, and the leaves of each in the order of the file.
        """
        chosen = dict.fromkeys(number for name in names for number in self._numbers(name))
        order = {top: place for place, top in reversed(list(enumerate(self._top_of[number] for number in chosen)))}
        return [
            self.leaves[number] for number in sorted(chosen, key=lambda number: (order[self._top_of[number]], number))
        ]

    def _numbers(self, name: str) -> list[int]:
        if name not in self._by_prefix:
            known = ", ".join(self.leaves[:20]) + (", ..." if len(self.leaves) > 20 else "")  # noqa: PLR2004
            raise ValueError(f"there is no column {name!r}; there are {known}. Name one, or a column that they are in")
        return self._by_prefix[name]


def leaf_count(data_type: pa.DataType) -> int:
    """Return how many leaves a column of this type has."""
    if isinstance(data_type, pa.BaseExtensionType):
        return leaf_count(data_type.storage_type)
    if types.is_nested(data_type):
        return sum(leaf_count(data_type.field(number).type) for number in range(data_type.num_fields))
    return 1


def units(schema: pa.Schema, leaves: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the leaves of a schema, unit by unit. `leaves` are all of them, in the order of the schema."""
    rest = iter(leaves)
    return [tuple(next(rest) for _ in range(size)) for field in schema for size in _unit_sizes(field.type)]


def _unit_sizes(data_type: pa.DataType) -> Iterator[int]:
    if types.is_struct(data_type):
        for number in range(data_type.num_fields):
            yield from _unit_sizes(data_type.field(number).type)
    else:
        yield leaf_count(data_type)


def with_nulls(schema: pa.Schema, leaves: Sequence[str], denied: AbstractSet[str]) -> pa.Schema:
    """Return a schema whose denied units may be null."""
    rest = iter(leaves)
    return pa.schema([_with_nulls(field, rest, denied)[0] for field in schema], metadata=schema.metadata)


def _with_nulls(field: pa.Field, leaves: Iterator[str], denied: AbstractSet[str]) -> tuple[pa.Field, bool]:
    """Return a field, nullable if all of it is denied, and whether it is."""
    if types.is_struct(field.type):
        found = [_with_nulls(child, leaves, denied) for child in field.type]
        field, lost = field.with_type(pa.struct([child for child, _ in found])), all(lost for _, lost in found)
    else:
        mine = [next(leaves) for _ in range(leaf_count(field.type))]
        lost = not denied.isdisjoint(mine)
    return (field.with_nullable(nullable=True), True) if lost else (field, False)


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return a batch of this schema: what is missing is null, what is not in it goes."""
    if batch.schema.equals(schema, check_metadata=True):
        return batch
    if not len(schema):
        return batch.select([])
    have = {name: number for number, name in enumerate(batch.schema.names)}
    if len(have) == len(schema) == len(batch.schema.names) and batch.schema.names == schema.names:
        columns = batch.columns  # also where several columns have one name
    else:
        columns = [batch.column(have[name]) if name in have else None for name in schema.names]
    arrays = [
        pa.nulls(batch.num_rows, field.type) if column is None else _conform_array(column, field.type)
        for column, field in zip(columns, schema, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _conform_array(array: pa.Array, data_type: pa.DataType) -> pa.Array:
    if not types.is_struct(data_type) or array.type.equals(data_type):
        return array
    children = []
    for field in data_type:
        number = array.type.get_field_index(field.name)
        missing = number < 0
        children.append(
            pa.nulls(len(array), field.type) if missing else _conform_array(array.field(number), field.type)
        )
    return pa.StructArray.from_arrays(children, fields=list(data_type), mask=array.is_null())
