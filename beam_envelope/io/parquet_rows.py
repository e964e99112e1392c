"""Elements as Arrow has them, and back: dicts, beam.Rows and NamedTuples become tables, tables become dicts and rows.

What pyarrow says of a value that does not fit may hold the value, so no message of pyarrow's leaves this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Optional

import apache_beam as beam
import pyarrow as pa
from apache_beam.typehints import schemas
from apache_beam.typehints.arrow_type_compatibility import arrow_schema_from_beam_schema
from apache_beam.typehints.row_type import RowTypeConstraint
from pyarrow import types

_BATCH_BYTES: Final = 1 << 20
_MAX_BATCH_ROWS: Final = 4096
_FIRST_BATCH_ROWS: Final = 64

_Converter = Callable[[Any], Any]


def schema_of(element_type: Any) -> pa.Schema | None:
    """Return the Arrow schema of a PCollection's element type, or None for a type without one (dicts, tables, Any).

    Raises:
        ValueError: a field has a type that Beam cannot say in Arrow.
    """
    try:
        of_beam = schemas.schema_from_element_type(element_type)
    except TypeError:
        return None
    try:
        arrow = arrow_schema_from_beam_schema(of_beam)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"Beam knows no Arrow schema for {element_type}: {error} Pass schema= as well") from None
    return pa.schema([_tidy_field(field) for field in arrow])


def _tidy_field(field: pa.Field, name: str | None = None) -> pa.Field:
    """Return a field as anyone would write it: Beam adds schema ids, and leaves what is in lists and maps nameless."""
    return pa.field(field.name if name is None else name, _tidy(field.type), field.nullable)


def _tidy(data_type: pa.DataType) -> pa.DataType:
    if types.is_struct(data_type):
        return pa.struct([_tidy_field(field) for field in data_type])
    if types.is_map(data_type):
        return pa.map_(_tidy(data_type.key_type), _tidy_field(data_type.item_field, "value"))
    if types.is_list(data_type):
        return pa.list_(_tidy_field(data_type.value_field, "element"))
    return data_type


class TableMaker:
    """Makes tables of elements. Rows are gathered; tables and record batches pass through.

    Attributes:
        schema: of all tables; without one, of the first.
    """

    def __init__(self, schema: pa.Schema | None) -> None:
        self.schema = schema
        self._rows: list[Any] = []
        self._batch_rows = _FIRST_BATCH_ROWS

    def add(self, element: Any) -> Iterator[pa.Table]:
        """Take an element; yield what is ready.

        Raises:
            ValueError, TypeError: it is not of the schema, or there is none.
        """
        if isinstance(element, (pa.Table, pa.RecordBatch)):
            yield from self.flush()
            yield self._checked(element)
            return
        if not isinstance(element, (Mapping, beam.Row)) and not hasattr(element, "__dict__") and not _is_named(element):
            raise TypeError(
                f"elements are dicts, rows with a schema, pyarrow.Tables or RecordBatches, not {type(element).__name__}"
            )
        self._rows.append(element)
        if len(self._rows) >= self._batch_rows:
            yield from self.flush()

    def flush(self) -> Iterator[pa.Table]:
        """Yield the rows that were gathered, as one table. Raises as `add`."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        table = to_table(rows, self.schema)
        row_bytes = max(1, table.nbytes // len(rows))
        self._batch_rows = min(_MAX_BATCH_ROWS, max(1, _BATCH_BYTES // row_bytes))
        yield table

    def _checked(self, element: pa.Table | pa.RecordBatch) -> pa.Table:
        table = element if isinstance(element, pa.Table) else pa.Table.from_batches([element])
        if self.schema is None:
            self.schema = table.schema
        if not table.schema.equals(self.schema):
            # A field cannot be compared with None.
            ours, theirs = ({field.name: (field,) for field in each} for each in (self.schema, table.schema))
            names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            raise ValueError(
                "a table has another schema than the file that it should go into, which has that of schema= or of the "
                f"first table. They differ in: {', '.join(names) or 'the order of the columns'}"
            )
        return table


def to_table(rows: Sequence[Any], schema: pa.Schema | None) -> pa.Table:
    """Return rows as a table. What a dict has beyond the schema is left out; what it lacks is null.

    Raises:
        ValueError: a value does not fit, or there is no schema.
    """
    if schema is None:
        raise ValueError(
            f"elements of type {type(rows[0]).__name__} have no schema that is known here: pass schema=, a "
            "pyarrow.Schema, or give the PCollection a type with a schema (a NamedTuple, or beam.Row)"
        )
    arrays = [_to_array(rows, field) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _to_array(rows: Sequence[Any], field: pa.Field) -> pa.Array:
    convert = _from_python(field.type)
    try:
        values = [_value(row, field.name) for row in rows]
        if convert is not None:
            values = [None if value is None else convert(value) for value in values]
        array = pa.array(values, type=field.type)
        if isinstance(array, pa.ChunkedArray):  # a column of more than 2 GiB
            array = pa.concat_arrays(array.chunks)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"a value of the column {field.name!r} does not fit its type, {field.type} ({type(error).__name__})"
        ) from None
    if array.null_count and not field.nullable:
        raise ValueError(f"a row has no value in the column {field.name!r}, which its schema does not allow")
    return array


def _value(row: Any, name: str) -> Any:
    if isinstance(row, Mapping):
        return row.get(name)
    return getattr(row, name)


def _is_named(element: Any) -> bool:
    return isinstance(element, tuple) and hasattr(element, "_fields")


def _from_python(data_type: pa.DataType) -> _Converter | None:
    """Return what makes of a value what pyarrow takes, or None if it takes the value."""
    if types.is_struct(data_type):
        fields = [(field.name, _from_python(field.type)) for field in data_type]

        def struct(value: Any) -> dict[str, Any]:
            found = ((name, convert, _value(value, name)) for name, convert in fields)
            return {name: each if convert is None or each is None else convert(each) for name, convert, each in found}

        return struct
    if types.is_map(data_type):
        to_key, to_item = _from_python(data_type.key_type), _from_python(data_type.item_type)

        def pairs(value: Any) -> list[tuple[Any, Any]]:
            items = value.items() if isinstance(value, Mapping) else value
            return [(_apply(to_key, key), _apply(to_item, item)) for key, item in items]

        return pairs
    if types.is_nested(data_type) and data_type.num_fields == 1:
        to_element = _from_python(data_type.field(0).type)
        return None if to_element is None else lambda value: [_apply(to_element, each) for each in value]
    return None


def _apply(convert: _Converter | None, value: Any) -> Any:
    return value if convert is None or value is None else convert(value)


def to_rows(table: pa.Table) -> Iterator[beam.Row]:
    """Yield the rows of a table, those of structs nested, maps as dicts."""
    converters = [_to_python(field.type) for field in table.schema]
    for values in zip(*(column.to_pylist() for column in table.columns), strict=True):
        named = zip(table.schema.names, converters, values, strict=True)
        yield beam.Row(**{name: _apply(convert, value) for name, convert, value in named})


def _to_python(data_type: pa.DataType) -> _Converter | None:
    if types.is_struct(data_type):
        fields = [(field.name, _to_python(field.type)) for field in data_type]
        return lambda value: beam.Row(**{name: _apply(convert, value[name]) for name, convert in fields})
    if types.is_map(data_type):
        to_key, to_item = _to_python(data_type.key_type), _to_python(data_type.item_type)
        return lambda value: {_apply(to_key, key): _apply(to_item, item) for key, item in value}
    if types.is_nested(data_type) and data_type.num_fields == 1:
        to_element = _to_python(data_type.field(0).type)
        return None if to_element is None else lambda value: [_apply(to_element, each) for each in value]
    return None


def row_type(schema: pa.Schema) -> Any:
    """Return the element type of `to_rows`. Values that Beam's schemas do not know, such as decimals, are `Any`.

    Raises:
        ValueError: a column's name cannot be that of a field of a row.
    """
    fields = []
    for field in schema:
        if not field.name.isidentifier():
            raise ValueError(
                f"the column {field.name!r} cannot be a field of a row; leave as_rows out, or choose columns="
            )
        fields.append((field.name, _python_type(field)))
    return RowTypeConstraint.from_fields(fields)


def _python_type(field: pa.Field) -> Any:
    plain = _python_type_of(field.type)
    return Optional[plain] if field.nullable and plain is not Any else plain  # noqa: UP045  # computed


def _python_type_of(data_type: pa.DataType) -> Any:  # noqa: PLR0911  # a table
    if types.is_dictionary(data_type):
        return _python_type_of(data_type.value_type)
    if types.is_boolean(data_type):
        return bool
    if types.is_integer(data_type) and data_type != pa.uint64():
        return int
    if types.is_floating(data_type):
        return float
    if types.is_string(data_type) or types.is_large_string(data_type):
        return str
    if types.is_binary(data_type) or types.is_large_binary(data_type) or types.is_fixed_size_binary(data_type):
        return bytes
    if types.is_list(data_type) or types.is_large_list(data_type):
        return Sequence[_python_type(data_type.value_field)]  # type: ignore[misc]  # computed
    if types.is_map(data_type):
        return Mapping[_python_type_of(data_type.key_type), _python_type(data_type.item_field)]  # type: ignore[misc]
    if types.is_struct(data_type):
        return row_type(pa.schema(list(data_type)))
    return Any
