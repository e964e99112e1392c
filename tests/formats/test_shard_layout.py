"""The sizes of shards."""

import pytest

from beam_envelope.errors import FormatError, TruncatedError
from beam_envelope.formats.shard_layout import MAX_CHUNKS, plaintext_size, shard_size
from tests.formats.sealed import CHUNK, HEADER, SEALED


def test_sizes_are_computed_from_sizes():
    for size in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 10 * CHUNK, 10**12):
        assert plaintext_size(shard_size(size)) == size
    assert shard_size(0) == HEADER + 16
    assert shard_size(CHUNK) == HEADER + SEALED + 16
    for impossible in (0, 1, HEADER, HEADER + 15, HEADER + SEALED, HEADER + SEALED + 15):
        with pytest.raises(TruncatedError) as caught:
            plaintext_size(impossible, "part-0")
        assert str(caught.value) == (
            f"part-0 has {impossible} bytes, a size that no whole shard has: it was cut short. Write it again"
        )


def test_a_shard_has_no_more_chunks_than_the_standard_allows():
    largest = MAX_CHUNKS * CHUNK - 1
    assert plaintext_size(shard_size(largest)) == largest
    with pytest.raises(FormatError, match="over the 4 PiB that a shard can have"):
        plaintext_size(shard_size(largest + 1))
