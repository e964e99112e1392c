"""Arrow types as descriptors, and arrays as payloads: exact bytes, exact types, and nothing but FormatError."""

import struct
from datetime import date, datetime, timezone
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from beam_envelope.errors import FormatError
from beam_envelope.formats import cell
from beam_envelope.formats.cell_type import MAX_DEPTH, describe, parse, value_type
from beam_envelope.formats.value import decode_value, encode_value
from tests.arrow import any_arrays, plain, types

DESCRIPTORS = {
    "n": pa.null(), "b": pa.bool_(), "c": pa.int8(), "C": pa.uint8(), "s": pa.int16(), "S": pa.uint16(),
    "i": pa.int32(), "I": pa.uint32(), "l": pa.int64(), "L": pa.uint64(), "e": pa.float16(), "f": pa.float32(),
    "g": pa.float64(), "z": pa.binary(), "Z": pa.large_binary(), "u": pa.string(), "U": pa.large_string(),
    "vu": pa.string_view(), "vz": pa.binary_view(), "w:42": pa.binary(42), "d:19,10": pa.decimal128(19, 10),
    "d:5,-2": pa.decimal128(5, -2), "d:40,3,256": pa.decimal256(40, 3), "d:9,1,32": pa.decimal32(9, 1),
    "d:18,1,64": pa.decimal64(18, 1), "tdD": pa.date32(), "tdm": pa.date64(), "tts": pa.time32("s"),
    "ttm": pa.time32("ms"), "ttu": pa.time64("us"), "ttn": pa.time64("ns"), "tss:": pa.timestamp("s"),
    "tsm:UTC": pa.timestamp("ms", "UTC"), "tsu:+01:00": pa.timestamp("us", "+01:00"),
    "tsn:America/New_York": pa.timestamp("ns", "America/New_York"), "tDs": pa.duration("s"), "tDm": pa.duration("ms"),
    "tDu": pa.duration("us"), "tDn": pa.duration("ns"), "tin": pa.month_day_nano_interval(),
    "+l(i)": pa.list_(pa.int32()), "+L(u)": pa.large_list(pa.string()), "+vl(i)": pa.list_view(pa.int32()),
    "+vL(i)": pa.large_list_view(pa.int32()), "+w:3(i)": pa.list_(pa.int32(), 3),
    '+s("name"i,"b"u)': pa.struct({"name": pa.int32(), "b": pa.string()}), "+s()": pa.struct([]),
    '+s("a,\\")("d:10,2,"\\u00e9"+s("x"n))': pa.struct(
        {'a,")(': pa.decimal128(10, 2), "é": pa.struct({"x": pa.null()})}
    ),
    "+m(u,d:5,1)": pa.map_(pa.string(), pa.decimal128(5, 1)),
    "+l(+m(d:10,2,+l(i)))": pa.list_(pa.map_(pa.decimal128(10, 2), pa.list_(pa.int32()))),
}  # fmt: skip


@pytest.mark.parametrize("text", DESCRIPTORS)
def test_a_type_is_written_as_in_the_arrow_c_data_interface(text):
    assert describe(DESCRIPTORS[text]) == text
    assert parse(text.encode()) == DESCRIPTORS[text]


def test_encodings_and_extensions_are_written_as_their_values():
    class Email(pa.ExtensionType):
        def __init__(self):
            super().__init__(pa.dictionary(pa.int8(), pa.string()), "test.email")

        def __arrow_ext_serialize__(self):
            return b""

    assert describe(Email()) == describe(pa.run_end_encoded(pa.int16(), pa.string())) == "u"
    assert describe(pa.list_(pa.dictionary(pa.int8(), pa.int64()))) == "+l(l)"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (pa.sparse_union([pa.field("a", pa.int8())]), "have no form as cells"),
        (pa.list_(pa.dense_union([pa.field("a", pa.int8())])), "have no form as cells"),
        (pa.timestamp("s", "a,b"), "neither an IANA name nor an offset"),
    ],
)
def test_a_type_without_a_form_is_refused(kind, message):
    with pytest.raises(TypeError, match=message):
        describe(kind)


def test_a_type_that_is_nested_too_deep_or_too_wide_is_refused():
    deep = pa.int8()
    for _ in range(MAX_DEPTH):
        deep = pa.list_(deep)
    with pytest.raises(TypeError, match="nested more than 32 deep"):
        describe(deep)
    with pytest.raises(TypeError, match="too wide"):
        describe(pa.struct([(f"{number:0100}", pa.int8()) for number in range(700)]))
    assert parse(b"+l(" * 31 + b"i" + b")" * 31)
    for nested in (32, 5000):
        with pytest.raises(FormatError):
            parse(b"+l(" * nested + b"i" + b")" * nested)


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "ii", "i ", " i", "u\n", "w:", "w:-1", "w:99999999999", "w:4294967296", "d:39,1", "d:0,1", "d:5",
        "d:5,1,16", "tsx:", "ts", "tss", "tss:a,b", "ttx", "+l", "+l()", "+l(i", "+l(i))", "+l(i,i)", "+l[i]", "+s",
        '+s("a")', '+s("a"i', '+s("a"i,)', "+s(i)", "+s(,)", "+s(1i)", '+s("a"i;"b"i)', "+m(u)", "+m(u,i,i)", "+w:(i)",
        "+w:-1(i)", "+ud:0", "+r(i,u)", "@l", "+s(null)", "\u00fc",
    ],
)  # fmt: skip
def test_what_is_no_descriptor_is_a_format_error(text):
    with pytest.raises(FormatError, match=r"^this cell does not begin with the description of an Arrow type"):
        parse(text.encode())


@given(st.binary(max_size=20) | st.text('+lLsmvw:(),"ui0123456789dtn-', max_size=20).map(str.encode))
def test_no_bytes_do_more_than_a_format_error_to_the_parser(text):
    try:
        kind = parse(text)
    except FormatError:
        return
    assert parse(describe(kind).encode()) == kind


@given(types())
def test_any_type_comes_back_from_its_descriptor(kind):
    assert describe(parse(describe(kind).encode())) == describe(kind)


# ------------------------------------------------------------------------------------------------- payloads


def frames(*payloads):
    """Return payloads as the items of a list have them; None is null."""
    null = b"\xff\xff\xff\xff"
    return b"".join(null if one is None else struct.pack("<I", len(one)) + one for one in payloads)


PAYLOADS = [
    (pa.array([1, None, -2], pa.int16()), [b"\1\0", None, b"\xfe\xff"]),
    (pa.array([True, None, False]), [b"\1", None, b"\0"]),
    (pa.array(["Ada", None, ""]), [b"Ada", None, b""]),
    (pa.array(["Ada", None, "é" * 20], pa.string_view()), [b"Ada", None, "é".encode() * 20]),
    (pa.array([b"\0\xff", None], pa.large_binary()), [b"\0\xff", None]),
    (pa.array([1.5], pa.float64()), [struct.pack("<d", 1.5)]),
    (pa.array([Decimal("1.50")], pa.decimal128(5, 2)), [(150).to_bytes(16, "little")]),
    (pa.array([date(1970, 1, 3)], pa.date32()), [b"\2\0\0\0"]),
    (pa.array([b"ab", None], pa.binary(2)), [b"ab", None]),
    (pa.array(["a", None, "a"]).dictionary_encode(), [b"a", None, b"a"]),
    (pa.nulls(2), [None, None]),
    (pa.array([[1, None], None, []], pa.list_(pa.int8())), [frames(b"\1", None), None, b""]),
    (pa.array([["a", "bc"], None], pa.list_view(pa.string())), [frames(b"a", b"bc"), None]),
    (pa.array([[1, 2], None], pa.list_(pa.int8(), 2)), [frames(b"\1", b"\2"), None]),
    (pa.array([{"a": 1, "b": "x"}, None], pa.struct({"a": pa.int8(), "b": pa.string()})), [frames(b"\1", b"x"), None]),
    (pa.array([{}, None], pa.struct([])), [b"", None]),
    (
        pa.array([[("k", 1), ("l", None)], None], pa.map_(pa.string(), pa.int8())),
        [frames(frames(b"k", b"\1"), frames(b"l", None)), None],
    ),
    (pa.array([[[1], None]], pa.list_(pa.list_(pa.int8()))), [frames(frames(b"\1"), None)]),
]


@pytest.mark.parametrize(("array", "payloads"), PAYLOADS, ids=lambda x: str(getattr(x, "type", "")) or "bytes")
def test_payloads_are_these_bytes(array, payloads):
    assert cell.encode(array).to_pylist() == payloads
    back = cell.decode(pa.array(payloads, pa.large_binary()), array.type)
    assert back.type == array.type
    assert plain(back) == plain(array)


@given(any_arrays())
@example(pa.array([[1]] * 40 + [[1, 2, 3, None]] * 2 + [None], pa.list_(pa.int8())))
@example(pa.array([[], None, []], pa.list_(pa.string())))
@example(pa.DictionaryArray.from_arrays(pa.array([0, None, 1, 2], pa.int8()), pa.array(["a", None, "a"])))
@example(pa.array([{"a": 1}, None]).slice(1))
@example(pa.array([[[("k", [1])]], None] * 3, pa.list_(pa.map_(pa.string(), pa.list_(pa.int32())))).slice(1, 3))
def test_any_array_comes_back_to_the_last_bit_with_its_type(array):
    back = cell.decode(cell.encode(array), array.type)
    assert back.type == array.type
    assert plain(back) == plain(array)
    back.validate(full=True)


@given(any_arrays())
def test_any_array_comes_back_with_the_type_of_its_descriptor(array):
    kind = parse(describe(array.type).encode())
    back = cell.decode(cell.encode(array), kind)
    assert plain(back) == plain(array)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (pa.int32(), b"\0\0\0"), (pa.int32(), b"\0\0\0\0\0"), (pa.bool_(), b"\2"), (pa.bool_(), b""),
        (pa.string(), b"\xff"), (pa.large_string(), b"\xff"), (pa.string_view(), b"\xff"), (pa.binary(2), b"a"),
        (pa.date64(), b"\1" + bytes(7)), (pa.time32("s"), struct.pack("<i", 86_400)), (pa.null(), b""),
        (pa.decimal128(2, 0), (100).to_bytes(16, "little")),
        (pa.list_(pa.int8()), b"\0"), (pa.list_(pa.int8()), b"\1\0\0\0"), (pa.list_(pa.int8()), frames(b"ab")),
        (pa.list_(pa.string()), b"\xfe\xff\xff\xff"), (pa.list_(pa.string()), b"\xff\xff\xff\x7fabc"),
        (pa.list_(pa.string()), frames(b"a") + b"\0"), (pa.list_(pa.string()), frames(b"\xff")),
        (pa.list_(pa.int8(), 2), frames(b"\1")), (pa.list_(pa.int8(), 2), frames(b"\1", b"\1", b"\1")),
        (pa.struct({"a": pa.int8()}), b""), (pa.struct({"a": pa.int8()}), frames(b"\1", b"\1")),
        (pa.struct({"a": pa.int8(), "b": pa.string()}), frames(b"\1")), (pa.struct([]), b"x"),
        (pa.map_(pa.string(), pa.int8()), frames(None)), (pa.map_(pa.string(), pa.int8()), frames(frames(None, b"\1"))),
        (pa.map_(pa.string(), pa.int8()), frames(frames(b"k"))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 50])
def test_a_malformed_payload_is_a_format_error(kind, payload, rows):
    good = [None] * (rows - 1)
    with pytest.raises(FormatError, match="is not a value of type"):
        cell.decode(pa.array([*good, payload], pa.large_binary()), kind)


@given(types(), st.lists(st.none() | st.binary(max_size=40), max_size=5))
def test_no_payload_does_more_than_a_format_error(kind, payloads):
    try:
        cell.decode(pa.array(payloads, pa.large_binary()), kind).validate(full=True)
    except FormatError as error:
        assert error.__cause__ is error.__context__ is None  # noqa: PT017  # what those say may hold data


def test_a_row_with_far_more_items_than_all_others_is_read():
    array = pa.array([["a"], [str(number) for number in range(50_000)], None] + [["b", "c"]] * 100)
    assert cell.decode(cell.encode(array), array.type).equals(array)


def test_a_length_that_nothing_holds_reserves_nothing():
    kind = pa.list_(pa.int64(), 1 << 30)
    with pytest.raises(FormatError):
        cell.decode(pa.array([b"\0" * 8, None], pa.large_binary()), kind)


@pytest.mark.parametrize("index", [pa.int8(), pa.uint8()])
def test_a_dictionary_holds_as_many_values_as_its_index_can_number(index):
    most = 1 << (7 if index == pa.int8() else 8)
    payloads = cell.encode(pa.array([str(number) for number in range(most)]))
    assert len(cell.decode(payloads, pa.dictionary(index, pa.string())).dictionary) == most
    more = pa.concat_arrays([payloads, pa.array([b"more"], pa.large_binary())])
    with pytest.raises(cell.TooLargeError, match="do not fit into one array of type dictionary"):
        cell.decode(more, pa.dictionary(index, pa.string()))


def test_an_ordered_dictionary_stays_ordered():
    kind = pa.dictionary(pa.int8(), pa.string(), ordered=True)
    assert cell.decode(cell.encode(pa.array(["b", "a"]).cast(kind)), kind).type.ordered


# --------------------------------------------------------------------------------- the same as of single values

SCALARS = {
    "u": ("Ada", pa.string()), "z": (b"\0\xff", pa.binary()), "l": (-3, pa.int64()), "g": (0.1, pa.float64()),
    "b": (True, pa.bool_()), "tdD": (date(1969, 7, 20), pa.date32()),
    "tsu:UTC": (datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=timezone.utc), pa.timestamp("us", "UTC")),
    "tsu:": (datetime(2026, 1, 2, 3, 4, 5, 6), pa.timestamp("us")),  # noqa: DTZ001
}  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_a_scalar_has_the_same_bytes_in_a_field_and_in_a_column(text):
    value, kind = SCALARS[text]
    (payload,) = cell.encode(pa.array([value], kind)).to_pylist()
    assert encode_value(value) == describe(kind).encode() + b"\0" + payload == text.encode() + b"\0" + payload
    assert decode_value(encode_value(value)) == value


@given(any_arrays(st.sampled_from([kind for _, kind in SCALARS.values()] + [pa.list_(pa.string())])))
def test_a_value_of_a_column_opens_as_a_field(array):
    head = describe(array.type).encode() + b"\0"
    for value, payload in zip(array, cell.encode(array).to_pylist(), strict=True):
        if payload is None:
            continue
        try:
            expected = value.as_py()
        except (ValueError, OverflowError):  # a year that Python has not
            with pytest.raises(FormatError):
                decode_value(head + payload)
        else:
            assert repr(decode_value(head + payload)).replace("datetime.timezone.utc", "UTC") == repr(expected).replace(
                "zoneinfo.ZoneInfo(key='UTC')", "UTC"
            )


def test_value_type_looks_through_all_encodings():
    assert value_type(pa.dictionary(pa.int8(), pa.string())) == pa.string()
    assert value_type(pa.run_end_encoded(pa.int16(), pa.dictionary(pa.int8(), pa.int64()))) == pa.int64()
