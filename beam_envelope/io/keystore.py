"""Key stores on any Beam filesystem: `open_key_store("s3://bucket/keys/")`."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from beam_envelope.formats.keyfile import MAX_KEY_FILE_BYTES, key_file_name
from beam_envelope.formats.keystore import KeyStore, LocalKeyStore

if TYPE_CHECKING:
    from beam_envelope.io.store import Store


def open_key_store(keys: str | os.PathLike[str] | KeyStore) -> KeyStore:
    """Return the key store in a folder, local or of any Beam filesystem; nothing is read or written yet.

    Raises:
        TypeError: `keys` is no folder and no key store.
        ValueError: it is empty, or a pattern.

    Example:
        >>> open_key_store("s3://sealed/keys/").place
        's3://sealed/keys/'
    """
    if isinstance(keys, (str, os.PathLike)):
        folder = os.fspath(keys)
        if not folder or "*" in folder:
            msg = f"keys= is one folder for key files, such as s3://bucket/keys/, not {folder!r}"
            raise ValueError(msg)
        return RemoteKeyStore(folder) if "://" in folder else LocalKeyStore(folder)
    if not all(hasattr(keys, name) for name in ("put", "get", "create_once", "place")):
        msg = f"keys= is a folder or a KeyStore, not a {type(keys).__name__}"
        raise TypeError(msg)
    return keys


class RemoteKeyStore:
    """A key store in a folder of S3 or another Beam filesystem."""

    def __init__(self, folder: str) -> None:
        """Make no request yet."""
        self._folder = folder.rstrip("/") + "/"

    @property
    def place(self) -> str:
        """The folder."""
        return self._folder

    def put(self, name: str, key_file: bytes) -> None:
        """Write it as one small file, visible when it is whole."""
        self._write(name, key_file, overwrite=True)

    def get(self, name: str) -> bytes | None:
        """Read it."""
        try:
            with self._store().open(self._path(name)) as stream:
                return stream.read(MAX_KEY_FILE_BYTES + 1)
        except FileNotFoundError:
            return None

    def create_once(self, name: str, key_file: bytes) -> bytes:
        """Write it by a conditional request, as S3 has it; other stores have none, and refuse.

        Raises:
            OSError: the store has no such request, and there is no file yet.
        """
        found = self.get(name)
        if found is not None:
            return found
        if not self._folder.startswith("s3://"):
            msg = (
                "this store cannot create a file once where two jobs race. Create the dataset key beforehand, in one "
                "place, with create_dataset_key"
            )
            raise OSError(errno.ENOTSUP, msg, self._path(name))
        with contextlib.suppress(FileExistsError):
            self._write(name, key_file, overwrite=False)
        found = self.get(name)
        if found is None:
            raise OSError(errno.EIO, "the key file went away while it was created", self._path(name))
        return found

    def _write(self, name: str, key_file: bytes, *, overwrite: bool) -> None:
        output = self._store().create(self._path(name), overwrite=overwrite, size_hint=len(key_file))
        try:
            output.write(key_file)
            output.commit()
        except BaseException:
            output.abort()
            raise

    def _path(self, name: str) -> str:
        return self._folder + key_file_name(name)

    def _store(self) -> Store:
        from beam_envelope.io.store import store_of  # noqa: PLC0415  # it imports Beam, which a local store does not need

        return store_of(self._folder)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteKeyStore) and self._folder == other._folder

    def __hash__(self) -> int:
        return hash(self._folder)

    def __repr__(self) -> str:
        return f"RemoteKeyStore({self._folder!r})"
