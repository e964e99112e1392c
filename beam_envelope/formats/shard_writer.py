"""The writing side of a shard. Bytes: docs/format.md, 2."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Final, NoReturn

from backports.zstd import ZstdCompressor
from cryptography.cobblestone import Cobblestone256Encryptor

from beam_envelope.formats.keyfile import COMPRESSIONS, KeyFile, WrappedDataKey
from beam_envelope.formats.output import Buffer, Output
from beam_envelope.formats.shard_layout import BLOCK_BYTES, CHUNK_BYTES, shard_size
from beam_envelope.keys.provider import DataKey

_SMALL_BYTES: Final = 4096
_GATHER_BYTES: Final = 4 * CHUNK_BYTES
_LOG: Final = logging.getLogger(__name__)


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
        self._written = 0
        self.ciphertext_bytes = 0
        self._output: Output | None = output
        self._broken = False
        self._small = bytearray()
        # Two processes that go on with one writer would encrypt different data under one nonce.
        self._pid = os.getpid()
        self._handled_at_start = sys.exc_info()[1]
        self.key_file = KeyFile(
            data_keys=(WrappedDataKey.of(data_key),), context=dict(context), compression=compression, name=name
        )
        self._compressor = ZstdCompressor() if compression == "zstd" else None
        self._encryptor = Cobblestone256Encryptor(data_key.material, self.key_file.binding())
        self._sealed = memoryview(bytearray(shard_size(BLOCK_BYTES + CHUNK_BYTES)))
        output.begin(self.key_file.to_bytes())

    @property
    def plaintext_bytes(self) -> int:
        """How many bytes were written to this file."""
        return self._written + len(self._small)

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
        output = self._output
        if output is None or self._broken:
            self._refuse()
        if type(data) is bytes and len(data) <= _SMALL_BYTES:
            # Lines and the like: gathering them costs a tenth of what a call to the cipher for each would.
            small = self._small
            small += data
            if len(small) >= _GATHER_BYTES:
                self._write_small(output)
            return len(data)
        self._write_small(output)
        with memoryview(data) as view, view.cast("B") as octets:
            self._write_blocks(output, octets)
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
            output = self._output
            if output is None or self._broken or os.getpid() != self._pid:
                self._refuse()
            self._write_small(output)
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

    def _refuse(self) -> NoReturn:
        if self._output is None:
            msg = f"{self.name} is closed"
            raise ValueError(msg)
        if os.getpid() != self._pid:
            msg = f"{self.name} was opened before a fork; only the process that opened it may go on writing"
            raise ValueError(msg)
        msg = f"an earlier write to {self.name} failed, so it is dropped. Write it again from the start"
        raise ValueError(msg)

    def _write_small(self, output: Output) -> None:
        """Pass on what small writes have gathered."""
        if self._small:
            small, self._small = self._small, bytearray()
            with memoryview(small) as octets:
                self._write_blocks(output, octets)

    def _write_blocks(self, output: Output, octets: memoryview) -> None:
        if os.getpid() != self._pid:
            self._refuse()
        # A write that fails midway leaves a gap: writing on, or finishing, would make a shard that never opens.
        self._broken = True
        for start in range(0, len(octets), BLOCK_BYTES):
            block = octets[start : start + BLOCK_BYTES]
            self._encrypt(output, block if self._compressor is None else self._compressor.compress(block))
        self._broken = False
        self._written += len(octets)

    def _encrypt(self, output: Output, data: Buffer) -> None:
        for start in range(0, len(data), BLOCK_BYTES):
            size = self._encryptor.update_into(data[start : start + BLOCK_BYTES], self._sealed)
            self._pass_on(output, self._sealed[:size])

    def _pass_on(self, output: Output, sealed: Buffer) -> None:
        if sealed:
            output.write(sealed)
            self.ciphertext_bytes += len(sealed)
