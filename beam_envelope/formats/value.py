"""Python values as the plaintext of cells, and back with exactly the same type. Bytes: docs/format.md, 9.1.

A cell's plaintext is `type ‖ 0x00 ‖ payload`. Types that Arrow has too are called as Arrow calls them, so that a cell
that a column was encrypted into opens here; those of Python alone begin with `@`.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from enum import Enum
from typing import Any, Final

from beam_envelope.errors import FormatError
from beam_envelope.formats.arrow_scalar import (
    DOUBLE,
    INT64,
    SCALARS,
    Decode,
    decode_wall_clock,
    duration_of,
    encode_date,
    encode_datetime,
    encode_time,
    malformed,
    microseconds,
    parametric_decoder,
)

Encode = Callable[[Any], bytes]

MAX_DEPTH: Final = 64
"""How deep lists, tuples and dicts may lie in each other."""
_MAX_TYPE_BYTES: Final = 255
_MIN_INT64, _MAX_INT64 = -(2**63), 2**63 - 1
_COUNT: Final = struct.Struct("<I")


def encode_value(value: Any) -> bytes:
    r"""Return the plaintext of a cell.

    Args:
        value: None, or a bool, int, float, str, bytes, date, datetime, time, timedelta, Decimal or UUID, of exactly
            that class; a list, tuple or dict of these; an object of a class of `register_type`; or one of numpy's
            numbers, truth values, strings or bytes, which comes back as Python's. Subclasses (enumerations, named
            tuples) are refused: they would not come back as what they are.

    Raises:
        FormatError: it is of another class, or lies too deep; the message does not show it.

    Example:
        >>> encode_value("Ada")
        b'u\x00Ada'
    """
    encode = _ENCODERS.get(type(value))
    if encode is not None:
        return encode(value)
    return _encode_other(value, 0)


def decode_value(plaintext: bytes) -> Any:
    r"""Return the value of a cell's plaintext: one of `encode_value`, or of an Arrow column.

    Of Arrow's types, integers and floats of all sizes come back as int and float, the three kinds of strings as str, of
    bytes as bytes, decimals as Decimal, dates, times, timestamps and durations as Python's; lists and structs as lists
    and dicts, maps as lists of pairs.

    Raises:
        FormatError: it is none; or its nanoseconds, or its year, have no equal in Python.

    Example:
        >>> decode_value(b"u\x00Ada")
        'Ada'
    """
    return _decode(plaintext, 0)


def register_type(code: str, kind: type, to_bytes: Callable[[Any], bytes], from_bytes: Callable[[bytes], Any]) -> None:
    """Make values of one more class encodable, in this process: writers and readers both have to register it.

    Args:
        code: what stands in the cell: `@` and then ASCII letters or digits, two or more for yours.
        kind: the class; its subclasses are not included.
        to_bytes: returns the payload of a value.
        from_bytes: returns the value of a payload; what it raises becomes a FormatError.

    Raises:
        ValueError: the code has another form, or belongs to another class.
    """
    name = code.encode()
    if not (code.isascii() and code[:1] == "@" and code[1:].isalnum()) or len(name) > _MAX_TYPE_BYTES:
        msg = f"the code of a type is @ and ASCII letters or digits, such as @money, not {code!r}"
        raise ValueError(msg)
    taken = name in _DECODERS or name in _CONTAINERS.values()
    if (taken or kind in _ENCODERS or kind in _CONTAINERS) and _registered.get(name) != kind:
        msg = f"the code {code!r}, or the class {kind.__qualname__}, is registered already, and not for each other"
        raise ValueError(msg)
    _registered[name] = kind
    _ENCODERS[kind] = lambda value: b"%b\x00%b" % (name, to_bytes(value))
    _DECODERS[name] = _guarded(from_bytes, kind.__name__)


def _guarded(decode: Decode, kind: str) -> Decode:
    def guarded(payload: bytes) -> Any:
        try:
            return decode(payload)
        except Exception:  # noqa: BLE001, S110  # whatever it is, it may hold the payload: ours is raised outside of it
            pass
        raise malformed(f"what should be a {kind} cannot be read")

    return guarded


# -------------------------------------------------------------------------------------------------------- scalars


def _encode_int(value: int) -> bytes:
    if _MIN_INT64 <= value <= _MAX_INT64:
        return b"l\x00" + INT64.pack(value)
    return b"@i\x00" + _big(value)


def _big(value: int) -> bytes:
    """Return the shortest two's complement; decimal digits would take quadratic time, and Python limits them."""
    return value.to_bytes((value if value >= 0 else ~value).bit_length() // 8 + 1, "little", signed=True)


def _decode_big(payload: bytes) -> int:
    value = int.from_bytes(payload, "little", signed=True)
    if payload != _big(value):
        raise malformed("an integer is not in its shortest form")
    return value


def _decode_big_int(payload: bytes) -> int:
    value = _decode_big(payload)
    if _MIN_INT64 <= value <= _MAX_INT64:
        raise malformed("a small integer is in the form of big ones")
    return value


def _encode_str(value: str) -> bytes:
    try:
        return b"u\x00" + value.encode()
    except UnicodeEncodeError:
        pass  # that exception holds the value, so ours is raised outside of it
    msg = "a text has half a surrogate pair in it, which UTF-8 has no form for"
    raise FormatError(msg)


def _encode_timedelta(value: timedelta) -> bytes:
    count = microseconds(value)
    if _MIN_INT64 <= count <= _MAX_INT64:
        return b"tDu\x00" + INT64.pack(count)
    return b"@D\x00" + _big(count)


def _encode_decimal(value: Decimal) -> bytes:
    return b"@d\x00" + str(value).replace("e", "E").encode()  # a decimal context can ask for small letters


def _decode_decimal(payload: bytes) -> Decimal:
    try:
        value = Decimal(payload.decode("ascii"))
    except (InvalidOperation, ValueError):
        value = None
    if value is None or _encode_decimal(value) != b"@d\x00" + payload:  # Decimal takes spaces, underscores, ...
        raise malformed("a decimal is not written as Python writes it")
    return value


def _decode_uuid(payload: bytes) -> uuid.UUID:
    if len(payload) != 16:  # noqa: PLR2004
        raise malformed("a UUID has not 16 bytes")
    return uuid.UUID(bytes=payload)


_ENCODERS: Final[dict[type, Encode]] = {
    type(None): lambda _: b"n\x00",
    bool: lambda value: b"b\x00\x01" if value else b"b\x00\x00",
    int: _encode_int,
    float: lambda value: b"g\x00" + DOUBLE.pack(value),
    str: _encode_str,
    bytes: lambda value: b"z\x00" + value,
    date: lambda value: b"tdD\x00" + encode_date(value),
    datetime: encode_datetime,
    time: lambda value: b"ttu\x00" + encode_time(value),
    timedelta: _encode_timedelta,
    Decimal: _encode_decimal,
    uuid.UUID: lambda value: b"@u\x00" + value.bytes,
}
_DECODERS: Final[dict[bytes, Decode]] = {
    **SCALARS,
    b"@i": _decode_big_int,
    b"@D": lambda payload: duration_of(_decode_big(payload)),
    b"@d": _decode_decimal,
    b"@u": _decode_uuid,
    b"@w": decode_wall_clock,
}
_registered: Final[dict[bytes, type]] = {}


# ----------------------------------------------------------------------------------------------------- containers

_CONTAINERS: Final[dict[type, bytes]] = {list: b"@l", tuple: b"@t", dict: b"@m"}


def _encode_other(value: Any, depth: int) -> bytes:
    """Encode a container, one of numpy's scalars, or refuse."""
    name = _CONTAINERS.get(type(value))
    if name is None:
        return _encode_numpy(value)
    if depth >= MAX_DEPTH:
        msg = f"a value has lists or dicts more than {MAX_DEPTH} deep in each other"
        raise FormatError(msg)
    items: Iterable[Any] = value if name != b"@m" else (half for item in value.items() for half in item)
    parts = [name + b"\x00" + _COUNT.pack(len(value))]
    for item in items:
        encode = _ENCODERS.get(type(item))
        cell = encode(item) if encode is not None else _encode_other(item, depth + 1)
        parts.append(_COUNT.pack(len(cell)))
        parts.append(cell)
    return b"".join(parts)


def _decode(cell: bytes, depth: int) -> Any:
    name, zero, payload = cell.partition(b"\x00")
    decode = _DECODERS.get(name)
    if decode is not None and zero:
        return decode(payload)
    if not zero or (len(name) > _MAX_TYPE_BYTES and name[:1] != b"+"):
        raise malformed("it has no type")
    if name not in _CONTAINERS.values():
        return _decode_nested(name, payload) if name[:1] == b"+" else parametric_decoder(name)(payload)
    if depth >= MAX_DEPTH:
        raise malformed(f"lists or dicts are more than {MAX_DEPTH} deep in each other")
    if name == b"@m":
        return _dict(_items(payload, 2, depth))
    items = _items(payload, 1, depth)
    return items if name == b"@l" else tuple(items)


def _decode_nested(name: bytes, payload: bytes) -> Any:
    """Decode a list, struct or map of an Arrow column, as pyarrow's `as_py` does."""
    import pyarrow as pa  # noqa: PLC0415  # takes a while to import, and few cells need it

    from beam_envelope.formats import cell as columns  # noqa: PLC0415
    from beam_envelope.formats import cell_type  # noqa: PLC0415

    try:
        return columns.decode(pa.array([payload], pa.large_binary()), cell_type.parse(name))[0].as_py()
    except (pa.ArrowException, ValueError, OverflowError):  # nanoseconds, years; what they say may hold data
        pass
    raise FormatError("this cell holds an Arrow value that Python has no equal for. Open it with DecryptColumns")


def _items(payload: bytes, per_entry: int, depth: int) -> list[Any]:
    """Return the items of a container; nothing is reserved for a count that the payload cannot hold."""
    if len(payload) < _COUNT.size:
        raise malformed("a list or dict is cut short")
    items, position = [], _COUNT.size
    for _ in range(_COUNT.unpack_from(payload)[0] * per_entry):
        if position + _COUNT.size > len(payload):
            raise malformed("a list or dict is cut short")
        start = position + _COUNT.size
        position = start + _COUNT.unpack_from(payload, position)[0]
        if position > len(payload):
            raise malformed("a list or dict is cut short")
        items.append(_decode(payload[start:position], depth + 1))
    if position != len(payload):
        raise malformed("something follows a list or dict")
    return items


def _dict(items: Sequence[Any]) -> dict[Any, Any]:
    try:
        found = dict(zip(items[::2], items[1::2], strict=True))
    except TypeError:  # not hashable
        found = {}
    if 2 * len(found) != len(items):
        raise malformed("a dict has a key twice, or one that cannot be a key")
    return found


# ---------------------------------------------------------------------------------------- numpy's scalars, and others

_NUMPY: Final[dict[str, type]] = {
    **dict.fromkeys(("bool", "bool_"), bool),
    **dict.fromkeys(("float16", "float32", "float64"), float),
    **dict.fromkeys(("int8", "int16", "int32", "int64", "longlong", "intc"), int),
    **dict.fromkeys(("uint8", "uint16", "uint32", "uint64", "ulonglong", "uintc"), int),
    "str_": str,
    "bytes_": bytes,
}


def _encode_numpy(value: Any) -> bytes:
    kind = type(value)
    if kind.__module__ == "numpy" and kind.__name__ in _NUMPY:  # numpy itself need not be installed
        python = _NUMPY[kind.__name__]
        return _ENCODERS[python](python(value))
    hint = ""
    if isinstance(value, Enum):
        hint = ". Of an enumeration, encrypt the .value"
    elif isinstance(value, tuple) or hasattr(value, "_asdict"):
        hint = ". Of a row or named tuple, name the fields to encrypt, or make a dict of it"
    elif isinstance(value, datetime):
        hint = ". Make a datetime.datetime of it"
    elif isinstance(value, (bytearray, memoryview)):
        hint = ". Make bytes of it"
    msg = f"a value of the class {kind.__module__}.{kind.__qualname__} cannot be encrypted as a cell{hint}"
    raise FormatError(msg)
