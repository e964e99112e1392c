"""How a shard gets its name on an fsspec filesystem: whole, after its key file, or not at all."""

from __future__ import annotations

import contextlib
import errno
import uuid
from collections.abc import Callable
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import Any, Final, NoReturn

from fsspec.implementations.local import LocalFileSystem

from beam_envelope.formats.keyfile import TEMPORARY_PREFIX, key_file_name
from beam_envelope.formats.output import Buffer, Output, check_key_file, write_atomically
from beam_envelope.formats.shard_writer import ShardWriter

_COMMITS: Final = frozenset({"s3", "s3a", "gs", "gcs"})  # whose files, with autocommit=False, appear on commit() only


class FsspecOutput:
    """A file of any fsspec filesystem but the local one. See `formats.output.Output`.

    Written under a temporary name and moved, unless the filesystem's own files appear on commit only.
    """

    def __init__(self, fs: Any, path: str, *, overwrite: bool, options: dict[str, Any]) -> None:
        """Open the file.

        Raises:
            FileExistsError: there is one, and `overwrite` is off.
            OSError: from the filesystem.
        """
        self.name = path
        self._fs, self._overwrite = fs, overwrite
        self._key_file = b""
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self._commits = not protocols.isdisjoint(_COMMITS)
        if not self._commits and fs.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "it is a folder", path)
        if not overwrite and fs.exists(path):
            _refuse_existing(path)
        self._temporary = _sibling(path, TEMPORARY_PREFIX + uuid.uuid4().hex)
        if self._commits:
            self._stream = fs.open(path, "wb" if overwrite else "xb", autocommit=False, **options)
        else:
            self._stream = fs.open(self._temporary, "wb", **options)

    def begin(self, key_file: bytes) -> None:
        """Keep the key file for `commit`."""
        self._key_file = key_file

    def write(self, data: Buffer) -> None:
        """Pass `data` on."""
        self._stream.write(bytes(data))  # the writer uses its buffer again, and the stream may keep what it gets

    def commit(self) -> None:
        """Finish the file, then write the key file, then make the file visible."""
        self._stream.close()
        put = self._stream.commit if self._commits else partial(rename, self._fs, self._temporary, self.name)
        publish(self._fs, self.name, self._key_file, put, overwrite=self._overwrite)

    def abort(self) -> None:
        """Drop the file."""
        with contextlib.suppress(Exception):
            if self._commits:
                self._stream.discard()
                self._stream.closed = True  # garbage collection would close it, and fail
            else:
                self._stream.close()
        with contextlib.suppress(Exception):
            if not self._commits:
                self._fs.rm_file(self._temporary)


class _Held:
    """The output of a shard in a transaction: finished by its writer, it waits for the transaction's end."""

    def __init__(self, output: Output) -> None:
        self.name, self.output, self.finished = output.name, output, False
        self.begin, self.write, self.abort = output.begin, output.write, output.abort

    def commit(self) -> None:
        self.finished = True


class HeldWriter(ShardWriter):
    """A shard of a transaction, or opened with `autocommit=False`: visible after `close` and `commit`."""

    def __init__(self, output: Output, *arguments: Any, **options: Any) -> None:
        """Start the shard; as `ShardWriter`."""
        self._held = _Held(output)
        super().__init__(self._held, *arguments, **options)

    def commit(self) -> None:
        """Make the shard visible, unless it was dropped. Raises ValueError, and drops it, if it is still open."""
        if not self.closed:
            self.discard()
            msg = f"{self.name} is still open at the end of its transaction. Close it first"
            raise ValueError(msg)
        if self._held.finished:
            try:
                self._held.output.commit()
            except BaseException:
                self._held.output.abort()
                raise

    def discard(self) -> None:
        """Drop the shard."""
        self.abort()
        self._held.output.abort()


def publish(fs: Any, path: str, key_file: bytes, put: Callable[[], Any], *, overwrite: bool) -> None:
    """Make a shard visible by `put`. At no time may a shard stand beside the key file of another.

    Raises:
        FileExistsError: there is one, and `overwrite` is off.
        EnvelopeError: another writer replaced the key file meanwhile.
    """
    if fs.exists(path):
        if not overwrite:
            _refuse_existing(path)
        fs.rm_file(path)
    key_path = key_file_path(path)
    if isinstance(fs, LocalFileSystem):
        Path(key_path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(key_path), key_file)
    else:
        fs.pipe_file(key_path, key_file, **({} if overwrite else {"mode": "create"}))
    put()
    check_key_file(bytes(fs.cat_file(key_path, end=len(key_file) + 1)), key_file, path)


def rename(fs: Any, source: str, target: str) -> None:
    """Rename a file, where the filesystem can, or copy and remove it."""
    if has_magic(source):  # which `mv` would take for a glob
        fs.cp_file(source, target)
        fs.rm_file(source)
    else:
        fs.mv(source, target)


def name_of(path: str) -> str:
    """Return the last part of a path."""
    return path.rpartition("/")[2]


def _sibling(path: str, name: str) -> str:
    return path.removesuffix(name_of(path)) + name


def key_file_path(path: str) -> str:
    """Return the path of the key file of a shard."""
    return _sibling(path, key_file_name(name_of(path)))


def _refuse_existing(path: str) -> NoReturn:
    raise FileExistsError(errno.EEXIST, "the file exists; choose another name, or write it with mode 'wb'", path)
