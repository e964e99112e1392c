"""Deterministic encryption under a dataset key: equal values stay equal, for joins and grouping. docs/format.md, 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from beam_envelope.errors import FormatError
from beam_envelope.formats.keyfile import DETERMINISTIC_CIPHER, KeyFile, key_file_name
from beam_envelope.formats.keystore import KeyStore
from beam_envelope.formats.record import RecordDecryptor, load_record_key, refuse_envelope
from beam_envelope.formats.record_key import RecordKey, new_record_key
from beam_envelope.keys import cache
from beam_envelope.keys.provider import KEY_ID_BYTES, KeyProvider

DATASET_KEY: Final = "dataset"
"""The name of a key store's dataset key where none is given."""


class DeterministicEncryptor:
    """Encrypts equal records at equal places to equal envelopes, under the one dataset key of a key store.

    AES-SIV (RFC 5297). Whoever sees the envelopes learns which are equal, and how often each occurs; docs/security.md.

    Args:
        keys: the KMS keys.
        store: where the dataset key is; it is made there if there is none, once, also if several jobs race.
        context: the encryption context.
        name: the dataset key's name.
    """

    def __init__(
        self, keys: Sequence[KeyProvider], store: KeyStore, context: Mapping[str, str], name: str = DATASET_KEY
    ) -> None:
        """Make no call yet."""
        self._keys, self._store, self._context, self._name = tuple(keys), store, dict(context), name
        self._decryptor = RecordDecryptor(keys, store, context)
        self._key_id: bytes | None = None

    def encrypt(self, plaintext: bytes, place: bytes = b"\x00") -> bytes:
        """Return the envelope of one record. Arguments and exceptions as those of `RecordEncryptor.encrypt`."""
        refuse_envelope(plaintext)
        key = self.key()
        return key.prefix + key.siv.encrypt(plaintext, [key.aad + place])

    def key(self) -> RecordKey:
        """Return the dataset key, for whole columns. Raises as `encrypt`."""
        if self._key_id is None:
            self._key_id = create_dataset_key(self._keys, self._store, self._context, self._name)
        return self._decryptor.key(self._key_id, DETERMINISTIC_CIPHER)

    def close(self) -> None:
        """Drop the key."""
        self._decryptor.close()


def create_dataset_key(
    keys: Sequence[KeyProvider], store: KeyStore, context: Mapping[str, str], name: str = DATASET_KEY
) -> bytes:
    """Make a dataset key in a key store, or find the one that is there.

    It lies there twice: under its name, created by one writer only, and under its key id, where readers look.

    Returns:
        Its key id.

    Raises:
        ContextMismatchError, WrongKeyError, KeyAccessError, KmsUnavailableError: it is there for another context or
            key, or the KMS does not answer.
        FormatError, TamperedError: what is there is no dataset key, or was changed.
        OSError: from the store, or it cannot create a file only once.
    """
    raw = store.get(name)
    if raw is None:
        with cache.generate_data_key(keys, context) as data_key:
            _, key_file = new_record_key(data_key, context, DETERMINISTIC_CIPHER, name)
        raw = store.create_once(name, key_file.to_bytes())
    what = f"the dataset key {key_file_name(name)} in {store.place}"
    derivation = KeyFile.from_bytes(raw, what).derivation
    if derivation is None:
        raise FormatError(f"{what} is no dataset key: choose another name with dataset_key=")
    key_id = derivation.commitment[:KEY_ID_BYTES]
    load_record_key(raw, keys, context, (key_id, DETERMINISTIC_CIPHER), what)
    if store.get(key_id.hex()) is None:
        store.put(key_id.hex(), raw)
    return key_id
