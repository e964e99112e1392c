"""Shards: the bytes of any file as a Cobblestone-256 message, with a key file. Bytes: docs/format.md, 2.

Opening and creating are here; what is written and read then, in shard_writer.py and shard_reader.py.
"""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

from beam_envelope.errors import AlreadyEncryptedError, FormatError, KeyFileMissingError, NotEncryptedError
from beam_envelope.formats.keyfile import (
    DERIVED_CIPHERS,
    MAX_KEY_FILE_BYTES,
    PARQUET_CIPHER,
    SHARD_CIPHER,
    KeyFile,
    is_internal,
    key_file_name,
)
from beam_envelope.formats.output import LocalOutput, Output, StreamOutput, write_atomically
from beam_envelope.formats.shard_layout import CHUNK_BYTES, HEADER_BYTES
from beam_envelope.formats.shard_reader import RawCompressedReader, RawShardReader
from beam_envelope.formats.shard_writer import ShardWriter
from beam_envelope.keys import cache
from beam_envelope.keys.context import AnyContext, checked_context, match_context
from beam_envelope.keys.uri import Key, open_keys

_SEE: Final = {
    PARQUET_CIPHER: "Open it with open_parquet or ReadEncryptedParquet",
    **dict.fromkeys(DERIVED_CIPHERS, "Open records with DecryptRecords, DecryptFields or DecryptColumns"),
}

KeyFileSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO"


def create_shard(
    destination: str | os.PathLike[str] | BinaryIO,
    *,
    key: Key | Sequence[Key],
    context: Mapping[str, str] | None = None,
    compression: str = "none",
    key_file: str | os.PathLike[str] | BinaryIO | None = None,
    overwrite: bool = False,
) -> ShardWriter:
    """Open a new shard for writing.

    Args:
        destination: a local path, or a binary stream open for writing (which stays open).
        key: the KMS key, as URI or provider, or several: any one of them opens the shard.
        context: the encryption context, which a reader has to give again. Nothing secret.
        compression: `none` or `zstd`.
        key_file: where the key file goes. Needed with a stream; with a path it goes beside the shard.
        overwrite: replace a shard that exists.

    Returns:
        A binary file. Use it in a `with` block: an exception in the block leaves no shard.

    Raises:
        FileExistsError: the path exists, and `overwrite` is off.
        KeyAccessError, KmsUnavailableError: from the KMS.
        ValueError, TypeError, FormatError: an argument is not of the right form.

    Example:
        >>> with create_shard("out/a.bin", key="local-kms://keyring.json", context={"dataset": "a"}) as f:
        ...     f.write(b"data")
    """
    keys = open_keys(key, lists=False)
    pairs = checked_context(context)
    if isinstance(destination, (str, os.PathLike)):
        if key_file is not None:
            msg = "key_file goes with a stream; the key file of a path has a fixed name beside it"
            raise ValueError(msg)
        if is_internal(Path(destination).name):
            raise ValueError(
                f"{destination} is a name that key files, manifests and unfinished files have; choose another"
            )
        output: Output = LocalOutput(_local_path(destination, "create_shard"), overwrite=overwrite)
        name = Path(destination).name
    else:
        output = StreamOutput(destination, key_file_writer(key_file))
        name = ""
    try:
        with cache.generate_data_key(keys, pairs) as data_key:
            return ShardWriter(output, data_key, pairs, compression=compression, name=name)
    except BaseException:
        output.abort()
        raise


def open_shard(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    key: Key | Sequence[Key],
    context: Mapping[str, str] | AnyContext | None = None,
    key_file: KeyFileSource | None = None,
) -> io.BufferedReader:
    """Open a shard for reading.

    Args:
        source: a local path, or a seekable binary stream (which stays open).
        key: the KMS key, as URI or provider, or several, any of which may open it.
        context: the encryption context that it was written with, or `ANY_CONTEXT`.
        key_file: the key file: a path, its bytes or a stream. Needed with a stream; default: the one beside the path.

    Returns:
        A seekable binary file. No byte is returned before its chunk is authenticated, and the end of the file is
        reported only after the last chunk is. Without compression, random access decrypts only the chunks it touches.

    Raises:
        KeyFileMissingError, NotEncryptedError, FormatError: this is no shard, or its key file is missing or broken.
        ContextMismatchError, WrongKeyError, KeyAccessError, KmsUnavailableError: the key or context is not right.
        TruncatedError, TamperedError: (also from reads) the shard or key file was changed.

    Example:
        >>> with open_shard("out/a.bin", key="local-kms://keyring.json", context={"dataset": "a"}) as f:
        ...     f.read()
        b'data'
    """
    keys = open_keys(key)
    if not isinstance(source, (str, os.PathLike)):
        if key_file is None:
            msg = "a stream has no name beside which a key file could be; pass key_file= (a path, bytes or a stream)"
            raise ValueError(msg)
        return open_sealed(source, read_key_file(key_file), keys, context, str(getattr(source, "name", "the shard")))
    path = _local_path(source, "open_shard")
    if is_internal(path.name):
        msg = f"{path} is a key file or an unfinished file, not a shard. Name the shard itself"
        raise NotEncryptedError(msg)
    # Unbuffered: the buffer that matters is the one of decrypted chunks.
    stream = path.open("rb", buffering=0)
    try:
        raw = read_key_file(key_file) if key_file is not None else _sibling_key_file(path, stream)
        return open_sealed(stream, raw, keys, context, str(path), own=True)
    except BaseException:
        stream.close()
        raise


def open_sealed(
    stream: BinaryIO,
    key_file: bytes,
    keys: Sequence[Key],
    context: Mapping[str, str] | AnyContext | None,
    what: str,
    *,
    own: bool = False,
) -> io.BufferedReader:
    """Open a shard in a seekable stream with its key file's bytes: what `open_shard` and the Beam readers share.

    Args:
        stream: the shard's bytes.
        key_file: the key file's bytes.
        keys: the allowed keys.
        context: what the caller expects.
        what: the shard's name for messages.
        own: close the stream with the reader.

    Raises:
        As `open_shard`.
    """
    parsed = KeyFile.from_bytes(key_file, f"the key file of {what}")
    if len(parsed.data_keys) != 1:
        count = len(parsed.data_keys)
        raise FormatError(
            f"the key file of {what} has {count} data keys; that of a shard has one. Is it another format?"
        )
    if parsed.cipher != SHARD_CIPHER:
        raise FormatError(
            f"the key file of {what} is of the cipher {parsed.cipher}, not of a shard. {_SEE[parsed.cipher]}"
        )
    pairs = match_context(context, parsed.context, what)
    (wrapped,) = parsed.data_keys
    with cache.unwrap(open_keys(keys), wrapped.wrapped_keys, pairs, wrapped.key_id, what) as data_key:
        raw = RawShardReader(stream, data_key, parsed.binding(), what, own=own)
    buffered: io.BufferedReader = io.BufferedReader(raw, CHUNK_BYTES)
    return buffered if parsed.compression == "none" else io.BufferedReader(RawCompressedReader(buffered, what))


def refuse_encrypted(name: str, *, has_key_file: bool) -> None:
    """Check that a file to encrypt is not ours already.

    Raises:
        AlreadyEncryptedError: it has a key file beside it, or is a key file or an unfinished file.
    """
    if has_key_file or is_internal(name.rpartition("/")[2]):
        kind = "is encrypted already (a key file lies beside it)" if has_key_file else "is one of our own helper files"
        msg = f"{name} {kind}. Leave it out of the input pattern, or decrypt it first"
        raise AlreadyEncryptedError(msg)


def missing_key_file(what: str, head: bytes) -> Exception:
    """Return the error for a file without key file: `head`, its first bytes, tells plain data from a shard.

    A shard begins with 56 random-looking bytes; text and the well-known binary formats do not.
    """
    name = key_file_name(what.rpartition("/")[2])
    if len(head) < HEADER_BYTES or head.startswith(_MAGICS) or _is_text(head):
        return NotEncryptedError(f"{what} is plain data: it has no key file ({name}) and does not look like a shard")
    return KeyFileMissingError(
        f"there is no key file {name} beside {what}; without it nobody can open the shard. Restore it from a copy"
    )


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the head may end within a character
    except UnicodeDecodeError:
        return False
    return all(character >= " " or character in "\t\n\r" for character in text)


_MAGICS: Final = (
    b"PAR1",
    b"PARE",
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"Obj\x01",
    b"ORC",
    b"\x28\xb5\x2f\xfd",
    b"BZh",
    b"\x89PNG",
    b"%PDF",
)


def _sibling_key_file(path: Path, stream: io.FileIO) -> bytes:
    try:
        return read_key_file(path.with_name(key_file_name(path.name)))
    except KeyFileMissingError:
        raise missing_key_file(str(path), stream.read(HEADER_BYTES) or b"") from None


def read_key_file(source: KeyFileSource) -> bytes:
    """Return a key file's bytes; one more than are allowed if there are more. Raises KeyFileMissingError, OSError."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, (str, os.PathLike)):
        try:
            with Path(source).open("rb") as stream:
                return stream.read(MAX_KEY_FILE_BYTES + 1)
        except FileNotFoundError:
            raise KeyFileMissingError(f"there is no key file at {source}. Restore it from a copy") from None
    return source.read(MAX_KEY_FILE_BYTES + 1)


def key_file_writer(key_file: str | os.PathLike[str] | BinaryIO | None) -> Callable[[bytes], object]:
    """Return what writes the key file of a stream. Raises ValueError: there is no place for it."""
    if key_file is None:
        msg = "a stream has no name beside which a key file could be written; pass key_file= (a path or a stream)"
        raise ValueError(msg)
    if isinstance(key_file, (str, os.PathLike)):
        path = Path(key_file)
        return lambda raw: write_atomically(path, raw)
    return key_file.write


def _local_path(path: str | os.PathLike[str], function: str) -> Path:
    if "://" in os.fspath(path):
        msg = (
            f"{function} takes local paths and open streams, not {os.fspath(path)!r}. Use EncryptFiles or "
            "DecryptFiles, or open a stream yourself and pass key_file= as well"
        )
        raise ValueError(msg)
    return Path(path)
