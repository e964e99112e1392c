"""Where in an Arrow table a column is: names, paths to children of structs, chunks; and how another takes its place.

What is done with a column is in table.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import pyarrow as pa

from beam_envelope.formats.cell import TooLargeError, nulls

KEY_ID_SUFFIX: Final = "_key_id"
"""What the name of the column of key ids ends with, beside one of raw cells."""
Table = TypeVar("Table", pa.Table, pa.RecordBatch)

Column: TypeAlias = tuple[pa.Field, list[pa.Array]]
"""A column: its field and its chunks."""
Work: TypeAlias = Callable[["Place", pa.Array, "pa.Array | None"], "tuple[list[Column], bool]"]
"""From a chunk, and that of the column of key ids beside it, to what takes its place; and whether that one goes."""


class Place(NamedTuple):
    """Which chunk of which column is worked on.

    Attributes:
        path: of the column.
        field: its field.
        row: the number of the chunk's first row in the table.
    """

    path: str
    field: pa.Field
    row: int


def replace_column(table: Table, path: str, work: Work) -> Table:
    """Return a table with other columns in the place of the one that a path names.

    Raises:
        ValueError: there is no such column, or there are two.
        TooLargeError: a record batch, or a struct, cannot hold the new column in one array.
    """
    top, *rest = _find(table.schema, path)
    now = table.schema.field(top)
    chunks = _chunks(table.column(top)) or [nulls(0, now.type)]
    beside = table.schema.get_all_field_indices(now.name + KEY_ID_SUFFIX)
    done, row = [], 0
    for chunk in chunks:
        ids = None
        if beside and not rest:
            ids = _whole(_chunks(table.column(beside[0]).slice(row, len(chunk))) or [nulls(0, pa.string())])
        done.append(_inside(Place(path, now, row), chunk, ids, rest, work))
        row += len(chunk)
    columns = [[column] for column in _columns(table)]
    columns[top] = _stacked([chunk for chunk, _ in done])
    if done[0][1]:
        columns[beside[0]] = []
    flat = [column for group in columns for column in group]
    schema = pa.schema([field for field, _ in flat], table.schema.metadata)
    if isinstance(table, pa.RecordBatch):
        return pa.RecordBatch.from_arrays([_whole(chunks) for _, chunks in flat], schema=schema)
    return pa.Table.from_arrays([pa.chunked_array(chunks, field.type) for field, chunks in flat], schema=schema)


def _inside(
    place: Place, values: pa.Array, ids: pa.Array | None, rest: list[int], work: Work
) -> tuple[list[Column], bool]:
    """Do the work on a chunk, or on a child of its structs, which are then put together again."""
    if not rest:
        return work(place, values, ids)
    kind, now = values.type, place.field
    children = values.flatten()  # a child is null where its struct is
    fields = [kind.field(number) for number in range(kind.num_fields)]
    child = fields[rest[0]]
    beside = kind.get_all_field_indices(child.name + KEY_ID_SUFFIX)
    ids = children[beside[0]] if beside and len(rest) == 1 else None
    inner, used = _inside(place._replace(field=child), children[rest[0]], ids, rest[1:], work)
    columns: list[list[Column]] = [[(field, [array])] for field, array in zip(fields, children, strict=True)]
    columns[rest[0]] = inner
    if used:
        columns[beside[0]] = []
    flat = [column for group in columns for column in group]
    arrays = [_whole(chunks) for _, chunks in flat]
    kinds = [field.with_type(array.type) for (field, _), array in zip(flat, arrays, strict=True)]
    whole = pa.StructArray.from_arrays(arrays, fields=kinds, mask=values.is_null())
    return [(now.with_type(whole.type), [whole])], False


def _find(schema: pa.Schema, path: str) -> list[int]:
    """Return the number of the column, and then of its child, of the child's child, and so on."""
    found: list[int] = []
    where: Any = schema
    name, rest = path, ""
    while True:
        numbers = where.get_all_field_indices(name)
        if len(numbers) > 1:
            raise ValueError(f"there are {len(numbers)} columns {name!r}; which one {path!r} is cannot be told")
        if numbers and not rest:
            return [*found, numbers[0]]
        kind = where.field(numbers[0]).type if numbers else None
        if kind is not None and pa.types.is_struct(kind):
            found.append(numbers[0])
            where, name, rest = kind, rest, ""
        elif kind is None and "." in name:
            name, _, end = name.rpartition(".")
            rest = f"{end}.{rest}" if rest else end
        else:
            raise ValueError(_not_found(schema, path, kind))


def _not_found(schema: pa.Schema, path: str, kind: pa.DataType | None) -> str:
    if kind is not None:
        return f"there is no column {path!r}: only the children of structs have paths, and that is of type {kind}"
    return f"there is no column {path!r}; there are {', '.join(map(repr, schema.names))}"


def _columns(table: Table) -> Iterator[Column]:
    for number, chunks in enumerate(table.columns):
        yield table.schema.field(number), _chunks(chunks)


def _chunks(column: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return column.chunks if isinstance(column, pa.ChunkedArray) else [column]


def _whole(chunks: list[pa.Array]) -> pa.Array:
    """Return chunks as one array."""
    if len(chunks) == 1:
        return chunks[0]
    if pa.types.is_binary(chunks[0].type):  # they are several because they are large
        chunks = [chunk.cast(pa.large_binary()) for chunk in chunks]
    try:
        whole = pa.concat_arrays(chunks)
    except pa.ArrowInvalid:
        whole = None
    if whole is None:
        raise TooLargeError(chunks[0].type)
    return whole


def _stacked(chunks: list[list[Column]]) -> list[Column]:
    """Return columns from the columns of each chunk. Chunks of null only may not have found their type."""
    stacked = []
    for same in zip(*chunks, strict=True):
        field = next((field for field, _ in same if not pa.types.is_null(field.type)), same[0][0])
        arrays = [array for _, arrays in same for array in arrays]
        stacked.append((field, [nulls(len(a), field.type) if pa.types.is_null(a.type) else a for a in arrays]))
    return stacked
