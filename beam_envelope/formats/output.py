"""Where a file's bytes go, and how it becomes visible: whole, after an explicit commit, or not at all.

A shard's key file is durable before the first byte of the shard is visible.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, Protocol, TypeAlias

from beam_envelope.errors import EnvelopeError
from beam_envelope.formats.keyfile import TEMPORARY_PREFIX, key_file_name

Buffer: TypeAlias = "bytes | bytearray | memoryview"

_MAX_NAME_BYTES: Final = 255
_NO_LINKS: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV})


class Output(Protocol):
    """A file in the making. Garbage collection never commits it."""

    name: str

    def begin(self, key_file: bytes) -> None:
        """Take the key file of the shard to come; called once, before the first `write`. Plain files have none."""

    def write(self, data: Buffer) -> None:
        """Take all of `data`. Raises OSError."""

    def commit(self) -> None:
        """Make the key file, then the file, durable and visible under their final names.

        Raises:
            FileExistsError: the file exists and may not be overwritten.
            OSError: from the disk or store.
            EnvelopeError: another writer replaced the key file meanwhile.
        """

    def abort(self) -> None:
        """Drop everything; also after a failed `commit`. May be called again."""


class LocalOutput:
    """A file on a local disk: written under a temporary name beside its own, then renamed.

    Args:
        path: the final path; folders are made.
        overwrite: replace what is there. The old file goes just before the new key file comes, so that at no time a
            shard stands beside the key file of another.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Make the temporary file.

        Raises:
            FileExistsError: the path exists and `overwrite` is off.
            OSError: the folder cannot be written, or the name is too long for its key file.
        """
        self._path = Path(path)
        self.name = str(self._path)
        self._overwrite = overwrite
        self._key_file: bytes | None = None
        self._handle = -1
        if len(os.fsencode(key_file_name(self._path.name))) > _MAX_NAME_BYTES:
            msg = "the name is too long: with its key file's prefix it passes 255 bytes"
            raise OSError(errno.ENAMETOOLONG, msg, self.name)
        self._refuse_existing()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._path.with_name(TEMPORARY_PREFIX + uuid.uuid4().hex)
        self._temporary_key_file = self._path.with_name(TEMPORARY_PREFIX + uuid.uuid4().hex)
        self._handle = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CLOEXEC, 0o666)

    def begin(self, key_file: bytes) -> None:
        """Keep the key file for `commit`."""
        self._key_file = key_file

    def write(self, data: Buffer) -> None:
        """Write all of `data` to the temporary file."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._handle, view) :]

    def commit(self) -> None:
        """Flush both files to the disk, rename the key file, then the file. Each step is durable before the next."""
        os.fsync(self._handle)
        self._close()
        if self._key_file is not None:
            write_durably(self._temporary_key_file, self._key_file)
        key_path = self._path.with_name(key_file_name(self._path.name))
        # Without the lock a second writer could replace the first one's key file just before it fails to take the name.
        with alone_in(self._path.parent):
            self._refuse_existing()
            if self._key_file is not None:
                if self._overwrite:
                    self._path.unlink(missing_ok=True)
                self._temporary_key_file.replace(key_path)
                sync_directory(self._path.parent)
            _publish(self._temporary, self._path, overwrite=self._overwrite)
            if self._key_file is not None:
                check_key_file(key_path.read_bytes(), self._key_file, self.name)
        sync_directory(self._path.parent)

    def abort(self) -> None:
        """Remove the temporary files."""
        self._close()
        for temporary in (self._temporary, self._temporary_key_file):
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _refuse_existing(self) -> None:
        if not self._overwrite and self._path.exists():
            raise FileExistsError(errno.EEXIST, "the output exists; choose to skip or overwrite it", self.name)


class StreamOutput:
    """An open binary stream of the caller's, who also keeps the key file.

    A stream's bytes may be seen at once, so the key file goes out before them. The stream is never closed here.
    """

    def __init__(self, stream: BinaryIO, write_key_file: Callable[[bytes], object]) -> None:
        """Write nothing yet."""
        self.name = str(getattr(stream, "name", "a stream"))
        self._stream = stream
        self._write_key_file = write_key_file

    def begin(self, key_file: bytes) -> None:
        """Write the key file."""
        self._write_key_file(key_file)

    def write(self, data: Buffer) -> None:
        """Write all of `data`, also to a raw stream that takes a part."""
        view = memoryview(data)
        while view:
            count = self._stream.write(view)
            if count is None and isinstance(self._stream, io.RawIOBase):
                msg = "the stream does not wait, and takes no more at the moment; pass one that waits"
                raise BlockingIOError(errno.EAGAIN, msg, 0)
            view = view[len(view) if count is None else count :]  # file-like objects that return nothing take all

    def commit(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def abort(self) -> None:
        """Leave the stream as it is: without its last chunk, no reader takes it for a shard."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that readers see the old or the new one whole, also after a power cut. Raises OSError."""
    temporary = path.with_name(TEMPORARY_PREFIX + uuid.uuid4().hex)
    try:
        write_durably(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def check_key_file(found: bytes, ours: bytes, name: str) -> None:
    """Compare a key file, read back after its shard became visible, with what was written.

    Raises:
        EnvelopeError: they differ: two writers made the same shard, and the last of them must see it.
    """
    if found != ours:
        msg = (
            f"another writer replaced the key file of {name} while it was written, so the two do not belong together. "
            "Let one job at a time write to a folder, and run this one again with overwrite"
        )
        raise EnvelopeError(msg)


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk. Raises OSError."""
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other writers on this machine waiting, for the moment of a commit; a disk that has no locks goes without."""
    try:
        import fcntl  # noqa: PLC0415  # POSIX only
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough if a child was forked meanwhile
        os.close(handle)


def _publish(temporary: Path, path: Path, *, overwrite: bool) -> None:
    """Rename; without `overwrite` by link and unlink, which fails if the name was taken meanwhile."""
    if overwrite:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        temporary.rename(path)  # a disk without hard links: the check just before has to do
    else:
        temporary.unlink()


def sync_directory(path: Path) -> None:
    """Flush a folder's names to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EBADF}:  # a file system that cannot
            raise
    finally:
        os.close(handle)


_CLOEXEC: Final = getattr(os, "O_CLOEXEC", 0)
