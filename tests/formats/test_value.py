"""Python values as the plaintext of cells: exactly the same value of the same type comes back, or a FormatError."""
# ruff: noqa: DTZ001, DTZ901  # datetimes without a zone are among the values

import decimal
import enum
import json
import math
import random
import struct
import time as clock
import uuid
from collections import OrderedDict, namedtuple
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_envelope.errors import EnvelopeError, FormatError
from beam_envelope.formats import value as values
from beam_envelope.formats.value import MAX_DEPTH, decode_value, encode_value, register_type

BERLIN = ZoneInfo("Europe/Berlin")
FIRST_2_30, SECOND_2_30 = (datetime(2024, 10, 27, 2, 30, fold=fold, tzinfo=BERLIN) for fold in (0, 1))
LEFT_OUT_2_30 = datetime(2024, 3, 31, 2, 30, tzinfo=BERLIN)


def same(one, other):  # noqa: PLR0911  # a case each
    """Whether two values are equal and of one type, all the way down; NaN equals NaN, and 0.0 not -0.0."""
    if type(one) is not type(other):
        return False
    if type(one) is float:
        return struct.pack("<d", one) == struct.pack("<d", other)
    if type(one) is Decimal:
        return one.as_tuple() == other.as_tuple()
    if type(one) in {list, tuple}:
        return len(one) == len(other) and all(map(same, one, other))
    if type(one) is dict:
        return same(list(one.items()), list(other.items()))
    if type(one) in {datetime, time}:
        zones = str(one.tzinfo) == str(other.tzinfo)
        return zones and one.fold == other.fold and one.replace(tzinfo=None) == other.replace(tzinfo=None)
    return one == other


def round_trip(value):
    return decode_value(encode_value(value))


# --------------------------------------------------------------------------------------------------- round trips

VALUES = {
    "null": None,
    "true": True,
    "false": False,
    "zero": 0,
    "minus one": -1,
    "greatest int64": 2**63 - 1,
    "least int64": -(2**63),
    "above int64": 2**63,
    "below int64": -(2**63) - 1,
    "a hundred digits": 10**100,
    "float": 1.5,
    "minus zero": -0.0,
    "infinity": math.inf,
    "empty text": "",
    "text": "Ada \u00e9 \u65e5\u672c \U0001f511",
    "text with a zero": "a\x00b",
    "empty bytes": b"",
    "bytes": b"\x00\xff",
    "first date": date.min,
    "date": date(2026, 11, 24),
    "last date": date.max,
    "datetime": datetime(2026, 11, 24, 6, 41, 8, 123456),
    "first datetime": datetime.min,
    "last datetime": datetime.max,
    "datetime with a fold": datetime(2026, 11, 24, fold=1),
    "datetime in UTC": datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=timezone.utc),
    "datetime in a zone": datetime(2026, 11, 24, 6, 41, 8, tzinfo=BERLIN),
    "first of two in a zone": FIRST_2_30,
    "second of two in a zone": SECOND_2_30,
    "left out in a zone": LEFT_OUT_2_30,
    "at an offset": datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=2))),
    "at an offset with seconds": datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=-1, seconds=-3))),
    "before the year 1 in UTC": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14))),
    "after the year 9999 in UTC": datetime(9999, 12, 31, 23, 59, 59, tzinfo=ZoneInfo("America/New_York")),
    "midnight": time(),
    "time": time(23, 59, 59, 999999),
    "duration": timedelta(days=-1, microseconds=1),
    "longest duration": timedelta.max,
    "decimal": Decimal("1.10"),
    "decimal NaN": Decimal("NaN"),
    "decimal with an exponent": Decimal("-1E+999999"),
    "UUID": uuid.UUID("01fa36a3-6cd3-4d1d-8c4a-0c96844b4732"),
    "empty list": [],
    "list": [1, None, "a", [b""]],
    "empty tuple": (),
    "tuple": (1, (2,)),
    "empty dict": {},
    "dict": {"b": 1, "a": [None], 2: {"c": True}},
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_with_its_type(name):
    assert same(round_trip(VALUES[name]), VALUES[name])


def test_the_comparison_of_these_tests_sees_small_differences():
    for one, other in (
        (0.0, -0.0), (1, True), (1, 1.0), (Decimal("1.1"), Decimal("1.10")), ([1], (1,)), (FIRST_2_30, SECOND_2_30),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (datetime(2024, 1, 1), datetime(2024, 1, 1, tzinfo=timezone.utc)),
    ):  # fmt: skip
        assert not same(one, other)
        assert encode_value(one) != encode_value(other)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(),
    st.binary(),
    st.dates(),
    st.datetimes(allow_imaginary=True),
    st.datetimes(timezones=st.timezones(), allow_imaginary=True),
    st.datetimes(timezones=st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(timezone)),
    st.times().map(lambda value: value.replace(fold=0)),
    st.timedeltas(),
    st.decimals(),
    st.uuids(),
)
KEYS = st.one_of(st.text(), st.integers(), st.dates(), st.tuples(st.text(), st.booleans()))
NESTED = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
    ),
    max_leaves=12,
)


def normal(value):
    """Return a datetime as it comes back: the zone named UTC of the database is timezone.utc."""
    return value.replace(tzinfo=timezone.utc) if isinstance(value, datetime) and str(value.tzinfo) == "UTC" else value


@given(SCALARS)
def test_any_scalar_comes_back(value):
    assert same(round_trip(value), normal(value))


@given(NESTED)
def test_any_nested_value_comes_back_as_equal_bytes(value):
    plaintext = encode_value(value)
    assert encode_value(decode_value(plaintext)) == plaintext


def test_a_nan_keeps_its_bits():
    (nan,) = struct.unpack("<d", bytes.fromhex("010000000000f87f"))
    assert encode_value(nan)[2:].hex() == "010000000000f87f"
    assert same(round_trip(nan), nan)


def test_an_integer_of_twenty_thousand_digits_is_no_trouble():
    assert round_trip(-(10**20_000)) == -(10**20_000)


@pytest.mark.parametrize("text", ["sNaN", "-NaN123", "-Infinity", "-0", "0E-10", "1E-999999", "123456789" * 100])
def test_special_decimals_come_back(text):
    assert round_trip(Decimal(text)).as_tuple() == Decimal(text).as_tuple()


def test_a_decimal_does_not_depend_on_the_decimal_context():
    with decimal.localcontext() as context:
        context.capitals, context.prec = 0, 2
        assert encode_value(Decimal("1.2345E+9")) == b"@d\x001.2345E+9"
        assert round_trip(Decimal("1.2345E+9")).as_tuple() == Decimal("1.2345E+9").as_tuple()
        assert decode_value(b"d:5,2\x00" + (12345).to_bytes(16, "little")).as_tuple() == Decimal("123.45").as_tuple()


def test_the_two_half_past_two_in_an_autumn_night_stay_two():
    assert FIRST_2_30 == SECOND_2_30  # as Python has it within a zone
    assert encode_value(FIRST_2_30) != encode_value(SECOND_2_30)
    assert [round_trip(value).utcoffset() for value in (FIRST_2_30, SECOND_2_30)] == [
        timedelta(hours=2),
        timedelta(hours=1),
    ]


@pytest.mark.parametrize("zone", [timezone.utc, timezone(timedelta(hours=2)), BERLIN])
def test_a_fold_that_means_nothing_is_kept(zone):
    value = datetime(2026, 1, 1, fold=1, tzinfo=zone)
    assert encode_value(value).startswith(b"@w\x00")
    assert same(round_trip(value), value)


def test_the_offset_of_zero_is_utc_whatever_it_is_called():
    for zone in (ZoneInfo("UTC"), timezone(timedelta(0), "GMT")):
        assert same(round_trip(datetime(2026, 1, 1, tzinfo=zone)), datetime(2026, 1, 1, tzinfo=timezone.utc))


def test_a_zone_of_pytz_comes_back_as_zoneinfo():
    pytz = pytest.importorskip("pytz")
    for wall, summer in ((datetime(2024, 10, 27, 2, 30), True), (datetime(2024, 10, 27, 2, 31), False)):
        back = round_trip(pytz.timezone("Europe/Berlin").localize(wall, is_dst=summer))
        assert type(back.tzinfo) is ZoneInfo
        assert back.replace(tzinfo=None) == wall
        assert back.dst() == timedelta(hours=int(summer))


def test_numpys_scalars_come_back_as_pythons():
    for scalar, value in (
        (np.int64(-3), -3), (np.uint64(2**64 - 1), 2**64 - 1), (np.int8(1), 1), (np.float32(0.5), 0.5),
        (np.float64(-0.0), -0.0), (np.bool_(True), True), (np.str_("a"), "a"), (np.bytes_(b"a"), b"a"),
    ):  # fmt: skip
        assert same(round_trip([scalar]), [value])
        assert encode_value(scalar) == encode_value(value)


def test_the_bytes_are_those_of_the_vectors():
    path = Path(__file__).parent.parent / "vectors" / "value_v1.json"
    vectors = {vector["name"]: vector for vector in json.loads(path.read_text())["values"]}
    assert vectors.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert encode_value(value).hex() == vectors[name]["plaintext"], name
        assert same(decode_value(bytes.fromhex(vectors[name]["plaintext"])), value)
        assert vectors[name]["python"] == repr(value)


@pytest.mark.parametrize(
    ("value", "plaintext"),
    [
        (None, b"n\x00"),
        (True, b"b\x00\x01"),
        (-2, b"l\x00\xfe\xff\xff\xff\xff\xff\xff\xff"),
        (2**63, b"@i\x00\x00\x00\x00\x00\x00\x00\x00\x80\x00"),
        (1.0, b"g\x00\x00\x00\x00\x00\x00\x00\xf0\x3f"),
        ("\u00e9", b"u\x00\xc3\xa9"),
        (b"\xff", b"z\x00\xff"),
        (date(1970, 1, 2), b"tdD\x00\x01\x00\x00\x00"),
        (datetime(1970, 1, 1, 0, 0, 1), b"tsu:\x00\x40\x42\x0f\x00\x00\x00\x00\x00"),
        (datetime(1970, 1, 1, 1, 0, 1, tzinfo=BERLIN), b"tsu:Europe/Berlin\x00\x40\x42\x0f\x00\x00\x00\x00\x00"),
        (time(0, 0, 1), b"ttu\x00\x40\x42\x0f\x00\x00\x00\x00\x00"),
        (timedelta(seconds=1), b"tDu\x00\x40\x42\x0f\x00\x00\x00\x00\x00"),
        (Decimal("-1.10"), b"@d\x00-1.10"),
        (["a"], b"@l\x00\x01\x00\x00\x00\x03\x00\x00\x00u\x00a"),
        ({"a": None}, b"@m\x00\x01\x00\x00\x00\x03\x00\x00\x00u\x00a\x02\x00\x00\x00n\x00"),
    ],
)
def test_the_bytes_are_those_of_the_specification(value, plaintext):
    assert encode_value(value) == plaintext
    assert same(decode_value(plaintext), value)


# ------------------------------------------------------------------------------------------------ cells of columns

DAY_NS = 86_400_000_000_000
COLUMNS = [
    (pa.int8(), [-128, 127]), (pa.uint8(), [255]), (pa.int16(), [-(2**15)]), (pa.uint16(), [2**16 - 1]),
    (pa.int32(), [-(2**31)]), (pa.uint32(), [2**32 - 1]), (pa.int64(), [-(2**63)]), (pa.uint64(), [2**64 - 1]),
    (pa.float16(), [np.float16(1.5)]), (pa.float32(), [1.5]), (pa.float64(), [-0.0]), (pa.bool_(), [True, False]),
    (pa.string(), ["", "\u00e9"]), (pa.large_string(), ["a"]), (pa.string_view(), ["a", "more than twelve bytes"]),
    (pa.binary(), [b"\xff"]), (pa.large_binary(), [b""]), (pa.binary_view(), [b"a"]), (pa.binary(3), [b"abc"]),
    (pa.date32(), [date(1, 1, 1), date(9999, 12, 31)]), (pa.date64(), [date(1969, 12, 31)]),
    (pa.time32("s"), [time(23, 59, 59)]), (pa.time32("ms"), [time(1, 2, 3, 4000)]),
    (pa.time64("us"), [time(1, 2, 3, 4)]),
    (pa.time64("ns"), [time(1, 2, 3, 4)]), (pa.timestamp("s"), [datetime(1, 1, 1)]),
    (pa.timestamp("ms"), [datetime(9999, 12, 31)]), (pa.timestamp("us"), [datetime(1969, 1, 1, 0, 0, 0, 1)]),
    (pa.timestamp("ns"), [datetime(2026, 1, 1, 0, 0, 0, 1)]),
    (pa.timestamp("us", "UTC"), [datetime(2026, 1, 1, tzinfo=timezone.utc)]),
    (pa.timestamp("ms", "Europe/Berlin"), [SECOND_2_30]),
    (pa.timestamp("s", "+02:00"), [datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=2)))]),
    (pa.duration("s"), [timedelta(days=-1)]), (pa.duration("ms"), [timedelta(milliseconds=1)]),
    (pa.duration("us"), [timedelta(microseconds=-1)]), (pa.duration("ns"), [timedelta(microseconds=1)]),
    (pa.decimal128(38, 2), [Decimal("-1.10"), Decimal(10**38 - 1).scaleb(-2, decimal.Context(40))]),
    (pa.decimal128(5, -2), [Decimal("123E+2")]), (pa.decimal256(76, 0), [Decimal(10**76 - 1)]),
    (pa.list_(pa.int32()), [[1, None], []]), (pa.struct([("a", pa.string())]), [{"a": "b"}]),
    (pa.map_(pa.string(), pa.int8()), [[("a", 1)]]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "column"), COLUMNS, ids=[str(kind) for kind, _ in COLUMNS])
def test_a_cell_that_a_column_was_encrypted_into_opens_as_a_value(kind, column):
    from beam_envelope.formats import cell, cell_type

    array = pa.array(column, kind)
    for value, payload in zip(array.to_pylist(), cell.encode(array).to_pylist(), strict=True):
        expected = float(value) if isinstance(value, np.floating) else value
        found = decode_value(cell_type.describe(kind).encode() + b"\x00" + payload)
        assert same(found, expected if not hasattr(expected, "to_pydatetime") else expected.to_pydatetime()) or (
            hasattr(expected, "to_pytimedelta") and found == expected.to_pytimedelta()
        )


@pytest.mark.parametrize(
    "value", [None, True, 5, 1.5, "a", b"a", date.max, FIRST_2_30, datetime.max, time.max, timedelta(days=-1)]
)
def test_a_value_of_a_type_that_arrow_has_opens_as_a_cell_of_a_column(value):
    from beam_envelope.formats import cell, cell_type

    name, _, payload = encode_value(value).partition(b"\x00")
    payloads = pa.array([payload if value is not None else None], pa.large_binary())
    found = cell.decode(payloads, cell_type.parse(name))[0].as_py()
    assert found == value


def decimal_cell(number, descriptor, size):
    return descriptor + b"\x00" + number.to_bytes(size, "little", signed=True)


def test_small_decimals_of_arrow_open():
    assert same(decode_value(decimal_cell(-110, b"d:9,2,32", 4)), Decimal("-1.10"))
    assert same(decode_value(decimal_cell(110, b"d:18,2,64", 8)), Decimal("1.10"))


@pytest.mark.parametrize("descriptor", [b"tsn:", b"tsn:UTC", b"ttn", b"tDn"])
def test_nanoseconds_are_refused_not_rounded(descriptor):
    whole = decode_value(descriptor + b"\x00" + struct.pack("<q", 1000))
    assert getattr(whole, "microsecond", None) == 1 or whole == timedelta(microseconds=1)
    with pytest.raises(FormatError, match=r"^this cell holds nanoseconds.*nothing was rounded.*DecryptColumns"):
        decode_value(descriptor + b"\x00" + struct.pack("<q", 1001))


# --------------------------------------------------------------------------------------------------- what is refused


class Colour(enum.Enum):
    RED = "secret"


class Number(enum.IntEnum):
    ONE = 1


Point = namedtuple("Point", "x y")  # noqa: PYI024


class Nameless(tzinfo):
    def utcoffset(self, _):
        return timedelta(hours=1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Colour.RED, r"Colour cannot be encrypted as a cell\. Of an enumeration, encrypt the \.value$"),
        (Number.ONE, r"Of an enumeration"),
        (Point(1, 2), r"Point cannot.*name the fields to encrypt"),
        (OrderedDict(a="secret"), r"collections\.OrderedDict cannot be encrypted"),
        (type("Text", (str,), {})("secret"), r"Text cannot be encrypted"),
        ({"secret"}, r"builtins\.set cannot"),
        (bytearray(b"secret"), r"bytearray cannot .*Make bytes of it$"),
        (object(), r"object cannot be encrypted"),
        (np.datetime64("2026-01-01"), r"numpy\.datetime64 cannot"),
        (np.timedelta64(1, "s"), r"numpy\.timedelta64 cannot"),
        (np.longdouble(1), r"numpy\.(longdouble|float128|float64) cannot|^$"),
        (np.array(["secret"]), r"numpy\.ndarray cannot"),
        ("secret\ud800", r"half a surrogate pair"),
        (time(1, tzinfo=timezone.utc), r"datetime\.time with a zone or a fold"),
        (time(1, fold=1), r"datetime\.time with a zone or a fold"),
        (datetime(2026, 1, 1, tzinfo=Nameless()), r"zone of the class Nameless, which has no name"),
        ([{"a": Colour.RED}], r"Of an enumeration"),
    ],
)
def test_what_could_not_come_back_as_it_is_is_refused_without_being_shown(value, message):
    with pytest.raises(FormatError, match=message) as caught:
        encode_value(value)
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


def test_a_zone_whose_name_means_another_zone_is_refused(tmp_path):
    import zoneinfo

    tokyo = next(folder for folder in map(Path, zoneinfo.TZPATH) if (folder / "Asia/Tokyo").exists())
    with (tokyo / "Asia/Tokyo").open("rb") as stream:
        wrong = ZoneInfo.from_file(stream, key="Europe/Berlin")
    with pytest.raises(FormatError, match="is another one on this machine"):
        encode_value(datetime(2026, 1, 1, tzinfo=wrong))


def test_nesting_has_a_limit_on_both_sides():
    deep = []
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    assert round_trip(deep) == deep
    with pytest.raises(FormatError, match="more than 64 deep"):
        encode_value([deep])
    plaintext = encode_value(deep)
    bomb = b"@l\x00" + struct.pack("<II", 1, len(plaintext)) + plaintext
    with pytest.raises(FormatError, match="more than 64 deep"):
        decode_value(bomb)


def test_a_list_that_holds_itself_is_refused():
    loop = []
    loop.extend([loop, loop])
    with pytest.raises(FormatError, match="more than 64 deep"):
        encode_value(loop)


def test_a_bomb_of_two_thousand_levels_is_refused():
    bomb = b"n\x00"
    for _ in range(2000):
        bomb = b"@l\x00" + struct.pack("<II", 1, len(bomb)) + bomb
    with pytest.raises(FormatError):
        decode_value(bomb)


ONE_ITEM = b"\x01\x00\x00\x00"


@pytest.mark.parametrize(
    "plaintext",
    [
        b"", b"u", b"\x00", b"\x00u", b"secret", b"x\x00", b"@\x00", b"@x\x00", b"nn\x00", b"U8\x00",
        b"n\x00\x00", b"b\x00", b"b\x00\x02", b"b\x00\x01\x01", b"l\x00" + bytes(7), b"l\x00" + bytes(9), b"c\x00",
        b"g\x00" + bytes(4), b"u\x00secret\xff", b"vu\x00\xc0\x80",
        b"@i\x00", b"@i\x00\x01", b"@i\x00" + bytes(8) + b"\x01\x00", b"@i\x00" + (2**62).to_bytes(8, "little"),
        b"@d\x00", b"@d\x00 1", b"@d\x001_0", b"@d\x001e5", b"@d\x00+1", b"@d\x00\xd9\xa1", b"@d\x00nan", b"@d\x00x",
        b"@d\x001E+9999999999999999999",
        b"@u\x00" + bytes(15), b"@D\x00", b"@D\x00\x01\x00", b"@D\x00" + b"\xff" * 20 + b"\x00",
        b"@w\x00" + bytes(8), b"@w\x00" + bytes(8) + b"\x02", b"@w\x00" + bytes(8) + b"\x00No/Zone",
        b"@w\x00" + b"\xff" * 7 + b"\x7f\x00",
        b"tdD\x00\x00", b"tdD\x00\xff\xff\xff\x7f", b"tdD\x00\x00\x00\x00\x80", b"tdm\x00\x01" + bytes(7),
        b"tts\x00" + struct.pack("<i", 86_400), b"ttu\x00" + struct.pack("<q", -1), b"ttu\x00" + bytes(4),
        b"tDs\x00" + b"\xff" * 7 + b"\x7f", b"tDu\x00" + bytes(7),
        b"tsu\x00" + bytes(8), b"tsx:\x00" + bytes(8), b"tsu:\x00" + bytes(7), b"tss:\x00" + b"\xff" * 7 + b"\x7f",
        b"tsu:UTC\x00" + b"\xff" * 7 + b"\x7f", b"tsu:No/Zone\x00" + bytes(8), b"tsu:../../etc/passwd\x00" + bytes(8),
        b"tsu:/etc/localtime\x00" + bytes(8), b"tsu:Europe\x00" + bytes(8), b"tsu:+99:00\x00" + bytes(8),
        b"tsu:\xff\x00" + bytes(8), b"tsu:+14:00\x00" + struct.pack("<q", 253_402_300_799_000_000),
        b"w:3\x00ab", b"w:\x00", b"w:-1\x00", b"w:03x\x00abc", b"d:38,2\x00" + bytes(15), b"d:39,2\x00" + bytes(16),
        b"d:0,0\x00" + bytes(16), b"d:2,0\x00" + (100).to_bytes(16, "little"), b"d:10,0,32\x00" + bytes(4),
        b"d:5,2,16\x00" + bytes(2), b"d:5\x00" + bytes(16), b"d:5,2,128,\x00" + bytes(16),
        b"tin\x00" + bytes(16), b"+l(i)", b"+l(i)\x00\x00", b"+l\x00", b"+x(\x00", b"+s(" + b"+l(" * 1000 + b"\x00",
        b"u" * 300 + b"\x00",
        b"@l\x00", b"@l\x00\x00\x00\x00", b"@l\x00\xff\xff\xff\xff", b"@l\x00" + ONE_ITEM,
        b"@l\x00" + bytes(4) + b"\x00",
        b"@l\x00" + ONE_ITEM + b"\x03\x00\x00\x00n\x00", b"@l\x00" + ONE_ITEM + b"\x02\x00\x00\x00n\x00n",
        b"@l\x00" + ONE_ITEM + b"\xff\xff\xff\xff", b"@l\x00" + ONE_ITEM + b"\x00\x00\x00\x00",
        b"@t\x00" + ONE_ITEM + b"\x01\x00\x00\x00n", b"@m\x00" + ONE_ITEM + b"\x02\x00\x00\x00n\x00",
        b"@m\x00" + ONE_ITEM + b"\x07\x00\x00\x00@l\x00\x00\x00\x00\x00\x02\x00\x00\x00n\x00",
        b"@m\x00\x02\x00\x00\x00" + b"\x02\x00\x00\x00n\x00" * 4,
        b"@m\x00\x02\x00\x00\x00"
         b"\x0a\x00\x00\x00l\x00\x01" + bytes(7) + b"\x02\x00\x00\x00n\x00"
        + b"\x03\x00\x00\x00b\x00\x01\x02\x00\x00\x00n\x00",
    ],
)  # fmt: skip
def test_malformed_plaintext_is_a_format_error_that_does_not_show_it(plaintext):
    with pytest.raises(FormatError) as caught:
        decode_value(plaintext)
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None


TYPES = [*values._DECODERS, *values._CONTAINERS.values(), b"tsu:UTC", b"tsn:Europe/Berlin", b"d:5,2", b"w:3", b"+l(u)"]


def test_random_bytes_give_a_value_or_an_envelope_error():
    source = random.Random(20261124)
    refused = 0
    for number in range(10_000):
        body = source.randbytes(source.randrange(24))
        plaintext = body if number % 2 else source.choice(TYPES) + b"\x00" + body
        try:
            decode_value(plaintext)
        except EnvelopeError:
            refused += 1
    assert 5_000 < refused < 10_000


@given(NESTED, st.data())
def test_a_changed_byte_or_length_gives_a_value_or_an_envelope_error(value, data):
    plaintext = bytearray(encode_value(value))
    position = data.draw(st.integers(0, len(plaintext) - 1))
    plaintext[position] = data.draw(st.integers(0, 255))
    for changed in (plaintext, plaintext[:position], plaintext + b"\x00"):
        try:
            decode_value(bytes(changed))
        except EnvelopeError as error:
            assert type(error) is FormatError  # noqa: PT017


def test_counts_reserve_no_memory():
    start = clock.process_time()
    for name in (b"@l", b"@t", b"@m"):
        with pytest.raises(FormatError):
            decode_value(name + b"\x00\xff\xff\xff\xff\xff\xff\xff\xff")
    assert clock.process_time() - start < 1


# ---------------------------------------------------------------------------------------------------- more types


class Money:
    def __init__(self, cents):
        self.cents = cents

    def __eq__(self, other):
        return type(other) is Money and other.cents == self.cents

    __hash__ = None


def money_of(payload):
    return Money(int(payload))


@pytest.fixture
def money():
    register_type("@money", Money, lambda value: str(value.cents).encode(), money_of)
    yield
    del values._ENCODERS[Money], values._DECODERS[b"@money"], values._registered[b"@money"]


def test_another_class_can_be_registered(money):
    assert encode_value(Money(5)) == b"@money\x005"
    assert round_trip([Money(5)]) == [Money(5)]
    register_type("@money", Money, lambda value: str(value.cents).encode(), money_of)  # a module may be loaded twice


def test_what_a_registered_function_raises_is_a_format_error_without_the_payload(money):
    with pytest.raises(FormatError, match="what should be a Money cannot be read") as caught:
        decode_value(b"@money\x00secret")
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize("code", ["money", "@", "@mon ey", "@\u00e9", "@" + "a" * 300, "@i", "@l", "@w"])
def test_a_code_that_is_none_or_is_taken_is_refused(code):
    with pytest.raises(ValueError, match=r"the code"):
        register_type(code, Money, bytes, bytes)


def test_a_class_that_has_a_form_already_cannot_get_another(money):
    for kind in (str, list, Money):
        with pytest.raises(ValueError, match="registered already"):
            register_type("@other", kind, bytes, bytes)
