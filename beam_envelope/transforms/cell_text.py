"""Cells as text: base64, for the fields of JSON."""

from __future__ import annotations

import base64
from typing import Any, Final

from beam_envelope.errors import NotEncryptedError
from beam_envelope.formats.record_key import PREFIX_BYTES

BASE64_OF_PREFIX: Final = 4 * -(-PREFIX_BYTES // 3)
"""How many characters hold the prefix of an envelope, which names its key."""


def cell_of(value: Any) -> bytes:
    """Return the cell that a text is the base64 of. Raises NotEncryptedError."""
    if type(value) is not str:
        raise NotEncryptedError(f"it is not encrypted: it is a {type(value).__name__}, and cells are bytes or base64")
    cell = from_base64(value)
    if cell is None:
        msg = "it is not encrypted: it is a text that is no base64"
        raise NotEncryptedError(msg)
    return cell


def from_base64(text: str) -> bytes | None:
    """Return the bytes that a text is the base64 of, or None if it is none."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return None
