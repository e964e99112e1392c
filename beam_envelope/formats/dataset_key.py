"""Named keys of a key store, made once: dataset keys for deterministic encryption, and those of other software.

Under a dataset key equal values stay equal, for joins and grouping. Bytes: docs/format.md, 7.
"""

from __future__ import annotations

import re
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
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_KEY_ID: Final = re.compile(r"[0-9a-f]{32}")


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
        """Make no call yet. Raises ValueError: see `checked_key_name`."""
        self._keys, self._store, self._context = tuple(keys), store, dict(context)
        self._name = checked_key_name(name)
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
    keys: Sequence[KeyProvider],
    store: KeyStore,
    context: Mapping[str, str],
    name: str = DATASET_KEY,
    *,
    alone: bool = False,
) -> bytes:
    """Make a dataset key in a key store, or find the one that is there.

    It lies there twice: under its name, created by one writer only, and under its key id, where readers look.

    Args:
        keys: the KMS keys.
        store: the key store.
        context: the encryption context.
        name: the dataset key's name.
        alone: the caller sees to it that nobody else makes this key at the same time; for stores that cannot.

    Returns:
        Its key id.

    Raises:
        As `create_named_key`; OSError: from the store, too.
    """
    key, raw = create_named_key(keys, store, context, name, DETERMINISTIC_CIPHER, alone=alone)
    if store.get(key.key_id.hex()) is None:
        store.put(key.key_id.hex(), raw)
    return key.key_id


def create_named_key(
    keys: Sequence[KeyProvider],
    store: KeyStore,
    context: Mapping[str, str],
    name: str,
    cipher: str,
    *,
    alone: bool = False,
) -> tuple[RecordKey, bytes]:
    """Make a key of a name and cipher in a key store, or open the one that is there. Arguments as `create_dataset_key`.

    Returns:
        The key and its key file.

    Raises:
        ValueError: the name is not one.
        ContextMismatchError, WrongKeyError, KeyAccessError, KmsUnavailableError: it is there for another context or
            key, or the KMS does not answer.
        FormatError, TamperedError: what is there is no such key, or was changed.
        OSError: from the store, or it cannot create a file only once.
    """
    raw = store.get(checked_key_name(name))
    if raw is None:
        with cache.generate_data_key(keys, context) as data_key:
            _, key_file = new_record_key(data_key, context, cipher, name)
        raw = key_file.to_bytes()
        if alone:
            store.put(name, raw)
        else:
            raw = store.create_once(name, raw)
    what = f"the key {key_file_name(name)} in {store.place}"
    found = KeyFile.from_bytes(raw, what)
    if found.derivation is None or found.cipher != cipher or found.name != name:
        raise FormatError(f"{what} is of the cipher {found.cipher} and named {found.name!r}: choose another name")
    key_id = found.derivation.commitment[:KEY_ID_BYTES]
    return load_record_key(raw, keys, context, (key_id, cipher), what), raw


def checked_key_name(name: str) -> str:
    """Return the name of a key in a key store.

    Raises:
        ValueError: it is not of the form of one, or looks like a key id.
    """
    if not _NAME.fullmatch(name) or _KEY_ID.fullmatch(name):
        msg = (
            f"the name of a key in a key store is up to 100 letters, digits, '-', '_' and '.', and no key id, "
            f"not {name!r}"
        )
        raise ValueError(msg)
    return name
