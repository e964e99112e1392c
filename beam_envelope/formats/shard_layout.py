"""The sizes in a shard: a Cobblestone-256 message, C2SP chunked encryption with SHA-512 and AES-256-GCM.

24 bytes of salt, 32 of key commitment, then chunks of 16 KiB, each with a 16-byte tag, the last always shorter than the
others (c2sp.org/chunked-encryption; docs/format.md, 2).
"""

from __future__ import annotations

from typing import Final

from beam_envelope.errors import FormatError, TruncatedError

CHUNK_BYTES: Final = 16 * 1024
TAG_BYTES: Final = 16
SEALED_CHUNK_BYTES: Final = CHUNK_BYTES + TAG_BYTES
SALT_BYTES: Final = 24
COMMITMENT_BYTES: Final = 32
HEADER_BYTES: Final = SALT_BYTES + COMMITMENT_BYTES
MIN_SHARD_BYTES: Final = HEADER_BYTES + TAG_BYTES
BLOCK_BYTES: Final = 64 * CHUNK_BYTES
"""How much the writer and the reader handle at a time."""
MAX_CHUNKS: Final = 2**38


def shard_size(plaintext_bytes: int) -> int:
    """Return the size of the shard of that many (compressed) plaintext bytes."""
    return HEADER_BYTES + plaintext_bytes + TAG_BYTES * (plaintext_bytes // CHUNK_BYTES + 1)


def plaintext_size(shard_bytes: int, what: str = "the shard") -> int:
    """Return how many (compressed) plaintext bytes a shard of that size holds. The size alone proves nothing.

    Raises:
        TruncatedError: no shard has that size.
        FormatError: it is over the 2**38 chunks that the standard allows.
    """
    chunks, rest = divmod(shard_bytes - HEADER_BYTES, SEALED_CHUNK_BYTES)
    if chunks < 0 or rest < TAG_BYTES:
        msg = f"{what} has {shard_bytes} bytes, a size that no whole shard has: it was cut short. Write it again"
        raise TruncatedError(msg)
    if chunks >= MAX_CHUNKS:
        raise FormatError(f"{what} has {shard_bytes} bytes, over the 4 PiB that a shard can have")
    return chunks * CHUNK_BYTES + rest - TAG_BYTES
