"""Arrow arrays of every type, for hypothesis, and what makes two of them the same."""

import datetime as dt

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from hypothesis import strategies as st

UNITS = ("s", "ms", "us", "ns")
ZONES = ("UTC", "Europe/Berlin", "America/Argentina/Buenos_Aires", "+01:30")
WIDTHS = {"s": pa.time32, "ms": pa.time32, "us": pa.time64, "ns": pa.time64}

SIMPLE = [
    pa.null(), pa.bool_(), pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(),
    pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.string(), pa.large_string(), pa.string_view(),
    pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(1), pa.binary(16), pa.date32(), pa.date64(),
    pa.month_day_nano_interval(),
    *(WIDTHS[unit](unit) for unit in UNITS), *(pa.duration(unit) for unit in UNITS),
    *(pa.timestamp(unit) for unit in UNITS), *(pa.timestamp(unit, zone) for unit in UNITS for zone in ZONES),
    pa.decimal32(9, 2), pa.decimal64(18, 0), pa.decimal128(38, 10), pa.decimal128(1, 0), pa.decimal256(76, -3),
]  # fmt: skip

_names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4)


def types(depth=2):
    """Types, nested up to a depth."""
    simple = st.sampled_from(SIMPLE)
    if depth == 0:
        return simple
    inner = types(depth - 1)
    keys = st.sampled_from([pa.string(), pa.int32(), pa.timestamp("us", "UTC")])
    return st.one_of(
        simple,
        inner.map(pa.list_),
        inner.map(pa.large_list),
        inner.map(pa.list_view),
        inner.map(pa.large_list_view),
        st.builds(pa.list_, inner, st.integers(0, 3)),
        st.builds(lambda kind, name: pa.list_(pa.field(name, kind, nullable=True)), inner, _names),
        st.builds(pa.struct, st.lists(st.builds(pa.field, _names, inner), max_size=3)),
        st.builds(pa.map_, keys, inner),
        st.builds(pa.dictionary, st.sampled_from([pa.int8(), pa.uint16(), pa.int64()]), st.sampled_from(SIMPLE[1:18])),
        st.builds(
            pa.run_end_encoded,
            st.sampled_from([pa.int16(), pa.int32(), pa.int64()]),
            st.sampled_from([pa.int32(), pa.string(), pa.timestamp("us", "UTC")]),
        ),
    )


def _bits(kind):
    """Any bits of a type's width that are a value of it."""
    width = kind.bit_width // 8
    if pa.types.is_date64(kind):
        return st.integers(-(10**5), 10**5).map(lambda days: (days * 86_400_000).to_bytes(8, "little", signed=True))
    if pa.types.is_time(kind):
        day = 86_400 * {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit]
        return st.integers(0, day - 1).map(lambda count: count.to_bytes(width, "little"))
    if pa.types.is_decimal(kind):
        limit = 10**kind.precision - 1
        return st.integers(-limit, limit).map(lambda number: number.to_bytes(width, "little", signed=True))
    return st.binary(min_size=width, max_size=width)


@st.composite
def arrays(draw, kind, n=None):  # noqa: C901, PLR0911  # one for each kind of type
    """Arrays of a type; of n values, or of any number."""
    n = draw(st.integers(0, 6)) if n is None else n
    if pa.types.is_null(kind):
        return pa.nulls(n)
    if pa.types.is_dictionary(kind):
        values = draw(arrays(kind.value_type, draw(st.integers(1, 4))))
        indices = draw(st.lists(st.none() | st.integers(0, len(values) - 1), min_size=n, max_size=n))
        return pa.DictionaryArray.from_arrays(pa.array(indices, kind.index_type), values)
    if pa.types.is_run_end_encoded(kind):
        return pc.run_end_encode(draw(arrays(kind.value_type, n)), run_end_type=kind.run_end_type)
    valid = draw(st.lists(st.booleans(), min_size=n, max_size=n)) if draw(st.booleans()) else [True] * n
    bitmap = None if all(valid) else pa.py_buffer(np.packbits(np.array(valid, bool), bitorder="little"))
    nulls = pa.array([not here for here in valid], pa.bool_())
    if pa.types.is_struct(kind):
        children = [draw(arrays(kind.field(i).type, n)) for i in range(kind.num_fields)]
        return pa.Array.from_buffers(kind, n, [bitmap], children=children)
    if pa.types.is_fixed_size_list(kind):
        return pa.Array.from_buffers(kind, n, [bitmap], children=[draw(arrays(kind.value_type, n * kind.list_size))])
    if pa.types.is_nested(kind):
        sizes = [draw(st.integers(0, 3)) if here else 0 for here in valid]
        bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        if pa.types.is_map(kind):
            keys = draw(arrays(kind.key_type, int(bounds[-1])))
            keys = keys if keys.null_count == 0 else keys.fill_null(pa.scalar(_some(kind.key_type), kind.key_type))
            values = draw(arrays(kind.item_type, int(bounds[-1])))
            return pa.MapArray.from_arrays(pa.array(bounds, pa.int32()), keys, values, kind, mask=nulls if n else None)
        values = draw(arrays(kind.value_type, int(bounds[-1])))
        large = pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind)
        width = np.int64 if large else np.int32
        buffers = [bitmap, pa.py_buffer(bounds.astype(width))]
        if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
            buffers = [bitmap, pa.py_buffer(bounds[:-1].astype(width)), pa.py_buffer(np.array(sizes, width))]
        return pa.Array.from_buffers(kind, n, buffers, children=[values])
    if "string" in str(kind) or (("binary" in str(kind)) and "fixed" not in str(kind)):
        texts = st.text(st.characters(codec="utf-8"), max_size=20) if "string" in str(kind) else st.binary(max_size=20)
        return pa.array([draw(texts) if here else None for here in valid], kind)
    if pa.types.is_boolean(kind):
        return pa.array([draw(st.booleans()) if here else None for here in valid], kind)
    return pa.Array.from_buffers(kind, n, [bitmap, pa.py_buffer(b"".join(draw(_bits(kind)) for _ in range(n)))])


def _some(kind):
    if pa.types.is_string(kind):
        return "k"
    return 1 if pa.types.is_integer(kind) else dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)


@st.composite
def any_arrays(draw, kinds=None):
    """Arrays of any type, of which some are slices of longer ones."""
    array = draw(arrays(draw(types() if kinds is None else kinds)))
    start = draw(st.integers(0, len(array)))
    return array.slice(start, draw(st.integers(0, len(array) - start)))


def plain(array):  # noqa: PLR0911
    """Return the values of an array in a form in which equal means equal to the last bit, also of NaN."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return plain(array.storage)
    if pa.types.is_dictionary(kind):
        values = plain(array.dictionary)
        return [None if index is None else values[index] for index in array.indices.to_pylist()]
    if pa.types.is_run_end_encoded(kind):
        values, ends = plain(array.values), array.run_ends.to_pylist()
        numbers = range(array.offset, array.offset + len(array))
        return [values[next(run for run, end in enumerate(ends) if number < end)] for number in numbers]
    if pa.types.is_null(kind):
        return [None] * len(array)
    valid = array.is_valid().to_pylist()
    if pa.types.is_struct(kind):
        children = [plain(array.field(i)) for i in range(kind.num_fields)]
        return [tuple(child[i] for child in children) if here else None for i, here in enumerate(valid)]
    if pa.types.is_nested(kind):
        return [plain(value.values) if here else None for value, here in zip(array, valid, strict=True)]
    if pa.types.is_boolean(kind) or not _fixed(kind):
        return array.to_pylist()
    width, body = kind.bit_width // 8, array.buffers()[1]
    raw = b"" if body is None else body.to_pybytes()[array.offset * width :]
    return [raw[i * width : (i + 1) * width] if here else None for i, here in enumerate(valid)]


def _fixed(kind):
    try:
        return kind.bit_width > 0
    except ValueError:
        return False
