"""Arrow types as the text that each cell begins with. docs/format.md, 9.2.

A scalar type is the format string of the Arrow C data interface (arrow.apache.org/docs/format/CDataInterface.html);
a nested one has its children in parentheses after it. Dictionary-encoded, run-end-encoded and extension types are
written as the type of their values.
"""

from __future__ import annotations

import json
import re
from typing import Final

import pyarrow as pa

from beam_envelope.errors import FormatError

MAX_BYTES: Final = 1 << 16
MAX_DEPTH: Final = 32

_UNITS: Final = {"s": "s", "m": "ms", "u": "us", "n": "ns"}
_SIMPLE: Final[dict[str, pa.DataType]] = {
    "n": pa.null(), "b": pa.bool_(), "c": pa.int8(), "C": pa.uint8(), "s": pa.int16(), "S": pa.uint16(),
    "i": pa.int32(), "I": pa.uint32(), "l": pa.int64(), "L": pa.uint64(),
    "e": pa.float16(), "f": pa.float32(), "g": pa.float64(),
    "z": pa.binary(), "Z": pa.large_binary(), "vz": pa.binary_view(),
    "u": pa.string(), "U": pa.large_string(), "vu": pa.string_view(),
    "tdD": pa.date32(), "tdm": pa.date64(),
    "tts": pa.time32("s"), "ttm": pa.time32("ms"), "ttu": pa.time64("us"), "ttn": pa.time64("ns"),
    "tDs": pa.duration("s"), "tDm": pa.duration("ms"), "tDu": pa.duration("us"), "tDn": pa.duration("ns"),
    "tin": pa.month_day_nano_interval(),
}  # fmt: skip
_TEXT_OF: Final = {kind: text for text, kind in _SIMPLE.items()}
_DECIMALS: Final = {bits: f"decimal{bits}" for bits in (32, 64, 128, 256)}  # pyarrow 18 has the last two

_ZONE: Final = r"[A-Za-z0-9_+\-/:.]*"  # IANA names and offsets; what is free of commas needs no quotes here
_TOKEN: Final = re.compile(
    rf"""(?P<simple>td[Dm]|tt[smun]|tD[smun]|tin|v[zu]|[nbcCsSiIlLefgzZuU])
    |w:(?P<width>[0-9]{{1,10}})
    |d:(?P<precision>[0-9]{{1,3}}),(?P<scale>-?[0-9]{{1,3}})(?:,(?P<bits>[0-9]{{1,3}}))?
    |ts(?P<unit>[smun]):(?P<zone>{_ZONE})
    |\+w:(?P<size>[0-9]{{1,10}})
    |(?P<nested>\+(?:vl|vL|l|L|s|m))
    """,
    re.VERBOSE,
)
_STRING: Final = json.decoder.JSONDecoder()


def describe(kind: pa.DataType) -> str:
    """Return the descriptor of a type.

    Raises:
        TypeError: the type has none: it is a union, or one that is not known here.
    """
    text = _describe(kind, MAX_DEPTH)
    if len(text) > MAX_BYTES:
        msg = f"this type is too wide for cells: its description has more than {MAX_BYTES} bytes. Encrypt its parts"
        raise TypeError(msg)
    return text


def value_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values of a dictionary-encoded, run-end-encoded or extension type, or the type itself."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        else:
            return kind


def _describe(kind: pa.DataType, depth: int) -> str:
    if depth == 0:
        raise TypeError(f"this type is nested more than {MAX_DEPTH} deep, which no cell can be")
    kind = value_type(kind)
    if kind in _TEXT_OF:
        return _TEXT_OF[kind]
    if pa.types.is_decimal(kind):
        suffix = "" if kind.bit_width == 128 else f",{kind.bit_width}"  # noqa: PLR2004  # the default of the C interface
        return f"d:{kind.precision},{kind.scale}{suffix}"
    if pa.types.is_fixed_size_binary(kind):
        return f"w:{kind.byte_width}"
    if pa.types.is_timestamp(kind):
        zone = kind.tz or ""
        if not re.fullmatch(_ZONE, zone):
            raise TypeError(f"the time zone {zone!r} is neither an IANA name nor an offset")
        return f"ts{'n' if kind.unit == 'ns' else kind.unit[0]}:{zone}"
    return _describe_nested(kind, depth - 1)


def _describe_nested(kind: pa.DataType, depth: int) -> str:
    if pa.types.is_map(kind):
        return f"+m({_describe(kind.key_type, depth)},{_describe(kind.item_type, depth)})"
    if pa.types.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        return "+s(" + ",".join(json.dumps(field.name) + _describe(field.type, depth) for field in fields) + ")"
    if pa.types.is_fixed_size_list(kind):
        return f"+w:{kind.list_size}({_describe(kind.value_type, depth)})"
    for text, matches in (
        ("+l", pa.types.is_list),
        ("+L", pa.types.is_large_list),
        ("+vl", pa.types.is_list_view),
        ("+vL", pa.types.is_large_list_view),
    ):
        if matches(kind):
            return f"{text}({_describe(kind.value_type, depth)})"
    raise TypeError(f"values of type {kind} have no form as cells; encrypt another form of the column")


def parse(text: bytes) -> pa.DataType:
    """Return the type of a descriptor.

    Names of lists' items, nullability and metadata are not in it; they get Arrow's defaults.

    Raises:
        FormatError: it is none.
    """
    if len(text) > MAX_BYTES or not text.isascii():
        raise FormatError("this cell does not begin with the description of an Arrow type")
    try:
        kind, end = _parse(text.decode(), 0, MAX_DEPTH)
    except (ValueError, TypeError, OverflowError, LookupError, AttributeError, pa.ArrowException):
        kind, end = None, 0
    if kind is None or end != len(text):
        raise FormatError("this cell does not begin with the description of an Arrow type that is known here")
    return kind


def _parse(text: str, at: int, depth: int) -> tuple[pa.DataType, int]:  # noqa: PLR0911  # one for each kind
    """Return the type that begins at a position, and where it ends. Raises ValueError and its kin."""
    token = _TOKEN.match(text, at)
    if token is None or depth == 0:
        raise ValueError
    at, parts = token.end(), token.groupdict()
    if parts["simple"]:
        return _SIMPLE[parts["simple"]], at
    if parts["width"]:
        return pa.binary(int(parts["width"])), at
    if parts["precision"]:
        make = getattr(pa, _DECIMALS[int(parts["bits"] or 128)])
        return make(int(parts["precision"]), int(parts["scale"])), at
    if parts["unit"]:
        return pa.timestamp(_UNITS[parts["unit"]], parts["zone"] or None), at
    children, at = _parse_children(text, at, depth - 1, named=parts["nested"] == "+s")
    if parts["nested"] == "+s":
        return pa.struct([pa.field(name, kind) for name, kind in children]), at
    kinds = [kind for _, kind in children]
    if parts["nested"] == "+m":
        key, item = kinds
        return pa.map_(key, item), at
    (kind,) = kinds
    if parts["size"]:
        return pa.list_(kind, int(parts["size"])), at
    makers = {"+l": pa.list_, "+L": pa.large_list, "+vl": pa.list_view, "+vL": pa.large_list_view}
    return makers[parts["nested"]](kind), at


def _parse_children(text: str, at: int, depth: int, *, named: bool) -> tuple[list[tuple[str, pa.DataType]], int]:
    children: list[tuple[str, pa.DataType]] = []
    if text[at] != "(":
        raise ValueError
    if text[at + 1] == ")":
        return children, at + 2
    while text[at] != ")":
        if text[at] != ("," if children else "("):
            raise ValueError
        name, at = _STRING.raw_decode(text, at + 1) if named else ("", at + 1)
        if not isinstance(name, str):
            raise TypeError
        kind, at = _parse(text, at, depth)
        children.append((name, kind))
    return children, at + 1
