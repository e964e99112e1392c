"""Shards in memory, and ways to read them, for the tests of this folder."""

import io

import pytest

from beam_envelope.errors import (
    TamperedError,
    TruncatedError,
    WrongKeyError,
)
from beam_envelope.formats.keyfile import KeyFile
from beam_envelope.formats.shard import create_shard, open_shard
from beam_envelope.keys.context import ANY_CONTEXT

CHUNK = 16384
SEALED = CHUNK + 16
HEADER = 56
CONTEXT = {"dataset": "orders"}
COMPRESSIONS = ["none", "zstd"]


def rows(size):
    """Return that many bytes of text that differ everywhere and compress a little."""
    text = b"".join(b"%d,row %d,%d\n" % (number, number, number * 7919 % 1000) for number in range(size // 12 + 1))
    return text[:size]


class Sealed:
    """A shard in memory: its bytes, and its key file's."""

    def __init__(self, plaintext, key, compression="none"):
        stream, key_file = io.BytesIO(), io.BytesIO()
        with create_shard(stream, key=key, context=CONTEXT, compression=compression, key_file=key_file) as writer:
            writer.write(plaintext)
        self.plaintext, self.key = plaintext, key
        self.shard, self.key_file = stream.getvalue(), key_file.getvalue()

    def open(self, shard=None):
        """Open these bytes, or others, with the key file."""
        stream = io.BytesIO(self.shard if shard is None else bytes(shard))
        return open_shard(stream, key=self.key, context=CONTEXT, key_file=self.key_file)

    def data_key(self):
        """Return the data key's bytes."""
        key_file = KeyFile.from_bytes(self.key_file, "k")
        with self.key.unwrap(key_file.data_keys[0].wrapped_keys[0], CONTEXT) as data_key:
            return bytes(data_key.material)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir() if entry.name != "keyring")


def nothing_opens(path, key):
    """Assert that a writer left nothing that a reader takes for a shard, and no stray file."""
    assert {name for name in names(path.parent) if not name.startswith("_TMP_")} <= set()
    with pytest.raises(FileNotFoundError):
        open_shard(path, key=key, context=ANY_CONTEXT)


def outcome(sealed, shard, read):
    """Read a changed shard; return what came out before the error, which there must be."""
    out = bytearray()
    with pytest.raises((TamperedError, TruncatedError, WrongKeyError)), sealed.open(shard) as stream:
        read(stream, out)
    assert sealed.plaintext.startswith(out)
    return out


def read_at_once(stream, out):
    out += stream.read()


def read_in_pieces(stream, out):
    while piece := stream.read(5000):
        out += piece


def read_in_blocks(stream, out):
    block = memoryview(bytearray(10 * CHUNK))
    while count := stream.readinto(block):
        out += block[:count]


def parts(shard):
    """Return the header and the sealed chunks."""
    return shard[:HEADER], [shard[start : start + SEALED] for start in range(HEADER, len(shard), SEALED)]


READS = [read_at_once, read_in_pieces, read_in_blocks]
