"""AwsKmsSecret: a key under a KMS key for Beam's own GroupByEncryptedKey."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from typing import Final

from apache_beam.utils.secret import Secret

from beam_envelope.formats.dataset_key import checked_key_name, create_named_key
from beam_envelope.formats.keyfile import FERNET_CIPHER
from beam_envelope.formats.keystore import KeyStore
from beam_envelope.io.keystore import open_key_store
from beam_envelope.keys.uri import Key
from beam_envelope.settings import chosen_keys, written_context

SECRET_NAME: Final = "group-by-encrypted-key"  # noqa: S105  # a name
"""The name of the secret in a key store where none is given."""


class AwsKmsSecret(Secret):
    """A Beam secret that a KMS key protects: `beam.GroupByEncryptedKey(AwsKmsSecret(...))`.

    What is kept is a key file in a key store, made by the first worker that needs it and by one only. What travels is
    this configuration. The key itself is unwrapped through the KMS where it is used, once for each process.

    Beam encrypts with Fernet (AES-128 in CBC mode, HMAC-SHA256) and finds equal keys by an HMAC: who sees what is
    grouped learns which keys are equal.

    Args:
        key: the KMS key, as URI or provider, or several: any one of them opens the secret. In spite of this class's
            name it may be of any KMS.
        keys: the key store: a folder on a local disk or S3; on another store the secret has to exist already.
        context: the encryption context. Nothing secret.
        name: the secret's name in the key store. Two secrets share no key.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form.

    Example:
        >>> secret = AwsKmsSecret(key="aws-kms://alias/etl", keys="s3://sealed/keys/")
        >>> pairs | beam.GroupByEncryptedKey(secret)
    """

    def __init__(
        self,
        *,
        key: Key | Sequence[Key] | None = None,
        keys: str | os.PathLike[str] | KeyStore,
        context: Mapping[str, str] | None = None,
        name: str = SECRET_NAME,
    ) -> None:
        """Check the arguments; nothing is called yet."""
        super().__init__()
        self._keys, self._store = chosen_keys(key, lists=False), open_key_store(keys)
        self._context, self._name = tuple(written_context(context).items()), checked_key_name(name)

    def get_secret_bytes(self) -> bytes:
        """Return 32 bytes in URL-safe base64: what `cryptography.fernet.Fernet` takes.

        Raises:
            ContextMismatchError, WrongKeyError, KeyAccessError, KmsUnavailableError: the secret is for another context
                or key, or the KMS does not answer.
            FormatError, TamperedError: what is there is no secret, or was changed.
            OSError: from the store, or it cannot create a file only once.
        """
        key, _ = create_named_key(self._keys, self._store, dict(self._context), self._name, FERNET_CIPHER)
        return base64.urlsafe_b64encode(key.raw_key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AwsKmsSecret) and self._settings() == other._settings()

    def __hash__(self) -> int:
        return hash(self._settings())

    def __repr__(self) -> str:
        return f"AwsKmsSecret(key={', '.join(map(str, self._keys))}, keys={self._store.place}, name={self._name})"

    def _settings(self) -> tuple[object, ...]:
        return self._keys, self._store, self._context, self._name
