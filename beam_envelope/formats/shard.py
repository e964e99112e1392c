"""Shards: the bytes of any file as a Cobblestone-256 message. Bytes: docs/format.md, 2.

Cobblestone-256 is C2SP chunked encryption (c2sp.org/chunked-encryption) with SHA-512 and AES-256-GCM: 24 bytes of salt,
32 of key commitment, then chunks of 16 KiB, each with a 16-byte tag, the last always shorter than the others.
"""

from __future__ import annotations

import hmac
import io
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, NoReturn, TypeAlias

from backports.zstd import ZstdCompressor, ZstdFile
from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from beam_envelope.errors import (
    AlreadyEncryptedError,
    FormatError,
    KeyFileMissingError,
    NotEncryptedError,
    TamperedError,
    TruncatedError,
    WrongKeyError,
)
from beam_envelope.formats.keyfile import (
    COMPRESSIONS,
    MAX_KEY_FILE_BYTES,
    KeyFile,
    WrappedDataKey,
    is_internal,
    key_file_name,
)
from beam_envelope.formats.output import Buffer, LocalOutput, Output, StreamOutput, write_atomically
from beam_envelope.keys import cache
from beam_envelope.keys.context import AnyContext, checked_context, match_context
from beam_envelope.keys.provider import DataKey
from beam_envelope.keys.uri import Key, open_keys

CHUNK_BYTES: Final = 16 * 1024
TAG_BYTES: Final = 16
SEALED_CHUNK_BYTES: Final = CHUNK_BYTES + TAG_BYTES
SALT_BYTES: Final = 24
COMMITMENT_BYTES: Final = 32
HEADER_BYTES: Final = SALT_BYTES + COMMITMENT_BYTES
MIN_SHARD_BYTES: Final = HEADER_BYTES + TAG_BYTES

_NONCE_BYTES: Final = 12
_AES_KEY_BYTES: Final = 32
_HKDF_INFO: Final = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\x00"
_BLOCK_BYTES: Final = 16 * CHUNK_BYTES
_LOG: Final = logging.getLogger(__name__)

KeyFileSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO"


def shard_size(plaintext_bytes: int) -> int:
    """Return the size of the shard of that many (compressed) plaintext bytes."""
    return HEADER_BYTES + plaintext_bytes + TAG_BYTES * (plaintext_bytes // CHUNK_BYTES + 1)


def plaintext_size(shard_bytes: int, what: str = "the shard") -> int:
    """Return how many (compressed) plaintext bytes a shard of that size holds. The size alone proves nothing.

    Raises:
        TruncatedError: no shard has that size.
    """
    chunks, rest = divmod(shard_bytes - HEADER_BYTES, SEALED_CHUNK_BYTES)
    if chunks < 0 or rest < TAG_BYTES:
        msg = f"{what} has {shard_bytes} bytes, a size that no whole shard has: it was cut short. Write it again"
        raise TruncatedError(msg)
    return chunks * CHUNK_BYTES + rest - TAG_BYTES


class ShardWriter(io.BufferedIOBase):
    """A binary file, open for writing, whose bytes become a shard. Made by `create_shard`.

    Only an explicit, successful `close` (or the end of a `with` block) finishes the shard. An exception in the block,
    a `close` while an exception is being handled, and garbage collection, also through an `io.TextIOWrapper` or
    `io.BufferedWriter` around it, abort it and leave nothing that a reader takes for a shard.
    """

    mode = "wb"

    def __init__(
        self, output: Output, data_key: DataKey, context: Mapping[str, str], *, compression: str, name: str
    ) -> None:
        """Start the shard; `data_key` may be closed afterwards.

        Raises:
            ValueError: the compression is unknown.
            OSError: from the output.
        """
        if compression not in COMPRESSIONS:
            msg = f"compression is one of {', '.join(COMPRESSIONS)}, not {compression!r}"
            raise ValueError(msg)
        self.name = output.name
        self.plaintext_bytes = 0
        self.ciphertext_bytes = 0
        self._output: Output | None = output
        self._broken = False
        # Two processes that go on with one writer would encrypt different data under one nonce.
        self._pid = os.getpid()
        self._handled_at_start = sys.exc_info()[1]
        self.key_file = KeyFile(
            data_keys=(WrappedDataKey.of(data_key),), context=dict(context), compression=compression, name=name
        )
        self._compressor = ZstdCompressor() if compression == "zstd" else None
        self._encryptor = Cobblestone256Encryptor(data_key.material, self.key_file.binding())
        self._sealed = memoryview(bytearray(shard_size(_BLOCK_BYTES + CHUNK_BYTES)))
        output.begin(self.key_file.to_bytes())

    def writable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return how many bytes were written to this file."""
        return self.plaintext_bytes

    def write(self, data: Buffer) -> int:  # type: ignore[override]  # typeshed's Buffer is not importable on 3.10
        """Encrypt and pass on all of `data`; return its length in bytes.

        Raises:
            ValueError: the file is closed, or an earlier write failed.
            OSError: from the output.
        """
        output = self._open_output()
        with memoryview(data) as view, view.cast("B") as octets:
            # A write that fails midway leaves a gap: writing on, or finishing, would make a shard that never opens.
            self._broken = True
            for start in range(0, len(octets), _BLOCK_BYTES):
                block = octets[start : start + _BLOCK_BYTES]
                self._encrypt(output, block if self._compressor is None else self._compressor.compress(block))
            self._broken = False
            self.plaintext_bytes += len(octets)
            return len(octets)

    def close(self) -> None:
        """Finish the shard: the key file is durable, then the shard is visible.

        Raises:
            OSError: from the output; nothing is left then.
            ValueError: an earlier write failed; nothing is left then.
            EnvelopeError: another writer interfered.
        """
        if self.closed:
            return
        handled = sys.exc_info()[1]
        if handled is not None and handled is not self._handled_at_start:
            _LOG.warning("%s is closed while %s is handled: it is dropped", self.name, type(handled).__name__)
            self.abort()
            return
        try:
            output = self._open_output()
            if self._compressor is not None:
                self._encrypt(output, self._compressor.flush())
            self._pass_on(output, self._encryptor.finalize())
            output.commit()
        except BaseException:
            self.abort()
            raise
        self._output = None
        super().close()

    def abort(self) -> None:
        """Drop the shard and close the file. May be called again."""
        output, self._output = self._output, None
        if output is not None and os.getpid() == self._pid:
            output.abort()
        super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close after success, abort after an exception."""
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        """Abort: io.IOBase would close, and so finish a shard that nobody finished."""
        if getattr(self, "_output", None) is not None:
            self.abort()

    def _dealloc_warn(self, _source: object) -> None:
        """Abort: CPython's TextIOWrapper and BufferedWriter call this, then close, when they are garbage collected."""
        self.abort()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to pickle or copy."""
        msg = "an open shard cannot be pickled or copied"
        raise TypeError(msg)

    def _open_output(self) -> Output:
        if self._output is None:
            msg = f"{self.name} is closed"
            raise ValueError(msg)
        if os.getpid() != self._pid:
            msg = f"{self.name} was opened before a fork; only the process that opened it may go on writing"
            raise ValueError(msg)
        if self._broken:
            msg = f"an earlier write to {self.name} failed, so it is dropped. Write it again from the start"
            raise ValueError(msg)
        return self._output

    def _encrypt(self, output: Output, data: Buffer) -> None:
        for start in range(0, len(data), _BLOCK_BYTES):
            size = self._encryptor.update_into(data[start : start + _BLOCK_BYTES], self._sealed)
            self._pass_on(output, self._sealed[:size])

    def _pass_on(self, output: Output, sealed: Buffer) -> None:
        if sealed:
            output.write(sealed)
            self.ciphertext_bytes += len(sealed)


class _RawShardReader(io.RawIOBase):
    """Reads plaintext at any position, decrypting only the chunks that are touched; a buffer goes on top."""

    mode = "rb"

    def __init__(self, stream: BinaryIO, data_key: DataKey, binding: bytes, what: str, *, own: bool) -> None:
        self.name = what
        self.chunks_decrypted = 0
        self._stream, self._own = stream, own
        size = stream.seek(0, io.SEEK_END)
        self._size = plaintext_size(size, what)
        self._last_chunk = self._size // CHUNK_BYTES
        self._position = 0
        self._end_checked = False
        self._sealed = memoryview(bytearray(_BLOCK_BYTES // CHUNK_BYTES * SEALED_CHUNK_BYTES))
        self._chunk, self._chunk_number, self._chunk_size = memoryview(bytearray(CHUNK_BYTES)), -1, 0

        stream.seek(0)
        self._stream_position = 0
        header = bytes(self._fetch(0, HEADER_BYTES))
        info = _HKDF_INFO + header[:SALT_BYTES] + binding
        size_of_derived = _AES_KEY_BYTES + _NONCE_BYTES + COMMITMENT_BYTES
        derived = HKDFExpand(hashes.SHA512(), size_of_derived, info).derive(data_key.material)
        if not hmac.compare_digest(derived[-COMMITMENT_BYTES:], header[SALT_BYTES:]):
            msg = (
                f"{what} and its key file do not belong together (the key commitment differs): one of them was swapped "
                "or changed after it was written, or the file is no shard. Restore both from one copy"
            )
            raise WrongKeyError(msg)
        self._base_nonce = int.from_bytes(derived[_AES_KEY_BYTES:-COMMITMENT_BYTES], "big")
        self._aead = AESGCM(derived[:_AES_KEY_BYTES])
        # The native decryptor is the fastest way through whole chunks, but only from the first one on, in order.
        self._native = Cobblestone256Decryptor(data_key.material, binding)
        self._native.update(header)
        self._native_chunk = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if self.closed:
            msg = f"{self.name} is closed"
            raise ValueError(msg)
        if whence == io.SEEK_END:
            self._check_end()
        elif whence not in {io.SEEK_SET, io.SEEK_CUR}:
            msg = f"whence is 0, 1 or 2, not {whence}"
            raise ValueError(msg)
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            msg = f"cannot seek to {start + offset}, before the start"
            raise ValueError(msg)
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Buffer) -> int:  # type: ignore[override]  # typeshed's Buffer is not importable on 3.10
        if self.closed:
            msg = f"{self.name} is closed"
            raise ValueError(msg)
        with memoryview(buffer) as view, view.cast("B") as target:
            if not target:
                return 0
            if self._position >= self._size:
                self._check_end()
                return 0
            chunk, skip = divmod(self._position, CHUNK_BYTES)
            whole = min(len(target) // CHUNK_BYTES, self._last_chunk - chunk, _BLOCK_BYTES // CHUNK_BYTES)
            if skip or whole == 0:
                self._load(chunk)
                count = min(len(target), self._chunk_size - skip)
                target[:count] = self._chunk[skip : skip + count]
            else:
                count = whole * CHUNK_BYTES
                self._decrypt_whole(chunk, whole, target[:count])
            self._position += count
            return count

    def readall(self) -> bytes:
        """Read the rest at once; RawIOBase would ask for it in pieces of a few KiB."""
        rest = bytearray(max(self._size - self._position, 0))
        done = 0
        with memoryview(rest) as view:
            while done < len(rest):
                done += self.readinto(view[done:])
        self._check_end()
        return bytes(rest)

    def close(self) -> None:
        if not self.closed and self._own:
            self._stream.close()
        super().close()

    def _check_end(self) -> None:
        """Authenticate the length, by the last chunk, before telling anyone where the end is."""
        if not self._end_checked:
            self._load(self._last_chunk)

    def _load(self, chunk: int) -> None:
        """Decrypt one chunk into the chunk buffer, unless it is there."""
        if chunk == self._chunk_number:
            return
        size = self._size % CHUNK_BYTES if chunk == self._last_chunk else CHUNK_BYTES
        sealed = self._fetch(HEADER_BYTES + chunk * SEALED_CHUNK_BYTES, size + TAG_BYTES)
        self._chunk_number = -1
        try:
            self._aead.decrypt_into(self._nonce(chunk), sealed, None, self._chunk[:size])
        except InvalidTag:
            self._refuse(chunk, chunk)
        self.chunks_decrypted += 1
        self._chunk_number, self._chunk_size = chunk, size
        self._end_checked = self._end_checked or chunk == self._last_chunk

    def _decrypt_whole(self, chunk: int, count: int, target: memoryview) -> None:
        """Decrypt `count` full chunks from `chunk` on into `target`."""
        sealed = self._fetch(HEADER_BYTES + chunk * SEALED_CHUNK_BYTES, count * SEALED_CHUNK_BYTES)
        try:
            if chunk == self._native_chunk:
                self._native_chunk = -1  # a decryptor that has failed is of no more use
                self._native.update_into(sealed, target)
                self._native_chunk = chunk + count
            else:
                for number in range(count):
                    self._aead.decrypt_into(
                        self._nonce(chunk + number),
                        sealed[number * SEALED_CHUNK_BYTES : (number + 1) * SEALED_CHUNK_BYTES],
                        None,
                        target[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES],
                    )
        except InvalidTag:
            target[:] = bytes(len(target))  # what a failed batch left there must not be read
            self._refuse(chunk, chunk + count - 1)
        self.chunks_decrypted += count

    def _fetch(self, start: int, size: int) -> memoryview:
        """Return ciphertext, in a buffer that the next call reuses."""
        if start != self._stream_position:
            self._stream.seek(start)
        target = self._sealed[:size]
        done = 0
        while done < size:
            count = self._stream.readinto(target[done:])  # type: ignore[attr-defined]  # BinaryIO leaves it out
            if not count:
                msg = f"{self.name} became shorter while it was read. Read it again when nobody writes it"
                raise TruncatedError(msg)
            done += count
        self._stream_position = start + size
        return target

    def _nonce(self, chunk: int) -> bytes:
        return (self._base_nonce ^ chunk).to_bytes(_NONCE_BYTES, "big")

    def _refuse(self, first: int, last: int) -> NoReturn:
        where = f"chunk {first}" if first == last else f"one of the chunks {first} to {last}"
        end = " or the file was cut" if last == self._last_chunk else ""
        msg = (
            f"{self.name} was changed after it was written: {where} does not authenticate{end}. Restore it from a copy"
        )
        raise TamperedError(msg) from None


class _CompressedShardReader(ZstdFile):
    """Decompresses a shard; seeking backwards starts again from the front, as gzip.GzipFile does."""

    def __init__(self, shard: io.BufferedReader) -> None:
        super().__init__(shard)
        self._shard = shard

    @property
    def name(self) -> str:
        return str(self._shard.name)

    def close(self) -> None:
        super().close()
        if hasattr(self, "_shard"):
            self._shard.close()


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
    keys = open_keys(key)
    pairs = checked_context(context)
    if isinstance(destination, (str, os.PathLike)):
        if key_file is not None:
            msg = "key_file goes with a stream; the key file of a path has a fixed name beside it"
            raise ValueError(msg)
        output: Output = LocalOutput(_local_path(destination, "create_shard"), overwrite=overwrite)
        name = Path(destination).name
    else:
        output = StreamOutput(destination, _key_file_writer(key_file))
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
) -> io.BufferedIOBase:
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
        return open_sealed(source, _read_key_file(key_file), keys, context, str(getattr(source, "name", "the shard")))
    path = _local_path(source, "open_shard")
    if is_internal(path.name):
        msg = f"{path} is a key file or an unfinished file, not a shard. Name the shard itself"
        raise NotEncryptedError(msg)
    # Unbuffered: the buffer that matters is the one of decrypted chunks.
    stream = path.open("rb", buffering=0)
    try:
        raw = _read_key_file(key_file) if key_file is not None else _sibling_key_file(path, stream)
        return open_sealed(stream, raw, keys, context, str(path), own=True)  # type: ignore[arg-type]  # FileIO is a BinaryIO
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
) -> io.BufferedIOBase:
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
        msg = f"the key file of {what} has {len(parsed.data_keys)} data keys; that of a shard has one. Is it another format?"
        raise FormatError(msg)
    pairs = match_context(context, parsed.context, what)
    (wrapped,) = parsed.data_keys
    with cache.unwrap(open_keys(keys), wrapped.wrapped_keys, pairs, wrapped.key_id, what) as data_key:
        raw = _RawShardReader(stream, data_key, parsed.binding(), what, own=own)
    buffered = io.BufferedReader(raw, CHUNK_BYTES)
    return _CompressedShardReader(buffered) if parsed.compression == "zstd" else buffered


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
    printable = sum(byte in b"\t\n\r" or 32 <= byte != 127 for byte in head)  # noqa: PLR2004  # ASCII, and UTF-8's high bytes
    ascii_bytes = sum(byte < 128 for byte in head)  # noqa: PLR2004  # ASCII
    plain = (
        len(head) < HEADER_BYTES
        or head.startswith(_MAGICS)
        or (printable == len(head) and ascii_bytes > len(head) * 3 // 4)
    )
    name = key_file_name(what.rpartition("/")[2])
    if plain:
        return NotEncryptedError(f"{what} is plain data: it has no key file ({name}) and does not look like a shard")
    return KeyFileMissingError(
        f"there is no key file {name} beside {what}; without it nobody can open the shard. Restore it from a copy"
    )


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
        return _read_key_file(path.with_name(key_file_name(path.name)))
    except FileNotFoundError:
        raise missing_key_file(str(path), stream.read(HEADER_BYTES) or b"") from None


def _read_key_file(source: KeyFileSource) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, (str, os.PathLike)):
        with Path(source).open("rb") as stream:
            return stream.read(MAX_KEY_FILE_BYTES + 1)
    return source.read(MAX_KEY_FILE_BYTES + 1)


def _key_file_writer(key_file: str | os.PathLike[str] | BinaryIO | None):  # noqa: ANN202  # Callable[[bytes], None]
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
            f"{function} takes local paths and open streams, not {os.fspath(path)!r}. Use EncryptFiles or DecryptFiles, "
            "or open a stream yourself and pass key_file= as well"
        )
        raise ValueError(msg)
    return Path(path)
