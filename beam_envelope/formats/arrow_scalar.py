"""The payloads of single values: those of Arrow's scalar types, and the times and zones of Python. docs/format.md, 9.1.

What a type is called is written as in the Arrow C data interface (arrow.apache.org/docs/format/CDataInterface.html).
Lists, structs and other nested Arrow types are not here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final
from zoneinfo import ZoneInfo

from beam_envelope.errors import FormatError

Decode = Callable[[bytes], Any]

INT64: Final = struct.Struct("<q")
DOUBLE: Final = struct.Struct("<d")
INT32: Final = struct.Struct("<i")
_DAY_US: Final = 86_400_000_000
_EPOCH_DAY: Final = date(1970, 1, 1).toordinal()
_EPOCH: Final = datetime(1970, 1, 1)  # noqa: DTZ001  # for values without a zone
_EPOCH_UTC: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)

# How many microseconds a unit is; a nanosecond is less than one.
_UNITS: Final = {"s": 1_000_000, "m": 1_000, "u": 1, "n": 0}
_TIME_UNITS: Final = {"s": INT32, "m": INT32, "u": INT64, "n": INT64}
_DIGITS_OF_BITS: Final = {32: 9, 64: 18, 128: 38, 256: 76}
_DECIMAL: Final = re.compile(r"d:([1-9][0-9]?),(-?[0-9]{1,3})(?:,(32|64|128|256))?")
_FIXED_SIZE: Final = re.compile(r"w:([0-9]{1,9})")
_OFFSET: Final = re.compile(r"([+-])([0-9]{2})(?::?([0-9]{2})(?::([0-9]{2})(?:\.([0-9]{6}))?)?)?")


def malformed(what: str) -> FormatError:
    """Return the error for a payload that no writer of ours makes."""
    return FormatError(f"this cell holds no value: {what}. It was written by another version, or by something else")


# ------------------------------------------------------------------------------------------- numbers, texts, bytes


def _number(form: str) -> Decode:
    unpack, size = struct.Struct("<" + form).unpack, struct.calcsize("<" + form)

    def decode(payload: bytes) -> Any:
        if len(payload) != size:
            raise malformed("a number has the wrong length")
        return unpack(payload)[0]

    return decode


def decode_bool(payload: bytes) -> bool:
    """Decode one byte, 0 or 1."""
    if payload == b"\x01":
        return True
    if payload == b"\x00":
        return False
    raise malformed("a truth value is neither 0 nor 1")


def decode_null(payload: bytes) -> None:
    """Decode nothing."""
    if payload:
        raise malformed("a null has a payload")


def decode_text(payload: bytes) -> str:
    """Decode UTF-8."""
    try:
        return payload.decode()
    except UnicodeDecodeError:
        pass  # that exception holds the payload, so ours is raised outside of it
    raise malformed("a text is not UTF-8")


def decode_bytes(payload: bytes) -> bytes:
    """Return the payload."""
    return payload


def _fixed_size(size: int) -> Decode:
    def decode(payload: bytes) -> bytes:
        if len(payload) != size:
            raise malformed("bytes of a fixed size have another size")
        return payload

    return decode


def _decimal(precision: int, scale: int, bits: int) -> Decode:
    if precision > _DIGITS_OF_BITS[bits]:
        raise malformed("a decimal has more digits than its bits can hold")
    size, limit = bits // 8, 10**precision

    def decode(payload: bytes) -> Decimal:
        number = int.from_bytes(payload, "little", signed=True)
        if len(payload) != size or not -limit < number < limit:
            raise malformed("a decimal has the wrong length, or too many digits")
        # Made of its digits, so that the context of this thread neither rounds nor traps.
        return Decimal((int(number < 0), tuple(map(int, str(abs(number)))), -scale))

    return decode


# ------------------------------------------------------------------------------------------------ dates and times


def encode_date(value: date) -> bytes:
    """Encode a date as the days since 1970: `tdD`."""
    return INT32.pack(value.toordinal() - _EPOCH_DAY)


def _days(days: int) -> date:
    try:
        return date.fromordinal(days + _EPOCH_DAY)
    except (ValueError, OverflowError):
        pass
    raise malformed("a date is before the year 1 or after 9999, which Python has no date for")


def _decode_date(payload: bytes) -> date:
    if len(payload) != INT32.size:
        raise malformed("a date has the wrong length")
    return _days(INT32.unpack(payload)[0])


def _decode_date_ms(payload: bytes) -> date:
    if len(payload) != INT64.size:
        raise malformed("a date has the wrong length")
    days, rest = divmod(INT64.unpack(payload)[0], _DAY_US // 1000)
    if rest:
        raise malformed("a date is not a whole number of days")
    return _days(days)


def microseconds(duration: timedelta) -> int:
    """Return a duration in microseconds, exactly."""
    return (duration.days * 86_400 + duration.seconds) * 1_000_000 + duration.microseconds


def _in_microseconds(count: int, unit: str) -> int:
    if unit != "n":
        return count * _UNITS[unit]
    whole, rest = divmod(count, 1000)
    if rest:
        raise FormatError(
            "this cell holds nanoseconds, and Python's times end at microseconds: nothing was rounded. Open it with "
            "DecryptColumns, as an Arrow column"
        )
    return whole


def encode_time(value: time) -> bytes:
    """Encode the time of a day as the microseconds since midnight: `ttu`.

    Raises:
        FormatError: it has a zone or a fold, which only a time of a known day can have.
    """
    if value.tzinfo is not None or value.fold:
        msg = "a datetime.time with a zone or a fold cannot be encrypted; take a datetime, or leave them out"
        raise FormatError(msg)
    seconds = (value.hour * 60 + value.minute) * 60 + value.second
    return INT64.pack(seconds * 1_000_000 + value.microsecond)


def _time(unit: str) -> Decode:
    number = _TIME_UNITS[unit]

    def decode(payload: bytes) -> time:
        if len(payload) != number.size:
            raise malformed("a time has the wrong length")
        count = _in_microseconds(number.unpack(payload)[0], unit)
        if not 0 <= count < _DAY_US:
            raise malformed("a time is not within a day")
        return (_EPOCH + timedelta(microseconds=count)).time()

    return decode


def duration_of(count: int) -> timedelta:
    """Return a duration of so many microseconds.

    Raises:
        FormatError: it is longer than those of Python can be.
    """
    try:
        return timedelta(microseconds=count)
    except OverflowError:
        pass
    raise malformed("a duration is too long for Python")


def _duration(unit: str) -> Decode:
    def decode(payload: bytes) -> timedelta:
        if len(payload) != INT64.size:
            raise malformed("a duration has the wrong length")
        return duration_of(_in_microseconds(INT64.unpack(payload)[0], unit))

    return decode


# -------------------------------------------------------------------------------------------- timestamps and zones


def encode_datetime(value: datetime) -> bytes:
    """Encode a point in time as a whole cell: `tsu:ZONE`, or `@w` where the wall clock says more than the instant.

    That is so for a fold that the instant does not imply, for times that a clock change leaves out, for instants
    outside of the years 1 to 9999, and for offsets with seconds.

    Raises:
        FormatError: its zone has neither a name nor a fixed offset, or is not known on this machine.
    """
    zone = value.tzinfo
    if zone is None:
        if not value.fold:
            return b"tsu:\x00" + INT64.pack(microseconds(value - _EPOCH))
        return _wall_clock(value, "")
    if zone is timezone.utc and not value.fold:
        return b"tsu:UTC\x00" + INT64.pack(microseconds(value - _EPOCH_UTC))
    name = zone_name(zone)
    known = zone_of(name)
    instant = microseconds(value - _EPOCH_UTC)
    if _says_all(value, instant, known) and not (type(zone) is timezone and len(name) > len("+00:00")):
        return b"tsu:%b\x00%b" % (name.encode(), INT64.pack(instant))
    if value.replace(tzinfo=known).utcoffset() != value.utcoffset():
        msg = f"the zone {name} of a datetime is another one on this machine. Take zoneinfo.ZoneInfo({name!r})"
        raise FormatError(msg)
    return _wall_clock(value, name)


def _says_all(value: datetime, instant: int, zone: tzinfo) -> bool:
    """Whether instant and zone lead back to the same wall clock and fold."""
    try:
        back = (_EPOCH_UTC + timedelta(microseconds=instant)).astimezone(zone)
    except (OverflowError, ValueError):
        return False
    same_fold = back.fold == value.fold or not isinstance(value.tzinfo, (ZoneInfo, timezone))  # pytz has no folds
    return same_fold and back.replace(tzinfo=None) == value.replace(tzinfo=None)


def _wall_clock(value: datetime, zone: str) -> bytes:
    count = microseconds(value.replace(tzinfo=None) - _EPOCH)
    return b"@w\x00" + INT64.pack(count) + bytes([value.fold]) + zone.encode()


def decode_wall_clock(payload: bytes) -> datetime:
    """Decode what the wall clock showed, the fold and the zone: `@w`."""
    if len(payload) <= INT64.size or payload[INT64.size] > 1:
        raise malformed("a time of a wall clock has the wrong length, or a fold other than 0 and 1")
    name = decode_text(payload[INT64.size + 1 :])
    wall = _datetime_of(_EPOCH, INT64.unpack(payload[: INT64.size])[0])
    return wall.replace(fold=payload[INT64.size], tzinfo=zone_of(name) if name else None)


def _datetime_of(epoch: datetime, count: int) -> datetime:
    try:
        return epoch + timedelta(microseconds=count)
    except OverflowError:
        pass
    raise malformed("a time is before the year 1 or after 9999, which Python has no datetime for")


def _timestamp(unit: str, name: str) -> Decode:
    zone = zone_of(name) if name else None
    epoch = _EPOCH if zone is None else _EPOCH_UTC
    local = zone is not None and zone is not timezone.utc

    def decode(payload: bytes) -> datetime:
        if len(payload) != INT64.size:
            raise malformed("a time has the wrong length")
        value = _datetime_of(epoch, _in_microseconds(INT64.unpack(payload)[0], unit))
        if not local:
            return value
        try:
            return value.astimezone(zone)
        except (OverflowError, ValueError):
            pass
        raise malformed("a time is before the year 1 or after 9999 in its zone")

    return decode


def zone_name(zone: tzinfo) -> str:
    """Return a zone's name: of the IANA database, `UTC`, or a fixed offset such as `+02:00`.

    Raises:
        FormatError: it has neither.
    """
    if type(zone) is timezone:
        offset = microseconds(zone.utcoffset(None))
        if not offset:
            return "UTC"
        seconds, rest = divmod(abs(offset), 1_000_000)
        name = f"{'-' if offset < 0 else '+'}{seconds // 3600:02}:{seconds // 60 % 60:02}"
        if rest:
            return f"{name}:{seconds % 60:02}.{rest:06}"
        return f"{name}:{seconds % 60:02}" if seconds % 60 else name
    key = getattr(zone, "key", None) or getattr(zone, "zone", None)  # of zoneinfo; of pytz
    if isinstance(key, str):
        return key
    msg = (
        f"a datetime has a zone of the class {type(zone).__name__}, which has no name to write down. Take "
        "zoneinfo.ZoneInfo or datetime.timezone"
    )
    raise FormatError(msg)


@lru_cache(maxsize=1024)
def zone_of(name: str) -> tzinfo:
    """Return the zone of a name.

    Raises:
        FormatError: there is none of that name on this machine.
    """
    if name == "UTC":
        return timezone.utc
    if offset := _OFFSET.fullmatch(name):
        sign, hours, minutes, seconds, micro = offset.groups(default="0")
        duration = timedelta(hours=int(hours), minutes=int(minutes), seconds=int(seconds), microseconds=int(micro))
        if duration < timedelta(days=1):
            return timezone(-duration if sign == "-" else duration)
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # also for names that lead to a folder, or out of the database
        pass
    msg = (
        "a time has a zone that is not in the time zone database of this machine. Install the package tzdata, or "
        "take a zone of the IANA database or a fixed offset"
    )
    raise FormatError(msg)


# ------------------------------------------------------------------------------------------------- by descriptor

SCALARS: Final[dict[bytes, Decode]] = {
    b"n": decode_null,
    b"b": decode_bool,
    **{name: _number(form) for name, form in zip((b"c", b"C", b"s", b"S", b"i", b"I"), "bBhHiI", strict=True)},
    **{name: _number(form) for name, form in zip((b"l", b"L", b"e", b"f", b"g"), "qQefd", strict=True)},
    **dict.fromkeys((b"u", b"U", b"vu"), decode_text),
    **dict.fromkeys((b"z", b"Z", b"vz"), decode_bytes),
    b"tdD": _decode_date,
    b"tdm": _decode_date_ms,
    **{b"tt" + unit.encode(): _time(unit) for unit in _UNITS},
    **{b"tD" + unit.encode(): _duration(unit) for unit in _UNITS},
}
"""The decoders of Arrow's types without parameters."""


@lru_cache(maxsize=1024)
def parametric_decoder(descriptor: bytes) -> Decode:
    """Return the decoder of an Arrow type with parameters: `w:16`, `tsu:Europe/Berlin`, `d:38,2`.

    Raises:
        FormatError: it is none.
    """
    text = decode_text(descriptor)
    if text[:2] == "ts" and text[3:4] == ":" and text[2] in _UNITS:
        return _timestamp(text[2], text[4:])
    if decimal := _DECIMAL.fullmatch(text):
        precision, scale, bits = decimal.groups()
        return _decimal(int(precision), int(scale), int(bits or 128))
    if size := _FIXED_SIZE.fullmatch(text):
        return _fixed_size(int(size[1]))
    raise malformed("its type is not one that this version knows")
