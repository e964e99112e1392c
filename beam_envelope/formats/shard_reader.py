"""The reading side of a shard: seekable, and decrypting only what is touched. Bytes: docs/format.md, 2."""

from __future__ import annotations

import hmac
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Final, NoReturn

from backports.zstd import ZstdError, ZstdFile
from cryptography.cobblestone import Cobblestone256Decryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from beam_envelope.errors import FormatError, TamperedError, TruncatedError, WrongKeyError
from beam_envelope.formats.output import Buffer
from beam_envelope.formats.shard_layout import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    COMMITMENT_BYTES,
    HEADER_BYTES,
    SALT_BYTES,
    SEALED_CHUNK_BYTES,
    TAG_BYTES,
    plaintext_size,
)
from beam_envelope.keys.provider import DataKey

_NONCE_BYTES: Final = 12
_AES_KEY_BYTES: Final = 32
_HKDF_INFO: Final = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\x00"


class RawShardReader(io.RawIOBase):
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
        self._sealed = memoryview(bytearray(BLOCK_BYTES // CHUNK_BYTES * SEALED_CHUNK_BYTES))
        self._chunk, self._chunk_number, self._chunk_size = memoryview(bytearray(CHUNK_BYTES)), -1, 0

        stream.seek(0)
        self._stream_position = 0
        with self._fetch(0, HEADER_BYTES) as view:
            header = bytes(view)
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
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in the plaintext."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position in the plaintext; from the end, after authenticating where that is."""
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
        """Read into a buffer; return how many bytes, 0 at the end. Raises TamperedError, TruncatedError."""
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
            whole = min(len(target) // CHUNK_BYTES, self._last_chunk - chunk, BLOCK_BYTES // CHUNK_BYTES)
            if skip or whole == 0:
                self._load(chunk)
                count = min(len(target), self._chunk_size - skip)
                target[:count] = self._chunk[skip : skip + count]
            else:
                count = whole * CHUNK_BYTES
                self._decrypt_whole(chunk, whole, target[:count])
            self._position += count
            if self._position == self._size:
                self._check_end()  # who reads just as many bytes as there are never asks for what comes after
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
        """Close the stream too, if it is ours."""
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
        self._chunk_number = -1
        try:
            with self._fetch(HEADER_BYTES + chunk * SEALED_CHUNK_BYTES, size + TAG_BYTES) as sealed:
                self._aead.decrypt_into(self._nonce(chunk), sealed, None, self._chunk[:size])
        except InvalidTag:
            self._refuse(chunk, chunk)
        self.chunks_decrypted += 1
        self._chunk_number, self._chunk_size = chunk, size
        self._end_checked = self._end_checked or chunk == self._last_chunk

    def _decrypt_whole(self, chunk: int, count: int, target: memoryview) -> None:
        """Decrypt `count` full chunks from `chunk` on into `target`."""
        try:
            with self._fetch(HEADER_BYTES + chunk * SEALED_CHUNK_BYTES, count * SEALED_CHUNK_BYTES) as sealed:
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
        """Return ciphertext, in a buffer that the next call reuses, or in the stream's own if it is in memory.

        Callers release it: a BytesIO cannot be closed or written while its buffer is held, be it by a traceback.
        """
        if type(self._stream) is io.BytesIO:
            held = self._stream.getbuffer()[start : start + size]
            if len(held) == size:
                return held
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


class RawCompressedReader(io.RawIOBase):
    """Decompresses a shard; seeking backwards starts again from the front, as gzip.GzipFile does."""

    mode = "rb"

    def __init__(self, shard: io.BufferedReader, what: str) -> None:
        self.name: str = what
        self._shard = shard
        self._file = ZstdFile(shard)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in the plaintext."""
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position in the plaintext; from the end, this decompresses all."""
        with self._named_errors():
            return self._file.seek(offset, whence)

    def readinto(self, buffer: Buffer) -> int:  # type: ignore[override]  # typeshed's Buffer is not importable on 3.10
        """Read into a buffer; return how many bytes, 0 at the end."""
        with self._named_errors():
            return self._file.readinto(buffer)

    def readall(self) -> bytes:
        """Read the rest."""
        with self._named_errors():
            return self._file.read()

    def close(self) -> None:
        """Close the shard too."""
        if not self.closed:
            self._file.close()
            self._shard.close()
        super().close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """The bytes are authentic, so what is no zstd in them is the writer's doing."""
        try:
            yield
        except (ZstdError, EOFError) as error:
            msg = f"{self.name} says that it is compressed by zstd, but holds something else: {error}. Write it again"
            raise FormatError(msg) from None
