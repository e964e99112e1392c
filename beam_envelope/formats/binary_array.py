"""Arrow arrays of bytes, a whole column at a time: made of buffers, taken apart, cut, joined."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NOTHING: Final = pa.scalar(b"", pa.large_binary())
Numbers = np.ndarray[Any, Any]


def bitmap(valid: Numbers | None) -> pa.Buffer | None:
    """Return which values are not null as Arrow has it: a bit each, or None where all are valid."""
    return None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little"))


def payloads(n: int, offsets: Numbers, data: pa.Buffer | Numbers, valid: Numbers | None = None) -> pa.Array:
    """Return a large_binary array over `data`: n values, of which `valid` says which are not null."""
    body = data if isinstance(data, pa.Buffer) else pa.py_buffer(np.ascontiguousarray(data))
    starts = pa.py_buffer(np.ascontiguousarray(offsets, np.int64))
    return pa.Array.from_buffers(pa.large_binary(), n, [bitmap(valid), starts, body])


def offsets_of(array: pa.Array) -> Numbers:
    """Return the n + 1 offsets of a large_binary array into its data buffer."""
    if len(array) == 0:
        return np.zeros(1, np.int64)
    return np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]


def data_of(array: pa.Array) -> Numbers:
    """Return the data buffer of a large_binary array, all of it."""
    buffer = array.buffers()[2]
    return np.zeros(0, np.uint8) if buffer is None else np.frombuffer(buffer, np.uint8)


def join(*parts: pa.Array | pa.Scalar) -> pa.Array:
    """Return the concatenations of the values of each row; null where one is null."""
    return pc.binary_join_element_wise(*parts, NOTHING)


def cut(array: pa.Array, start: int, stop: int | None = None) -> pa.Array:
    """Return each value's bytes from `start` to `stop`, or to its end; `binary_slice` of pyarrow 25 fails on nulls."""
    offsets = offsets_of(array)
    starts = np.minimum(offsets[:-1] + start, offsets[1:])
    ends = offsets[1:] if stop is None else np.minimum(offsets[:-1] + stop, offsets[1:])
    return gather(array.buffers()[2] or pa.py_buffer(b""), starts, ends, valid_of(array))


def narrow(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return large_binary values of 2 GiB or less in all as binary or string; the data stays where it is."""
    offsets = offsets_of(array)
    starts = pa.py_buffer((offsets - offsets[0]).astype(np.int32))
    data = (array.buffers()[2] or pa.py_buffer(b"")).slice(int(offsets[0]))
    return pa.Array.from_buffers(kind, len(array), [bitmap(valid_of(array)), starts, data])


def fixed(rows: Numbers) -> pa.Array:
    """Return a matrix of bytes as a large_binary array, a row a value."""
    n, width = rows.shape
    return payloads(n, np.arange(n + 1, dtype=np.int64) * width, rows.reshape(-1))


def valid_of(array: pa.Array) -> Numbers | None:
    """Return which values are not null, or None where all are valid."""
    return None if array.null_count == 0 else array.is_valid().to_numpy(zero_copy_only=False)


def gather(data: pa.Buffer, starts: Numbers, ends: Numbers, valid: Numbers | None) -> pa.Array:
    """Return slices of a buffer, in the order in which they lie there; null where they are not valid."""
    bounds = np.stack([starts, ends], axis=1).reshape(-1)
    if not len(starts):
        return pa.array([], pa.large_binary())
    slices = payloads(len(bounds) - 1, bounds, data)  # every second one is what lies between two slices
    return slices.take(pa.array(np.arange(0, len(bounds), 2), mask=None if valid is None else ~valid))
