"""Key stores on any Beam filesystem: `open_key_store("s3://bucket/keys/")`, and what a program does with one."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from beam_envelope.formats import dataset_key
from beam_envelope.formats.keyfile import MAX_KEY_FILE_BYTES, key_file_name
from beam_envelope.formats.keystore import KeyStore, LocalKeyStore
from beam_envelope.formats.record import RecordDecryptor, RecordEncryptor
from beam_envelope.keys.cache import DataKeyPolicy
from beam_envelope.keys.context import AnyContext, checked_context
from beam_envelope.keys.uri import Key, open_keys

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


def create_records(
    *,
    key: Key | Sequence[Key],
    keys: str | os.PathLike[str] | KeyStore,
    context: Mapping[str, str] | None = None,
    policy: DataKeyPolicy | None = None,
) -> RecordEncryptor:
    """Return what encrypts records one by one, without Beam. It is for one process, and safe between its threads.

    Args:
        key: the KMS key, as URI or provider, or several: any one of them opens the records.
        keys: the key store: a folder.
        context: the encryption context, which a reader has to give again. Nothing secret.
        policy: the limits of one data key.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form.

    Example:
        >>> records = create_records(key="local-kms://keyring.json", keys="keys/", context={"dataset": "orders"})
        >>> envelope = records.encrypt(b"4111111111111111")
    """
    return RecordEncryptor(
        open_keys(key, lists=False), open_key_store(keys), checked_context(context), policy or DataKeyPolicy()
    )


def open_records(
    *,
    key: Key | Sequence[Key],
    keys: str | os.PathLike[str] | KeyStore,
    context: Mapping[str, str] | AnyContext | None = None,
) -> RecordDecryptor:
    """Return what decrypts records one by one, without Beam. It is for one process, and safe between its threads.

    Args:
        key: the KMS key, as URI or provider, or several, any of which may open a record.
        keys: the key store that the writer had.
        context: the encryption context that the records were written with, or `ANY_CONTEXT`.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form.

    Example:
        >>> records = open_records(key="local-kms://keyring.json", keys="keys/", context={"dataset": "orders"})
        >>> records.decrypt(envelope)
        b'4111111111111111'
    """
    expected = context if isinstance(context, AnyContext) else checked_context(context)
    return RecordDecryptor(open_keys(key), open_key_store(keys), expected)


def create_dataset_key(
    *,
    key: Key | Sequence[Key],
    keys: str | os.PathLike[str] | KeyStore,
    context: Mapping[str, str] | None = None,
    name: str = dataset_key.DATASET_KEY,
    alone: bool = False,
) -> str:
    """Make the key of `deterministic=True` in a key store, or find the one that is there.

    The transforms do it themselves, except where a store cannot create a file for one of two writers only.

    Args:
        key: the KMS key, as URI or provider, or several.
        keys: the key store: a folder.
        context: the encryption context.
        name: the dataset key's name: `dataset_key=` of the transforms.
        alone: you see to it that nobody else makes this key at the same time; stores other than local disks and S3
            need that.

    Returns:
        Its key id.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form, or what is there is no such key.
        ContextMismatchError, WrongKeyError, TamperedError, KeyAccessError, KmsUnavailableError: it is there for another
            context or key, was changed, or the KMS does not answer.
        OSError: from the store, or it cannot create a file only once, and `alone` is False.

    Example:
        >>> create_dataset_key(key="aws-kms://alias/etl", keys="gs://sealed/keys/", alone=True)
        'ac2e8f5f8cad64f972a988f611766261'
    """
    store = open_key_store(keys)
    return dataset_key.create_dataset_key(
        open_keys(key, lists=False), store, checked_context(context), name, alone=alone
    ).hex()


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
                "this store cannot create a file once where two jobs race. Make the key beforehand, in one place, with "
                "create_dataset_key(..., alone=True)"
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
