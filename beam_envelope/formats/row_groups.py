"""The rows of a table, group by group, where some columns fill the template of a key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import pyarrow as pa

from beam_envelope.errors import FormatError
from beam_envelope.keys.choice import Values
from beam_envelope.keys.template import checked_value

Table: TypeAlias = "pa.Table | pa.RecordBatch"

_ROW: Final = "\x00beam-envelope row"


def in_groups(table: Table, names: Sequence[str], change: Callable[[pa.Table, Values], pa.Table]) -> Table:
    """Change a table group by group, and put the rows in their order again; some may be gone.

    Args:
        table: a table or record batch of one row or more.
        names: the columns whose values are equal within a group.
        change: is given the rows of a group and its values, and returns them changed.

    Returns:
        A new table, or record batch.

    Raises:
        FormatError: there is no such column, or a value of it may not fill a template. No message holds one.
    """
    whole = table if isinstance(table, pa.Table) else pa.Table.from_batches([table])
    parts = []
    for values, rows in _numbered(whole, names):
        parts.append(change(whole if rows is None else whole.take(rows).append_column(_ROW, rows), values))
    done = parts[0]
    if len(parts) > 1:
        done = pa.concat_tables(parts, promote_options="default")  # a column of nulls alone may not know its type
        done = done.take(pa.array(np.argsort(done.column(_ROW).to_numpy()))).drop_columns([_ROW])
    if isinstance(table, pa.Table):
        return done
    batches = done.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], done.schema)


def groups(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[Values, pa.Table]]:
    """Yield the rows of each group of a table, with its values. Raises as `in_groups`."""
    for values, rows in _numbered(table, names):
        yield values, table if rows is None else table.take(rows)


def _numbered(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[Values, pa.Array | None]]:
    """Yield the values of each group and its rows; None for all of them."""
    codes = np.zeros(table.num_rows, np.int64)
    distinct: list[Values] = [()]
    for name in names:
        each, numbers = _distinct(table, name)
        found, codes = np.unique(codes * len(each) + numbers, return_inverse=True)
        distinct = [(*distinct[code // len(each)], each[code % len(each)]) for code in found.tolist()]
    if len(distinct) == 1:
        yield distinct[0], None
        return
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(distinct)))
    for values, rows in zip(distinct, np.split(order, ends[:-1]), strict=True):
        yield values, pa.array(rows)


def _distinct(table: pa.Table, name: str) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Return the distinct values of a column, and for each row the number of its value."""
    if table.column_names.count(name) != 1:
        raise FormatError(
            f"the template of the key or context needs one column {name!r}; the table has "
            f"{table.column_names.count(name) or 'none'}. Its columns are: {', '.join(table.column_names)}"
        )
    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):  # of a column of over 2 GiB
        encoded = encoded.combine_chunks()
    numbers = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    values = []
    for number, value in enumerate([*encoded.dictionary.to_pylist(), None]):
        rows = np.flatnonzero(numbers == (number if number < len(encoded.dictionary) else -1))
        if value is None and not len(rows):
            continue
        try:
            values.append(checked_value(value))
        except ValueError as error:
            raise FormatError(
                f"the column {name!r}, which the template of the key or context needs, does not do in row {rows[0]} of "
                f"a batch: {error}"
            ) from None
    return values, numbers
