"""Random files and keys to measure with, and the check that what came out is what went in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from beam_envelope import LocalKms
from beam_envelope.keys.local import generate_local_key
from benchmarks.settings import MIB


def new_key(folder: Path) -> LocalKms:
    """Make a key in a keyring in the folder: no network, so that no KMS is measured."""
    key = LocalKms(str(folder / "keyring.json"))
    generate_local_key(key)
    return key


def random_buffer(size: int) -> memoryview:
    """Return random bytes; every page is touched."""
    buffer = memoryview(bytearray(size))
    for start in range(0, size, MIB):
        end = min(size, start + MIB)
        buffer[start:end] = os.urandom(end - start)
    return buffer


def touched_buffer(size: int) -> memoryview:
    """Return a buffer whose pages are all in memory: the first touch of a page can cost more than to encrypt it."""
    buffer = memoryview(bytearray(size))
    for start in range(0, size, MIB):
        end = min(size, start + MIB)
        buffer[start:end] = b"\xa5" * (end - start)
    return buffer


def random_file(path: Path, size: int) -> Path:
    """Write a file of random bytes."""
    with path.open("wb") as stream:
        for start in range(0, size, MIB):
            stream.write(os.urandom(min(MIB, size - start)))
    return path


def check_equal(found: Path, expected: Path) -> None:
    """Compare two files.

    Raises:
        SystemExit: they differ.
    """
    with found.open("rb") as one, expected.open("rb") as other:
        while True:
            block = one.read(MIB)
            check(block == other.read(MIB), f"{found} is not {expected}")
            if not block:
                return


def check_zeros(stream: BinaryIO, size: int) -> None:
    """Read a stream to its end and check that it is `size` zero bytes. Raises SystemExit."""
    buffer, zeros, total = memoryview(bytearray(MIB)), bytes(MIB), 0
    while count := stream.readinto(buffer):  # type: ignore[attr-defined]  # BinaryIO leaves it out
        check(buffer[:count] == zeros[:count], "a byte that was zero came back as another")
        total += count
    check(total == size, f"{size} bytes came back as {total}")


def check(condition: bool, what: str) -> None:  # noqa: FBT001  # reads as an assertion, and stays with python -O
    """Stop the benchmark: figures for wrong output are worth nothing. Raises SystemExit."""
    if not condition:
        raise SystemExit(f"Wrong output, so no figures: {what}")
