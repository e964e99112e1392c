"""Shards on any Beam filesystem: `formats.shard.open_shard` for `s3://` and the like."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from beam_envelope.errors import FormatError
from beam_envelope.formats.keyfile import MAX_KEY_FILE_BYTES, PARQUET_CIPHER, KeyFile
from beam_envelope.formats.shard import missing_key_file, open_sealed
from beam_envelope.formats.shard_layout import HEADER_BYTES
from beam_envelope.io.store import key_file_path, read_small, store_of
from beam_envelope.keys.context import AnyContext
from beam_envelope.keys.uri import Key, open_keys


def open_shard_at(
    path: str,
    key: Key | Sequence[Key],
    context: Mapping[str, str] | AnyContext | None,
    key_file: bytes | None = None,
) -> tuple[KeyFile, io.BufferedReader]:
    """Open a shard for reading.

    Args:
        path: the shard.
        key: the allowed keys.
        context: what the caller expects.
        key_file: the key file's bytes, if they were read already.

    Returns:
        Its key file and the open shard, a binary file that closes the underlying stream too.

    Raises:
        As `open_shard`.
    """
    stream = store_of(path).open(path)
    try:
        try:
            raw = read_small(key_file_path(path), MAX_KEY_FILE_BYTES + 1) if key_file is None else key_file
        except FileNotFoundError:
            raise missing_key_file(path, stream.read(HEADER_BYTES)) from None
        parsed = KeyFile.from_bytes(raw, f"the key file of {path}")
        _refuse_table(parsed, path)
        return parsed, open_sealed(stream, raw, open_keys(key), context, path, own=True)
    except BaseException:
        stream.close()
        raise


def _refuse_table(key_file: KeyFile, path: str) -> None:
    if key_file.cipher == PARQUET_CIPHER:
        msg = (
            f"{path} is encrypted Parquet, not a shard. Decrypt it with `beam-envelope decrypt` or DecryptTables, or "
            "read it with open_parquet or ReadEncryptedParquet"
        )
        raise FormatError(msg)
