"""The plaintext of raw cells: bytes as they are, and other values as the text that SQL casts back."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from beam_envelope.errors import FormatError
from beam_envelope.formats import cell
from beam_envelope.formats.cell_type import value_type

_USE_COMPACT = "Use layout='compact'"


def raw_kind(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values that raw cells of a type hold.

    Raises:
        TypeError: values of this type have no form that SQL reads.
    """
    kind = value_type(kind)
    types = pa.types
    if types.is_nested(kind):
        raise TypeError(f"values of type {kind} are nested, and SQL has no text for them. {_USE_COMPACT}")
    if types.is_duration(kind) or types.is_interval(kind):
        raise TypeError(f"values of type {kind} have no text that Arrow reads back. {_USE_COMPACT}")
    return kind


def to_raw(values: pa.Array) -> pa.Array:
    """Return the plaintexts of raw cells, large_binary.

    Raises:
        TypeError, ValueError: the type, or a value, has no text that leads back to it.
    """
    kind = raw_kind(values.type)
    bodies = cell.encode(values)
    if len(values) == bodies.null_count or cell.is_text(kind) or pa.types.is_fixed_size_binary(kind):
        return bodies
    plain = cell.decode(bodies, kind)  # without its dictionary, runs or extension
    try:
        text = plain.cast(pa.large_string())
        exact = cell.encode(_from_text(text, kind)).equals(bodies)
    except pa.ArrowException:  # what it says may hold a value
        exact = False
    if not exact:
        raise ValueError(f"a value of type {kind} has no text that leads back to it exactly. {_USE_COMPACT}")
    return cell.encode(text)


def from_raw(plaintexts: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return the values of the plaintexts of raw cells.

    Raises:
        FormatError: one is not the text of a value of this type.
    """
    plain = value_type(kind)
    if plaintexts.null_count == len(plaintexts) or cell.is_text(plain) or pa.types.is_fixed_size_binary(plain):
        return cell.decode(plaintexts, kind)
    text = cell.decode(plaintexts, pa.large_string())
    try:
        values = _from_text(text, plain)
    except pa.ArrowException:  # it says which text
        values = None
    if values is None:
        raise FormatError(f"a raw cell does not hold the text of a value of type {plain}")
    return cell.decode(cell.encode(values), kind)


def _from_text(text: pa.Array, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_time(kind):
        return text.cast(kind)
    day = pa.scalar("1970-01-01", pa.large_string())  # Arrow reads times of day as part of timestamps only
    moment = pc.binary_join_element_wise(day, text, pa.scalar(" ", pa.large_string()))
    return moment.cast(pa.timestamp(kind.unit)).cast(kind)
