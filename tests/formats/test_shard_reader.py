"""Reading at any position; and shards that were changed, cut or put together, which give no plaintext but an error."""

import io
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_envelope.errors import (
    TamperedError,
    TruncatedError,
    WrongKeyError,
)
from beam_envelope.formats import shard_reader
from beam_envelope.formats.keyfile import key_file_name
from beam_envelope.formats.shard import create_shard, open_shard
from tests.formats.sealed import (
    CHUNK,
    COMPRESSIONS,
    CONTEXT,
    HEADER,
    READS,
    SEALED,
    Sealed,
    outcome,
    parts,
    read_at_once,
    rows,
)

# Random access


operations = st.lists(
    st.one_of(
        st.tuples(st.just("seek"), st.integers(0, 60_000), st.sampled_from([0, 1, 2])),
        st.tuples(st.sampled_from(["read", "readinto", "read1", "readline"]), st.integers(0, 40_000)),
        st.tuples(st.sampled_from(["tell", "read", "readline"])),
    ),
    max_size=12,
)


@pytest.fixture(scope="module", params=["none", "zstd", "last chunk empty"])
def for_random_access(request, key):
    if request.param == "last chunk empty":
        return Sealed(rows(2 * CHUNK), key)
    return Sealed(rows(3 * CHUNK + 777), key, request.param)


@settings(max_examples=150)
@given(steps=operations)
def test_seeks_and_reads_are_those_of_a_file(for_random_access, steps):
    model = io.BytesIO(for_random_access.plaintext)
    size = len(for_random_access.plaintext)
    with for_random_access.open() as stream:
        for name, *arguments in steps:
            if name == "seek":
                target, whence = min(arguments[0], size), arguments[1]
                offset = target - [0, model.tell(), size][whence]
                assert stream.seek(offset, whence) == model.seek(offset, whence)
            elif name == "readinto":
                ours, theirs = bytearray(arguments[0]), bytearray(arguments[0])
                count = stream.readinto(ours)
                model.readinto(memoryview(theirs)[:count])
                assert ours == theirs
                assert count or not arguments[0] or model.tell() == size
            elif name == "read1":
                got = stream.read1(*arguments)
                assert got == model.read(len(got))
                assert got or not arguments[0] or model.tell() == size
            else:
                assert getattr(stream, name)(*arguments) == getattr(model, name)(*arguments)
            assert stream.tell() == model.tell()


def test_beyond_the_end_there_is_nothing(three_chunks):
    with three_chunks.open() as stream:
        assert stream.seek(10**9) == 10**9
        assert (stream.read(1), stream.read(), stream.tell()) == (b"", b"", 10**9)
        assert stream.seek(-10, io.SEEK_END) == len(three_chunks.plaintext) - 10
        assert stream.read() == three_chunks.plaintext[-10:]


def test_impossible_seeks_are_refused(three_chunks):
    with three_chunks.open() as stream:
        stream.seek(7)
        for arguments in ((-1,), (-10, 1), (-(10**9), 2), (0, 9)):
            with pytest.raises(ValueError, match=r"cannot seek|whence|negative"):
                stream.seek(*arguments)
        assert stream.read(3) == three_chunks.plaintext[7:10]


def test_a_closed_reader_reads_nothing(three_chunks):
    stream = three_chunks.open()
    raw = stream.raw
    stream.close()
    for call in (lambda: stream.read(1), lambda: raw.read(1), lambda: raw.seek(0), lambda: stream.seek(0)):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_random_access_decrypts_only_what_it_touches(path, key):
    megabytes = 64
    with create_shard(path, key=key) as stream:
        for _ in range(megabytes):
            stream.write(bytes(1 << 20))
    size, chance = megabytes << 20, random.Random(1)
    with open_shard(path, key=key) as stream:
        assert stream.raw.chunks_decrypted == 0
        for _ in range(50):
            before = stream.raw.chunks_decrypted
            stream.seek(chance.randrange(size - 65536))
            assert stream.read(65536) == bytes(65536)
            assert stream.raw.chunks_decrypted - before <= 6
        before = stream.raw.chunks_decrypted
        stream.seek(size // 2)
        for _ in range(1000):
            stream.read(10)
        assert stream.raw.chunks_decrypted - before <= 2
    with open_shard(path, key=key) as stream:
        while stream.read(1 << 20):
            pass
        assert stream.raw.chunks_decrypted == size // CHUNK + 1  # each once, and the empty last one


def test_a_reader_needs_no_more_of_the_stream_than_it_reads(three_chunks):
    class Counting(io.BytesIO):
        taken = 0

        def readinto(self, buffer):
            count = super().readinto(buffer)
            self.taken += count
            return count

    source = Counting(three_chunks.shard)
    with open_shard(source, key=three_chunks.key, context=CONTEXT, key_file=three_chunks.key_file) as stream:
        assert source.taken == HEADER
        stream.seek(CHUNK)
        assert stream.read(10) == three_chunks.plaintext[CHUNK : CHUNK + 10]
        assert source.taken == HEADER + SEALED


def test_a_stream_that_gives_little_at_a_time_is_enough(three_chunks):
    class Slow(io.BytesIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:1000])

    source = Slow(three_chunks.shard)
    with open_shard(source, key=three_chunks.key, context=CONTEXT, key_file=three_chunks.key_file) as stream:
        assert stream.read() == three_chunks.plaintext


# Changes


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_changed_byte_of_a_small_shard_is_seen_and_gives_no_plaintext(key, compression):
    sealed = Sealed(b"some rows\n", key, compression)
    assert sealed.open().read() == b"some rows\n"
    for position in range(len(sealed.shard)):
        for flip in (0x01, 0x80):
            shard = bytearray(sealed.shard)
            shard[position] ^= flip
            error = WrongKeyError if position < HEADER else TamperedError
            with pytest.raises(error), sealed.open(shard) as stream:
                stream.read(1)


def test_every_truncation_of_a_small_shard_is_seen_and_gives_no_plaintext(key):
    sealed = Sealed(b"some rows\n", key)
    for size in range(len(sealed.shard)):
        assert outcome(sealed, sealed.shard[:size], read_at_once) == b""


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(
    "position",
    [HEADER + number * SEALED + offset for number in range(3) for offset in (0, 1, 4000, 4999, 5000, 5015)]
    + [HEADER + number * SEALED + offset for number in range(2) for offset in (CHUNK - 1, CHUNK, SEALED - 1)],
)
def test_a_changed_byte_gives_only_what_stands_before_its_chunk(three_chunks, position, read):
    shard = bytearray(three_chunks.shard)
    shard[position] ^= 1
    out = outcome(three_chunks, shard, read)
    assert len(out) <= (position - HEADER) // SEALED * CHUNK


def test_a_changed_chunk_is_named_and_the_others_can_still_be_read(three_chunks):
    shard = bytearray(three_chunks.shard)
    shard[HEADER + SEALED + 100] ^= 1
    with three_chunks.open(shard) as stream:
        for _ in range(2):
            stream.seek(CHUNK + 5)
            with pytest.raises(TamperedError) as caught:
                stream.read(1)
            assert str(caught.value) == (
                "the shard was changed after it was written: chunk 1 does not authenticate. Restore it from a copy"
            )
        stream.seek(0)
        assert stream.read(CHUNK) == three_chunks.plaintext[:CHUNK]
        stream.seek(2 * CHUNK)
        assert stream.read() == three_chunks.plaintext[2 * CHUNK :]


def test_a_block_that_fails_leaves_nothing_in_the_buffer(key):
    sealed = Sealed(rows(8 * CHUNK), key)
    for position in (HEADER, HEADER + 3 * SEALED):
        for start in (0, CHUNK):  # in order, and not
            shard = bytearray(sealed.shard)
            shard[position + start // CHUNK * SEALED] ^= 1
            stream = sealed.open(shard).detach()
            stream.seek(start)
            buffer = bytearray(6 * CHUNK)
            with pytest.raises(TamperedError, match="one of the chunks"):
                stream.readinto(buffer)
            assert buffer == bytes(6 * CHUNK)
            with pytest.raises(TamperedError):  # the second time as well
                stream.readinto(buffer)


@pytest.mark.parametrize("read", READS)
def test_every_kind_of_truncation_is_seen(three_chunks, read):
    whole = len(three_chunks.shard)
    borders = [0, HEADER, HEADER + 16, HEADER + SEALED, HEADER + SEALED + 16, HEADER + 2 * SEALED, whole]
    sizes = {border + near for border in borders for near in range(-17, 18)} | set(range(0, whole, 1999))
    for size in sorted(size for size in sizes if 0 <= size < whole):
        out = outcome(three_chunks, three_chunks.shard[:size], read)
        assert len(out) <= max(size - HEADER, 0) // SEALED * CHUNK


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000, SEALED - 1, SEALED, SEALED + 16, 3 * SEALED])
def test_every_extension_is_seen(three_chunks, size, read):
    for more in (bytes(size), three_chunks.shard[-size:]):
        outcome(three_chunks, three_chunks.shard + more, read)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(
    "order", [(1, 0, 2), (0, 0, 2), (1, 1, 2), (0, 2), (1, 2), (0, 1, 1, 2), (2,), (0, 1), (0,), ()], ids=str
)
def test_chunks_in_another_order_are_seen(three_chunks, order, read):
    header, chunks = parts(three_chunks.shard)
    outcome(three_chunks, header + b"".join(chunks[number] for number in order), read)


def test_a_chunk_of_another_shard_is_seen(key):
    ours, theirs = Sealed(rows(2 * CHUNK), key), Sealed(rows(2 * CHUNK), key)
    header, chunks = parts(ours.shard)
    _, others = parts(theirs.shard)
    with ours.open(header + chunks[0] + others[1] + chunks[2]) as stream:
        assert stream.read(CHUNK) == ours.plaintext[:CHUNK]
        with pytest.raises(TamperedError, match="chunk 1 does not authenticate"):
            stream.read(1)
    with pytest.raises(WrongKeyError, match="the key commitment differs"):
        ours.open(parts(theirs.shard)[0] + b"".join(chunks))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_end_is_reported_only_when_the_last_chunk_proves_it(key, compression):
    data = rows(2 * CHUNK) if compression == "none" else random.Random(1).randbytes(2 * CHUNK + 100)
    sealed = Sealed(data, key, compression)
    header, chunks = parts(sealed.shard)
    kept = header + b"".join(chunks[:-1])
    with pytest.raises(TruncatedError, match="a size that no whole shard has"):
        sealed.open(kept)
    other = Sealed(data, key, compression)
    for end in (bytes(16), other.shard[-16:], chunks[0][:16]):  # an empty last chunk, put in its place
        with sealed.open(kept + end) as stream, pytest.raises(TamperedError, match="or the file was cut"):
            assert data.startswith(stream.read(CHUNK) + stream.read())  # of zstd, the first may ask for the end
        with sealed.open(kept + end) as stream, pytest.raises(TamperedError, match="or the file was cut"):
            stream.seek(0, io.SEEK_END)
        with sealed.open(kept + end) as stream, pytest.raises(TamperedError, match="or the file was cut"):
            stream.read()
        with sealed.open(kept + end) as stream, pytest.raises(TamperedError, match="or the file was cut"):
            stream.read(stream.seek(10**9))


def test_a_shard_that_shrinks_while_it_is_read_is_seen(path, key):
    with create_shard(path, key=key) as stream:
        stream.write(rows(4 * CHUNK))
    with open_shard(path, key=key) as stream:
        stream.read(10)
        os.truncate(path, HEADER + SEALED + 100)
        with pytest.raises(TruncatedError, match="became shorter while it was read"):
            stream.read()


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_random_bytes_are_no_shard(key, three_chunks, raw):
    with pytest.raises((TruncatedError, WrongKeyError)):
        three_chunks.open(raw)


def test_no_chunk_is_decrypted_before_the_commitment_is_checked(three_chunks, monkeypatch):
    shard = bytearray(three_chunks.shard)
    shard[24] ^= 1  # in the commitment, not in the salt: every chunk would still decrypt
    monkeypatch.setattr(shard_reader, "AESGCM", lambda _: pytest.fail("the key was used"))
    with pytest.raises(WrongKeyError, match="the key commitment differs"):
        three_chunks.open(shard)


def test_a_shard_cut_at_a_chunk_is_found_by_who_reads_just_as_many_bytes_as_there_are(path, key):
    """Cut to whole chunks and 16 bytes, it has the size of a shorter shard; only its last chunk tells."""
    with create_shard(path, key=key) as stream:
        stream.write(b"x" * (3 * CHUNK))
    os.truncate(path, HEADER + 2 * SEALED + 16)
    with open_shard(path, key=key) as stream, pytest.raises(TamperedError, match="or the file was cut"):
        stream.read(2 * CHUNK)
    with open_shard(path, key=key) as stream, pytest.raises(TamperedError, match="or the file was cut"):
        stream.readinto(bytearray(2 * CHUNK))


def test_a_stream_in_memory_can_be_closed_after_a_refusal(path, key):
    with create_shard(path, key=key) as stream:
        stream.write(b"x" * (3 * CHUNK))
    changed = bytearray(path.read_bytes())
    changed[HEADER + 5] ^= 1
    memory = io.BytesIO(changed)
    with pytest.raises(TamperedError) as caught:
        open_shard(memory, key=key, key_file=path.with_name(key_file_name(path.name))).read()
    memory.close()
    assert caught.tb is not None, "its frames are still there"
