"""The key store: a folder of key files, one for each key that encrypts records. docs/format.md, 7.

Here is what every key store does, and the one on a local disk; stores elsewhere are in io/keystore.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path
from typing import Final, Protocol

from beam_envelope.formats.keyfile import MAX_KEY_FILE_BYTES, TEMPORARY_PREFIX, key_file_name
from beam_envelope.formats.output import write_atomically, write_durably

_NO_LINKS: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV})


class KeyStore(Protocol):
    """Key files by name: the hexadecimal key id of a key, or the name of a dataset key.

    Key stores are hashable and equal by place, and pickle cleanly.
    """

    @property
    def place(self) -> str:
        """The folder, for messages."""

    def put(self, name: str, key_file: bytes) -> None:
        """Write a key file; it is durable when this returns. Raises OSError."""

    def get(self, name: str) -> bytes | None:
        """Return a key file, or None where there is none. Raises OSError."""

    def create_once(self, name: str, key_file: bytes) -> bytes:
        """Write a key file unless there is one, and return what is there then: of two who race, both get the same.

        Raises:
            OSError: from the disk or store, or the store cannot do this.
        """


class LocalKeyStore:
    """A key store in a folder on a local disk, which is made when it is needed."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Touch nothing yet."""
        self._folder = Path(os.path.abspath(folder))

    @property
    def place(self) -> str:
        """The folder."""
        return str(self._folder)

    def put(self, name: str, key_file: bytes) -> None:
        """Write under a temporary name, flush to the disk, rename."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(name), key_file)

    def get(self, name: str) -> bytes | None:
        """Read the file."""
        try:
            with self._path(name).open("rb") as stream:
                return stream.read(MAX_KEY_FILE_BYTES + 1)
        except FileNotFoundError:
            return None

    def create_once(self, name: str, key_file: bytes) -> bytes:
        """Link a finished temporary file to the name, which fails if the name is taken."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        temporary = self._folder / (TEMPORARY_PREFIX + uuid.uuid4().hex)
        try:
            write_durably(temporary, key_file)
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        except OSError as error:
            if error.errno in _NO_LINKS:
                msg = "this disk has no hard links, so no file on it is created by one of two jobs only"
                raise OSError(error.errno, msg, str(path)) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return path.read_bytes()

    def _path(self, name: str) -> Path:
        return self._folder / key_file_name(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalKeyStore) and self._folder == other._folder

    def __hash__(self) -> int:
        return hash(self._folder)

    def __repr__(self) -> str:
        return f"LocalKeyStore({self.place!r})"
