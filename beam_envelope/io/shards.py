"""Shards on any Beam filesystem: `formats.shard.open_shard` for `s3://` and the like."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from beam_envelope.formats.keyfile import MAX_KEY_FILE_BYTES, KeyFile
from beam_envelope.formats.shard import missing_key_file, open_sealed
from beam_envelope.formats.shard_layout import HEADER_BYTES
from beam_envelope.io.store import key_file_path, read_small, store_of
from beam_envelope.keys.context import AnyContext
from beam_envelope.keys.uri import Key, open_keys


def open_shard_at(
    path: str, key: Key | Sequence[Key], context: Mapping[str, str] | AnyContext | None
) -> tuple[KeyFile, io.BufferedReader]:
    """Open a shard for reading.

    Returns:
        Its key file and the open shard, a binary file that closes the underlying stream too.

    Raises:
        As `open_shard`.
    """
    stream = store_of(path).open(path)
    try:
        try:
            raw = read_small(key_file_path(path), MAX_KEY_FILE_BYTES + 1)
        except FileNotFoundError:
            raise missing_key_file(path, stream.read(HEADER_BYTES)) from None
        shard = open_sealed(stream, raw, open_keys(key), context, path, own=True)
        return KeyFile.from_bytes(raw, path), shard
    except BaseException:
        stream.close()
        raise
