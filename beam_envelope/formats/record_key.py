"""The keys that encrypt records and cells: derived from a data key, committed to in a key file. docs/format.md, 7."""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from typing import Final, NoReturn

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from beam_envelope.errors import FormatError, TamperedError
from beam_envelope.formats.keyfile import (
    COMMITMENT_BYTES,
    DETERMINISTIC_CIPHER,
    FERNET_CIPHER,
    RAW_CELL_CIPHER,
    RECORD_CIPHER,
    SALT_BYTES,
    Derivation,
    KeyFile,
    WrappedDataKey,
)
from beam_envelope.keys.provider import KEY_ID_BYTES, DataKey

NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
PREFIX_BYTES: Final = 1 + KEY_ID_BYTES

# No byte of UTF-8 text is 0xF8 or above (RFC 3629, 3), so an envelope is never taken for text, nor text for one.
RANDOMIZED_SUITE: Final = b"\xf8"
DETERMINISTIC_SUITE: Final = b"\xf9"
CIPHER_OF_SUITE: Final = {RANDOMIZED_SUITE: RECORD_CIPHER, DETERMINISTIC_SUITE: DETERMINISTIC_CIPHER}
SUITE_OF_CIPHER: Final = {cipher: suite for suite, cipher in CIPHER_OF_SUITE.items()}
MIN_BYTES: Final = {
    RANDOMIZED_SUITE: PREFIX_BYTES + NONCE_BYTES + TAG_BYTES,
    DETERMINISTIC_SUITE: PREFIX_BYTES + TAG_BYTES,
}

_LABEL: Final = b"beam-envelope/record@v1\x00"
_KEY_BYTES: Final = {RECORD_CIPHER: 32, DETERMINISTIC_CIPHER: 64, RAW_CELL_CIPHER: 32, FERNET_CIPHER: 32}
_TAKEN_OUT: Final = frozenset({RAW_CELL_CIPHER, FERNET_CIPHER})  # keys that other software needs as bytes


class RecordKey:
    """A derived key, ready to use. It can be neither pickled nor copied, and its `repr` shows only its id.

    Attributes:
        key_id: 16 bytes, the start of the commitment.
        prefix: what each envelope begins with: suite byte and key id. Raw cells and Fernet have none.
        aad: what the additional authenticated data begins with: the prefix too.
        deterministic: whether it has `siv`, the AES-256-SIV cipher, in place of `gcm`, the AES-256-GCM cipher.
        base_nonce: a number of 96 bits; the nonce of record n is this XOR n.
    """

    __slots__ = ("_key", "aad", "base_nonce", "deterministic", "gcm", "key_id", "prefix", "siv")
    gcm: AESGCM
    siv: AESSIV

    def __init__(self, cipher: str, key: bytes, base_nonce: bytes, commitment: bytes) -> None:
        """Take what was derived."""
        self.key_id = commitment[:KEY_ID_BYTES]
        self.aad = self.prefix = SUITE_OF_CIPHER[cipher] + self.key_id if cipher in SUITE_OF_CIPHER else b""
        self.base_nonce = int.from_bytes(base_nonce, "big")
        self.deterministic = cipher == DETERMINISTIC_CIPHER
        if self.deterministic:
            self.siv = AESSIV(key)
        else:
            self.gcm = AESGCM(key)
        self._key = key if cipher in _TAKEN_OUT else b""

    def raw_key(self) -> bytes:
        """Return the 32 bytes of a raw cells' key, for SQL functions and Tink, or of a Fernet key.

        Raises:
            ValueError: it is another kind of key: those never leave this object.
        """
        if not self._key:
            msg = "only the keys of raw cells (layout='raw') and of Fernet can be taken out"
            raise ValueError(msg)
        return self._key

    def __repr__(self) -> str:
        """Show the id."""
        return f"<RecordKey {self.key_id.hex()}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to pickle or copy: two copies would use the same nonces."""
        msg = "a RecordKey cannot be pickled or copied"
        raise TypeError(msg)


def new_record_key(
    data_key: DataKey, context: Mapping[str, str], cipher: str, name: str = ""
) -> tuple[RecordKey, KeyFile]:
    """Derive a fresh key from a data key; a random salt makes it another one each time.

    Args:
        data_key: from a KMS.
        context: the encryption context of the data key.
        cipher: one of `keyfile.DERIVED_CIPHERS`.
        name: the name of a dataset key.

    Returns:
        The key, and the key file that leads to it again.
    """
    salt = os.urandom(SALT_BYTES)
    draft = KeyFile((WrappedDataKey.of(data_key),), context, cipher=cipher, name=name)
    key, base_nonce, commitment = _derive(data_key, salt, draft)
    key_file = KeyFile(
        draft.data_keys, context, draft.shard_id, cipher, name=name, created=draft.created,
        derivation=Derivation(salt, commitment),
    )  # fmt: skip
    return RecordKey(cipher, key, base_nonce, commitment), key_file


def open_record_key(data_key: DataKey, key_file: KeyFile, what: str) -> RecordKey:
    """Derive a key again from its key file.

    Args:
        data_key: the unwrapped data key.
        key_file: of a cipher of `keyfile.DERIVED_CIPHERS`.
        what: the key file, for messages.

    Raises:
        FormatError: it is the key file of something else.
        TamperedError: the key file was changed: the key that comes out is not the one that it commits to.
    """
    if key_file.derivation is None:
        raise FormatError(f"{what} is of the cipher {key_file.cipher}, which is none of records. Give their key store")
    key, base_nonce, commitment = _derive(data_key, key_file.derivation.salt, key_file)
    if not hmac.compare_digest(commitment, key_file.derivation.commitment):
        raise TamperedError(f"{what} was changed after it was written. Restore it from a copy")
    return RecordKey(key_file.cipher, key, base_nonce, commitment)


def _derive(data_key: DataKey, salt: bytes, key_file: KeyFile) -> tuple[bytes, bytes, bytes]:
    """Return key, base nonce and commitment: HKDF-Expand-SHA512 (RFC 5869 2.3), after C2SP chunked encryption."""
    key_bytes = _KEY_BYTES[key_file.cipher]
    info = _LABEL + salt + key_file.binding()
    derived = HKDFExpand(hashes.SHA512(), key_bytes + NONCE_BYTES + COMMITMENT_BYTES, info).derive(data_key.material)
    return (
        derived[:key_bytes],
        derived[key_bytes : key_bytes + NONCE_BYTES],
        derived[key_bytes + NONCE_BYTES :],
    )
