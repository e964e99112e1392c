"""A search for plaintext that leaked: plant a canary, run the job, look for it everywhere."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

_MIN_NEEDLE_BYTES: Final = 6  # a shorter one turns up in random bytes
_BLOCK_BYTES: Final = 1 << 20


def find_plaintext(roots: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *needles: bytes) -> list[Path]:
    """Return the files that hold any of `needles`: as they are, or inside a base64 or hexadecimal text.

    Plant a canary in the input of a job, then search the folders that the job and its runner wrote to.

    Args:
        roots: files and folders to search, with all that is below them; links are not followed.
        needles: byte strings of 6 bytes or more, none of which occurs by chance.

    Raises:
        ValueError: there is no needle, or one is too short to mean anything.

    Example:
        >>> assert find_plaintext([tmp_path], b"CANARY-7f3a", b"4111111111111111") == []
    """
    if not needles or min(map(len, needles)) < _MIN_NEEDLE_BYTES:
        raise ValueError(f"needles have {_MIN_NEEDLE_BYTES} bytes or more; shorter ones are found by chance")
    forms = {form for needle in needles for form in _forms(needle)}
    starts = [roots] if isinstance(roots, (str, os.PathLike)) else roots
    files = sorted({file for start in starts for file in _files(Path(start))})
    return [file for file in files if _holds(file, forms)]


def _forms(needle: bytes) -> Iterator[bytes]:
    yield from (needle, needle.hex().encode(), needle.hex().upper().encode())
    for shift in range(3):  # a base64 digit depends on where in a group of three bytes the needle starts
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            digits = encode(bytes(shift) + needle)
            yield digits[-(-shift * 8 // 6) : (shift + len(needle)) * 8 // 6]


def _files(start: Path) -> list[Path]:
    found = start.rglob("*") if start.is_dir() else [start]
    return [path for path in found if path.is_file() and not path.is_symlink()]


def _holds(file: Path, forms: set[bytes]) -> bool:
    window, overlap = b"", max(map(len, forms)) - 1
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            window = window[-overlap:] + block
            if any(form in window for form in forms):
                return True
    return False
