"""What is in a folder of shards: read from listings and key files alone, with no key and no call to a KMS."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any, Final

from beam_envelope.errors import EnvelopeError
from beam_envelope.formats.keyfile import (
    MANIFEST_NAME,
    MAX_KEY_FILE_BYTES,
    SHARD_CIPHER,
    KeyFile,
    WrappedDataKey,
    is_key_file,
    key_file_name,
)
from beam_envelope.formats.shard_layout import plaintext_size
from beam_envelope.io.store import expand, key_file_path, read_small, split_path, store_of
from beam_envelope.keys.provider import WrappedKey

_READERS: Final = 16  # key files are read in parallel: on S3, each read is mostly waiting


@dataclass(frozen=True)
class ShardEntry:
    """One file of a folder, as far as it can be told without a key.

    Attributes:
        path: the file.
        stored_bytes: its size.
        plaintext_bytes: the size of what is in it, unless it is compressed or Parquet.
        kms_keys: the KMS keys any of which opens it; of encrypted Parquet, its footer, and columns without keys of
            their own.
        column_kms_keys: of encrypted Parquet: for each other data key, the KMS keys any of which opens its columns.
            Which columns those are, the encrypted footer says.
        cipher: how it is encrypted.
        context: its encryption context.
        compression: `none` or `zstd`.
        created: when it was written, in UTC.
        problem: what is wrong with it, or "".
    """

    path: str
    stored_bytes: int
    plaintext_bytes: int | None = None
    kms_keys: tuple[str, ...] = ()
    context: dict[str, str] | None = None
    compression: str = ""
    created: str = ""
    cipher: str = SHARD_CIPHER
    column_kms_keys: tuple[tuple[str, ...], ...] = ()
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    def age_s(self) -> float | None:
        """Return the seconds since it was written."""
        try:
            written = datetime.strptime(self.created, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
        except ValueError:
            return None
        return (datetime.now(timezone.utc) - written).total_seconds()


def list_shards(patterns: Sequence[str]) -> list[ShardEntry]:
    """List the shards that patterns name, and what else lies there: files with no key file, key files with no shard.

    Raises:
        FileNotFoundError: nothing matches.
        OSError: from the store.
    """
    sizes: dict[str, int] = {}
    for pattern in patterns:
        sizes.update((metadata.path, metadata.size_in_bytes) for metadata in expand(pattern)[1])
    with ThreadPoolExecutor(_READERS) as pool:
        return [entry for entry in pool.map(lambda path: _entry(path, sizes), sorted(sizes)) if entry is not None]


def _entry(path: str, sizes: dict[str, int]) -> ShardEntry | None:
    folder, name = split_path(path)
    if name == MANIFEST_NAME:
        return None
    if is_key_file(name):
        shard = folder + name.removeprefix(key_file_name("").removesuffix(".json")).removesuffix(".json")
        there = shard in sizes or store_of(shard).size(shard) is not None
        return None if there else ShardEntry(path, sizes[path], problem="a key file without its shard")
    if name.startswith("_TMP_"):
        return ShardEntry(path, sizes[path], problem="unfinished; delete it if no job is running")
    try:
        raw = read_small(key_file_path(path), MAX_KEY_FILE_BYTES + 1)
    except FileNotFoundError:
        return ShardEntry(path, sizes[path], problem="no key file: not a shard, or nobody can open it")
    try:
        key_file = KeyFile.from_bytes(raw, f"the key file of {path}")
        of_shard = key_file.cipher == SHARD_CIPHER
        held = plaintext_size(sizes[path], path) if of_shard else None
    except EnvelopeError as error:
        return ShardEntry(path, sizes[path], problem=str(error))
    return ShardEntry(
        path,
        sizes[path],
        held if key_file.compression == "none" else None,
        _kms_keys(key_file.data_keys[0]),
        dict(key_file.context),
        key_file.compression,
        key_file.created,
        key_file.cipher,
        tuple(map(_kms_keys, key_file.data_keys[1:])),
    )


def _kms_keys(data_key: WrappedDataKey) -> tuple[str, ...]:
    return tuple(map(_kms_key, data_key.wrapped_keys))


def _kms_key(wrapped: WrappedKey) -> str:
    named = wrapped.provider == "aws-kms" or wrapped.kms_key.startswith(f"{wrapped.provider}://")
    return wrapped.kms_key if named else f"{wrapped.provider}:{wrapped.kms_key}"
