"""Arrow arrays as arrays of cell payloads, and back, a whole column at a time.

Bytes: docs/format.md, 9.2.

Payloads are large_binary arrays: null where the value is null. What encrypts them is in column.py.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_envelope.errors import FormatError
from beam_envelope.formats.binary_array import (
    NOTHING,
    Numbers,
    bitmap,
    data_of,
    fixed,
    gather,
    join,
    narrow,
    offsets_of,
    payloads,
    valid_of,
)

_NULL: Final = 0xFFFFFFFF
_FRAME: Final = struct.Struct("<I")
_FEW_ROWS: Final = 32
_MAX_ITEMS: Final = 2**31 - 1


class TooLargeError(FormatError):
    """So many values, or such long ones, do not fit into one array of their type; in two they may."""

    def __init__(self, kind: pa.DataType) -> None:
        """Name the type."""
        super().__init__(f"so many different values do not fit into one array of type {kind}. Read smaller batches")


# --------------------------------------------------------------------------------------------------- encode


def encode(array: pa.Array) -> pa.Array:  # noqa: PLR0911  # one for each kind of type
    """Return the payloads of an array of a type that `cell_type.describe` knows."""
    kind, n = array.type, len(array)
    if isinstance(kind, pa.BaseExtensionType):
        return encode(array.storage)
    if n == 0 or pa.types.is_null(kind):
        return pa.nulls(n, pa.large_binary())
    if pa.types.is_dictionary(kind):
        return encode(array.dictionary).take(array.indices)
    if pa.types.is_run_end_encoded(kind):
        runs = pa.RunEndEncodedArray.from_arrays(array.run_ends, encode(array.values))
        return pc.run_end_decode(runs.slice(array.offset, n))
    if is_text(kind):
        return _encode_text(array)
    if pa.types.is_nested(kind):
        return _encode_struct(array) if pa.types.is_struct(kind) else _encode_list(array)
    return _encode_fixed(array)


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is one of strings or bytes of any length."""
    types = pa.types
    return any(
        test(kind)
        for test in (
            types.is_string, types.is_binary, types.is_large_string, types.is_large_binary,
            types.is_string_view, types.is_binary_view,
        )
    )  # fmt: skip


def _encode_text(array: pa.Array) -> pa.Array:
    """Widen the offsets; the data stays where it is."""
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    bytes_type = pa.binary() if pa.types.is_string(array.type) else pa.large_binary()
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        array = array.view(bytes_type)
    return array.cast(pa.large_binary())


def _encode_fixed(array: pa.Array) -> pa.Array:
    n, valid = len(array), valid_of(array)
    if pa.types.is_boolean(array.type):
        rows = array.fill_null(False).cast(pa.uint8()).to_numpy()  # noqa: FBT003
        width = 1
    else:
        width = array.type.bit_width // 8
        body = array.buffers()[1]
        whole = np.zeros(n * width, np.uint8) if body is None else np.frombuffer(body, np.uint8)
        start = 0 if body is None else array.offset * width
        rows = whole[start : start + n * width]
    return payloads(n, np.arange(n + 1, dtype=np.int64) * width, rows, valid)


def _frame(array: pa.Array) -> pa.Array:
    """Return payloads as frames: the length as u32, little-endian, or 0xFFFFFFFF for null; and the payload."""
    lengths = np.asarray(pc.binary_length(array).fill_null(_NULL))
    if array.null_count == 0 and len(lengths) and lengths.max() >= _NULL:
        msg = "one value inside a list, struct or map has 4 GiB or more, which is too long for a cell"
        raise ValueError(msg)
    heads = fixed(lengths.astype("<u4").view(np.uint8).reshape(-1, 4))
    return pc.binary_join_element_wise(heads, array, NOTHING, null_handling="replace", null_replacement="")


def _encode_struct(array: pa.Array) -> pa.Array:
    n, valid = len(array), valid_of(array)
    framed = [_frame(encode(array.field(number))) for number in range(array.type.num_fields)]
    joined = join(*framed) if framed else payloads(n, np.zeros(n + 1), np.zeros(0, np.uint8))
    return payloads(n, offsets_of(joined), data_of(joined), valid)


def _encode_list(array: pa.Array) -> pa.Array:
    """Frame the items of all rows at once: the payload of a row is then one slice of the result."""
    kind, n, valid = array.type, len(array), valid_of(array)
    if pa.types.is_fixed_size_list(kind):
        starts = np.arange(n + 1, dtype=np.int64) * kind.list_size
        items = array.values.slice(array.offset * kind.list_size, n * kind.list_size)
    elif pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        sizes = np.asarray(array.sizes).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes if valid is None else np.where(valid, sizes, 0))])
        items = array.flatten()
    else:
        starts = np.asarray(array.offsets).astype(np.int64)
        items = array.values.slice(starts[0], starts[-1] - starts[0])
        starts = starts - starts[0]
    framed = _frame(encode(items))
    return payloads(n, offsets_of(framed)[starts], data_of(framed), valid)


# --------------------------------------------------------------------------------------------------- decode


def nulls(n: int, kind: pa.DataType) -> pa.Array:
    """Return n nulls of a type; those of `pyarrow.nulls` are malformed where runs are inside of lists."""
    return decode(pa.nulls(n, pa.large_binary()), kind)


def decode(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return the values of payloads.

    Args:
        array: large_binary; null where the value is null.
        kind: the type of the values, of any encoding.

    Raises:
        FormatError: a payload is not one of this type.
    """
    try:
        values = _decode(array, kind)
        values.validate(full=True)  # UTF-8, ranges of numbers, keys of maps
    except (pa.ArrowException, ValueError, OverflowError):  # what they say may hold data
        values = None
    if values is None:
        raise FormatError(f"a cell is not a value of type {kind}: whoever encrypted it wrote it in another form")
    return values


def _decode(array: pa.Array, kind: pa.DataType) -> pa.Array:  # noqa: PLR0911
    if isinstance(kind, pa.BaseExtensionType):
        return kind.wrap_array(_decode(array, kind.storage_type))
    if pa.types.is_dictionary(kind):
        encoded = array.dictionary_encode()
        sign_bits = int(pa.types.is_signed_integer(kind.index_type))
        if len(encoded.dictionary) > 1 << kind.index_type.bit_width - sign_bits:
            raise TooLargeError(kind)
        values = _decode(encoded.dictionary, kind.value_type)
        return pa.DictionaryArray.from_arrays(encoded.indices.cast(kind.index_type), values, ordered=kind.ordered)
    if pa.types.is_run_end_encoded(kind):
        if len(array) >= 1 << kind.run_end_type.bit_width - 1:
            raise TooLargeError(kind)
        encoded = pc.run_end_encode(array, run_end_type=kind.run_end_type)
        values = _decode(encoded.values, kind.value_type)
        return pa.RunEndEncodedArray.from_arrays(encoded.run_ends, values, kind)
    if pa.types.is_null(kind):
        _require(array.null_count == len(array))
        return pa.nulls(len(array))
    if is_text(kind):
        return _decode_text(array, kind)
    if pa.types.is_struct(kind):
        return _decode_struct(array, kind)
    return _decode_list(array, kind) if pa.types.is_nested(kind) else _decode_fixed(array, kind)


def _require(holds: object) -> None:
    if not holds:
        raise ValueError


def _decode_text(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_string_view(kind):
        wide = array.view(pa.large_string())
        wide.validate(full=True)  # a view's cast does not look
        return wide.cast(kind)
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        if np.ptp(offsets_of(array)) > _MAX_ITEMS:
            raise TooLargeError(kind)
        return narrow(array, kind)
    return array.view(kind) if pa.types.is_large_string(kind) else array.cast(kind)


def _decode_fixed(array: pa.Array, kind: pa.DataType) -> pa.Array:
    n, valid, present = len(array), valid_of(array), array.drop_null()
    width = 1 if pa.types.is_boolean(kind) else kind.bit_width // 8
    offsets = offsets_of(present)
    _require((np.diff(offsets) == width).all())
    rows = data_of(present)[offsets[0] : offsets[-1]].reshape(len(present), width)
    if valid is not None:
        spread = np.zeros((n, width), np.uint8)
        spread[valid] = rows
        rows = spread
    if pa.types.is_boolean(kind):
        _require((rows <= 1).all())
        body = np.packbits(rows.reshape(-1), bitorder="little")
    else:
        body = np.ascontiguousarray(rows).reshape(-1)
    return pa.Array.from_buffers(kind, n, [bitmap(valid), pa.py_buffer(body)])


def _gather_frames(data: Numbers, starts: Numbers, lengths: Numbers) -> pa.Array:
    null = lengths == _NULL
    ends = starts + np.where(null, 0, lengths)
    return gather(pa.py_buffer(data), starts, ends, ~null if null.any() else None)


def _heads(data: Numbers, at: Numbers, ends: Numbers) -> Numbers:
    """Return the length that stands at each position, 0xFFFFFFFF for null; the frames end before `ends`."""
    _require((at + 4 <= ends).all())
    heads = data[at[:, None] + np.arange(4)].view("<u4").reshape(-1).astype(np.int64)
    _require((np.where(heads == _NULL, 0, heads) <= ends - at - 4).all())
    return heads


def _spread(array: pa.Array, valid: Numbers | None, each: int = 1) -> pa.Array:
    """Return an array with `each` nulls at each row that is not valid."""
    if valid is None:
        return array
    slots = np.repeat(valid, each)
    return array.take(pa.array(np.cumsum(slots) - 1, mask=~slots))


def _decode_struct(array: pa.Array, kind: pa.DataType) -> pa.Array:
    valid, present = valid_of(array), array.drop_null()
    offsets, data = offsets_of(present), data_of(present)
    at, ends = offsets[:-1], offsets[1:]
    children = []
    for number in range(kind.num_fields):
        lengths = _heads(data, at, ends)
        child = _gather_frames(data, at + 4, lengths)
        children.append(_decode(_spread(child, valid), kind.field(number).type))
        at = at + 4 + np.where(lengths == _NULL, 0, lengths)
    _require((at == ends).all())
    return pa.Array.from_buffers(kind, len(array), [bitmap(valid)], children=children)


def _decode_list(array: pa.Array, kind: pa.DataType) -> pa.Array:
    n, valid, present = len(array), valid_of(array), array.drop_null()
    offsets, data = offsets_of(present), data_of(present)
    starts, lengths, counts = _frames(data, offsets)
    items = _gather_frames(data, starts, lengths)
    if pa.types.is_fixed_size_list(kind):
        _require((counts == kind.list_size).all() and n * kind.list_size <= _MAX_ITEMS)
        values = _decode(_spread(items, valid, kind.list_size), kind.value_type)
        return pa.Array.from_buffers(kind, n, [bitmap(valid)], children=[values])
    if pa.types.is_map(kind):
        _require(items.null_count == 0)
        values = _decode(items, pa.struct([kind.key_field, kind.item_field]))
    else:
        values = _decode(items, kind.value_type)
    sizes = np.zeros(n, np.int64)
    sizes[slice(None) if valid is None else valid] = counts
    large = pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind)
    _require(large or len(values) <= _MAX_ITEMS)
    width = np.int64 if large else np.int32
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(width)
    if pa.types.is_map(kind):
        keys = values.field(0)
        _require(keys.null_count == 0)  # also makes Arrow count them; it ends the process if it meets one later
        mask = None if valid is None else np.append(~valid, False)
        return pa.MapArray.from_arrays(pa.array(bounds, mask=mask), keys, values.field(1), kind)
    buffers = [bitmap(valid), pa.py_buffer(bounds)]
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        buffers = [bitmap(valid), pa.py_buffer(bounds[:-1].copy()), pa.py_buffer(sizes.astype(width))]
    return pa.Array.from_buffers(kind, n, buffers, children=[values])


def _frames(data: Numbers, offsets: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Return start and length of the payload of each frame in all rows, and how many frames each row has.

    Frame after frame has to be read, so the first frames of all rows are read at once, then the second ones, and so
    on; the last few rows with more frames than all others are read one by one.
    """
    at, ends = offsets[:-1].copy(), offsets[1:]
    if len(at) and (even := _even_frames(data, offsets)) is not None:
        return even
    rows, starts, lengths = [], [], []
    active = np.flatnonzero(at < ends)
    while len(active) > _FEW_ROWS:
        heads = _heads(data, at[active], ends[active])
        rows.append(active)
        starts.append(at[active] + 4)
        lengths.append(heads)
        at[active] += 4 + np.where(heads == _NULL, 0, heads)
        active = active[at[active] < ends[active]]
    view = data.data
    for row in active.tolist():
        found = _frames_of_row(view, int(at[row]), int(ends[row]))
        rows.append(np.full(len(found), row))
        starts.append(np.array([start for start, _ in found], np.int64))
        lengths.append(np.array([length for _, length in found], np.int64))
    if not rows:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(len(at), np.int64)
    row = np.concatenate(rows)
    order = np.argsort(row, kind="stable")
    return np.concatenate(starts)[order], np.concatenate(lengths)[order], np.bincount(row, minlength=len(at))


def _even_frames(data: Numbers, offsets: Numbers) -> tuple[Numbers, Numbers, Numbers] | None:
    """Return what `_frames` does if all frames have one length, as those of numbers have; else None."""
    first, last = int(offsets[0]), int(offsets[-1])
    if last - first < _FRAME.size:
        return None
    (length,) = _FRAME.unpack_from(data.data, first)
    step = 4 + length
    if length == _NULL or (np.diff(offsets) % step).any():
        return None
    starts = np.arange(first, last, step)
    if not (data[starts[:, None] + np.arange(4)].view("<u4").reshape(-1) == length).all():
        return None
    return starts + 4, np.full(len(starts), length, np.int64), np.diff(offsets) // step


def _frames_of_row(view: memoryview, at: int, end: int) -> list[tuple[int, int]]:
    found = []
    while at < end:
        _require(at + 4 <= end)
        (length,) = _FRAME.unpack_from(view, at)
        found.append((at + 4, length))
        at += 4 + (0 if length == _NULL else length)
    _require(at == end)
    return found
