"""From Arrow arrays to the plaintexts of cells, and back; single cells may fail. What encrypts them is in column.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_envelope.errors import DATA_ERRORS, EnvelopeError, FormatError
from beam_envelope.formats import cell
from beam_envelope.formats.binary_array import Numbers, cut
from beam_envelope.formats.cell import TooLargeError
from beam_envelope.formats.cell_type import MAX_BYTES, describe, parse

_NULL_CELL: Final = pa.scalar(b"n\x00", pa.large_binary())

ONE_CELL: Final = DATA_ERRORS
"""The errors that concern a cell, and not the KMS or the program."""

Failures: TypeAlias = dict[int, EnvelopeError]
"""By the number of the row."""


def to_cells(values: pa.Array) -> tuple[bytes, pa.Array]:
    """Return the two parts of what is encrypted for each value: descriptor and 0x00, and the payloads.

    Raises:
        TypeError, ValueError: the type has no form as cells, or the array is not a valid one of its type.
    """
    head = describe(values.type).encode() + b"\x00"
    try:
        values.validate(full=True)
    except pa.ArrowException:
        values = None
    if values is None:
        msg = "this is no valid array of its type (pyarrow's validate(full=True) says more), so it would not come back"
        raise ValueError(msg)
    return head, cell.encode(values)


def from_cells(cells: pa.Array, kind: pa.DataType | None, failures: Failures | None = None) -> pa.Array:
    """Return the values of cells.

    Args:
        cells: what `to_cells` returned.
        kind: the type of the values; None: the one that the first cell names.
        failures: takes the errors of single cells, whose values are then null; None: the first one is raised.

    Raises:
        FormatError: cells are not of this type, or not all of the same, or have no value of their type.
    """
    present = cells.drop_null()
    if len(present) == 0:
        return cell.nulls(len(cells), pa.null() if kind is None else kind)
    if kind is None:
        for first in present:
            try:
                kind = parse(first.as_py()[: MAX_BYTES + 1].partition(b"\x00")[0])
                if not pa.types.is_null(kind):
                    break
            except FormatError:
                if failures is None:
                    raise
        else:
            kind = pa.null()
    head = describe(kind).encode() + b"\x00"
    wrong = np.flatnonzero(~np.asarray(pc.starts_with(cells, pattern=head).fill_null(True)))  # noqa: FBT003
    if len(wrong):
        null = np.asarray(pc.equal(cells, _NULL_CELL).fill_null(False))  # noqa: FBT003  # of EncryptFields
        cells = pc.if_else(pa.array(null), pa.scalar(None, cells.type), cells)
        wrong = wrong[~null[wrong]]
    if len(wrong):
        error = FormatError(f"a cell is not of the type {kind}, as others of its column are")
        cells = fail(cells, wrong, error, failures)
    found = kind
    return decode_each(lambda payload: cell.decode(payload, found), cut(cells, len(head)), failures)


def decode_each(decode: Callable[[pa.Array], pa.Array], values: pa.Array, failures: Failures | None) -> pa.Array:
    """Decode an array; of one that fails, find the values that are malformed, and decode the others.

    Args:
        decode: raises FormatError.
        values: to decode.
        failures: takes the errors of single values, which are then null; None: the first one is raised.

    Raises:
        FormatError: from `decode`; TooLargeError in any case.
    """
    todo = [(0, len(values))]
    try:
        return decode(values)
    except TooLargeError:
        raise
    except FormatError:
        if failures is None:
            raise
    while todo:  # halve what fails until it is one value
        start, end = todo.pop()
        try:
            decode(values.slice(start, end - start))
        except FormatError as error:
            if end - start > 1:
                middle = (start + end) // 2
                todo += [(start, middle), (middle, end)]
            else:
                values = fail(values, np.array([start]), error, failures)
    return decode(values)


def fail(cells: pa.Array, rows: Numbers, error: EnvelopeError, failures: Failures | None) -> pa.Array:
    """Note an error for rows, and return the cells with null in their place."""
    if failures is None:
        raise error
    failures.update(dict.fromkeys(rows.tolist(), error))
    mask = np.ones(len(cells), bool)
    mask[rows] = False
    return pc.if_else(pa.array(mask), cells, pa.scalar(None, cells.type))
