"""Cutting a line-delimited file into parts that end at line ends. Works on blocks; knows no Beam."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, Final

MAX_HEADER_BYTES: Final = 1 << 20
_SEARCH_BYTES: Final = 64 * 1024
_UNITS: Final = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = _UNITS[_letter] = 1024**_power


def parse_size(size: int | str) -> int:
    """Return a number of bytes: 1048576, "256MiB" (powers of 1024, also "256M") or "1GB" (powers of 1000).

    Raises:
        ValueError: not a size, or not above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        msg = f"{size!r} is not a size; write a number of bytes, or 256MiB, 1GB and the like"
        raise ValueError(msg)
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))


def parts(size: int, part_bytes: int) -> list[tuple[int, int]]:
    """Return the (start, end) of the parts of a file of `size` bytes; each then holds the lines that start in it."""
    count = max(1, -(-size // part_bytes))
    return [(index * part_bytes, min(size, (index + 1) * part_bytes)) for index in range(count)]


def line_bounds(stream: BinaryIO, start: int, end: int) -> tuple[int, int]:
    """Return where the first line that starts in [start, end) begins, and where the last such line ends.

    A line starts at 0 and behind each newline byte, and keeps its newline; the bounds of neighbouring parts meet, so
    that the parts put together are the file. They are equal where no line starts in the part. Quoted newlines in CSV
    count as newlines.
    """
    return _line_start(stream, start), _line_start(stream, end)


def read_header(stream: BinaryIO, lines: int, part_start: int) -> bytes:
    """Return the first lines of a file, to be repeated in the part that starts at `part_start`.

    Raises:
        ValueError: they reach into that part (which is seen in the second part at the latest), or are over 1 MiB.
    """
    stream.seek(0)
    limit = min(MAX_HEADER_BYTES, part_start)
    head = b"".join(bytes(block) for block in blocks(stream, 0, limit, _SEARCH_BYTES))  # they share one buffer
    end = 0
    for _ in range(lines):
        end = head.find(b"\n", end) + 1
        if end == 0:
            msg = f"the header of {lines} lines does not end in the first {limit} bytes. Split into larger parts"
            raise ValueError(msg)
    return head[:end]


def blocks(stream: BinaryIO, start: int, end: int, block_bytes: int) -> Iterator[memoryview]:
    """Yield the bytes from `start` to `end`, or to the end of the stream, in a buffer that is used again."""
    buffer = memoryview(bytearray(min(block_bytes, max(end - start, 1))))
    stream.seek(start)
    while start < end:
        count = stream.readinto(buffer[: end - start])  # type: ignore[attr-defined]  # BinaryIO leaves it out
        if not count:
            return
        start += count
        yield buffer[:count]


def _line_start(stream: BinaryIO, position: int) -> int:
    """Return the first position at or after `position` where a line starts, or the end of the stream."""
    if position == 0:
        return 0
    found = position - 1
    for block in blocks(stream, position - 1, 1 << 62, _SEARCH_BYTES):
        index = bytes(block).find(b"\n")
        if index >= 0:
            return found + index + 1
        found += len(block)
    return found
