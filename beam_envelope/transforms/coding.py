"""From elements to bytes and back: which coders records may have, and what becomes of an element that does not fit."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

from apache_beam import coders, typehints
from apache_beam.coders import coders as coder_classes
from apache_beam.typehints.native_type_compatibility import convert_to_beam_type

from beam_envelope.errors import FormatError
from beam_envelope.formats.record import record_place

CoderLike: TypeAlias = "coders.Coder | type | str | None"
Aad: TypeAlias = "bytes | str | Callable[[Any], bytes | str] | None"

_NAMED: Final = {"bytes": bytes, "str": str, "int": int, "float": float, "bool": bool}
# These hold pickles, or may: whoever can make an envelope that opens would run code in the reader.
_PICKLING: Final = tuple(
    getattr(coder_classes, name)
    for name in (
        "_PickleCoderBase",
        "Base64PickleCoder",
        "DeterministicFastPrimitivesCoder",
        "DeterministicFastPrimitivesCoderV2",
        "FastPrimitivesCoder",
    )
    if hasattr(coder_classes, name)
)


def checked_coder(coder: CoderLike, *, deterministic: bool = False) -> coders.Coder | None:
    """Return the Beam coder that `coder=` names: a coder, a type, or "str", "int", "float", "bool", "bytes".

    Raises:
        TypeError: it is nothing of the kind.
        ValueError: the coder unpickles, or is to be deterministic and is not.
    """
    if coder is None or isinstance(coder, coders.Coder):
        found = coder
    elif isinstance(coder, str):
        if coder not in _NAMED:
            raise ValueError(f"coder= as a text is one of {', '.join(_NAMED)}, not {coder!r}")
        found = coders.registry.get_coder(_NAMED[coder])
    elif isinstance(coder, type) and issubclass(coder, coders.Coder):
        raise TypeError(f"coder= is a coder or the type of the elements; give {coder.__name__}(), not the class")
    elif not isinstance(coder, type) and typing.get_origin(coder) is None and coder is not typing.Any:
        raise TypeError(f"coder= is a coder, the type of the elements or its name, not a {type(coder).__name__}")
    else:
        found = coders.registry.get_coder(convert_to_beam_type(coder))
    if found is None:
        return None
    if any(isinstance(part, _PICKLING) for part in _parts(found)):
        raise ValueError(
            f"the coder {found} for coder={coder} unpickles, and to unpickle what was decrypted would run whatever "
            "code its writer put in. Give one that does not: coders.registry.register_coder(Type, coders.RowCoder) "
            "makes one for a NamedTuple; or encode the elements as bytes yourself"
        )
    if deterministic and not found.is_deterministic():
        raise ValueError(
            f"the coder {found} does not encode equal elements as equal bytes, which deterministic=True needs"
        )
    return found


def type_of(coder: coders.Coder | None) -> Any:
    """Return the type of what a coder decodes, for type hints."""
    if coder is None:
        return bytes
    try:
        return coder.to_type_hint()
    except NotImplementedError:
        return typehints.Any


def encode(element: Any, encoder: Callable[[Any], bytes] | None) -> bytes:
    """Return an element as bytes.

    Raises:
        FormatError: that is not possible. Neither the message nor what goes with the exception holds data.
    """
    if encoder is None:
        if isinstance(element, bytes):
            return element
        encoder = _encode_text
    try:
        encoded = encoder(element)
    except Exception as error:  # noqa: BLE001  # of the user's coder
        failure = type(error).__name__
    else:
        if isinstance(encoded, bytes):
            return encoded
        failure = f"the coder returned a {type(encoded).__name__}"
    # Outside of the except block, since the coder's exception, and with it perhaps the element, would go along.
    raise FormatError(
        f"an element of type {type(element).__name__} cannot be encoded as bytes ({failure}). "
        "Elements are bytes or str, or what coder= can encode"
    )


def decode(plaintext: bytes, decoder: Callable[[bytes], Any]) -> Any:
    """Return the element of a decrypted record. Raises FormatError, as `encode`."""
    try:
        return decoder(plaintext)
    except Exception as error:  # noqa: BLE001
        failure = type(error).__name__
    raise FormatError(
        f"this record was decrypted, but coder= cannot decode it ({failure}). Give the coder it was written with"
    )


def split_pair(element: Any) -> tuple[Any, Any]:
    """Return message key and record. Raises FormatError where `keyed=True` gets something else."""
    if isinstance(element, tuple) and len(element) == 2:  # noqa: PLR2004  # a pair
        return element
    raise FormatError(
        f"with keyed=True each element is a pair of message key and record; this is a {type(element).__name__}"
    )


def checked_aad(aad: Aad, *, keyed: bool) -> bytes | Callable[[Any], bytes | str]:
    """Return the place of every record, or the function that tells it.

    Raises:
        TypeError, ValueError: it is neither, or a function without message keys.
    """
    if aad is None:
        return record_place()
    if callable(aad):
        if not keyed:
            raise ValueError("aad= as a function is of the message key, so it needs keyed=True")
        return aad
    if not isinstance(aad, (bytes, str)):
        raise TypeError(f"aad= is bytes, str or, with keyed=True, a function, not a {type(aad).__name__}")
    return record_place(aad.encode() if isinstance(aad, str) else aad)


def place_of(message_key: Any, aad: Callable[[Any], bytes | str]) -> bytes:
    """Return what binds a record to its message key. Raises FormatError, without data, where the function fails."""
    try:
        found = aad(message_key)
        if isinstance(found, (bytes, str)):
            return record_place(found.encode() if isinstance(found, str) else found)
        failure = f"it returned a {type(found).__name__}"
    except Exception as error:  # noqa: BLE001  # of the user's function
        failure = type(error).__name__
    raise FormatError(f"the function aad= failed for a message key ({failure}). It has to return bytes or str")


def _encode_text(element: Any) -> bytes:
    if not isinstance(element, str):
        raise TypeError
    return element.encode()


def _parts(coder: Any) -> Iterator[Any]:
    """Yield a coder and the coders in it, however it holds them."""
    yield coder
    for value in vars(coder).values():
        for part in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(part, coders.Coder):
                yield from _parts(part)
