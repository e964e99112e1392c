"""Records and cells: any bytes as a compact envelope that names its key. Bytes: docs/format.md, 7.

Encryptors and decryptors are for one process: they cannot be pickled, and after a fork they start anew.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple, NoReturn

from cryptography.exceptions import InvalidTag

from beam_envelope.errors import (
    AlreadyEncryptedError,
    KeyFileMissingError,
    NotEncryptedError,
    TamperedError,
    TruncatedError,
)
from beam_envelope.formats.keyfile import RAW_CELL_CIPHER, RECORD_CIPHER, KeyFile, key_file_name
from beam_envelope.formats.keystore import KeyStore
from beam_envelope.formats.record_key import (
    CIPHER_OF_SUITE,
    MIN_BYTES,
    NONCE_BYTES,
    PREFIX_BYTES,
    SUITE_OF_CIPHER,
    RecordKey,
    new_record_key,
    open_record_key,
)
from beam_envelope.keys import cache
from beam_envelope.keys.cache import LEASED_BYTES, Allowance, DataKeyPolicy
from beam_envelope.keys.context import AnyContext, match_context
from beam_envelope.keys.provider import KeyProvider

_SUITES: Final = frozenset(CIPHER_OF_SUITE)
# An iterator gives each number once only where the interpreter has its global lock (PEP 703).
_LEASED_RECORDS: Final = 256 if getattr(sys, "_is_gil_enabled", lambda: True)() else 0
_MAX_OPENED: Final = 10_000
_OPENED_TTL_S: Final = 60.0  # then the cache of data keys is asked again, which asks the KMS after its own time
_MISSING_TTL_S: Final = 30.0


def record_place(aad: bytes = b"") -> bytes:
    """Return what binds a record to its place: data of the caller's, such as a message key, that is not secret."""
    return b"\x00" + aad


def cell_place(path: str) -> bytes:
    """Return what binds a cell to its field or column, named by its path."""
    return b"\x01" + path.encode()


class _Lease(NamedTuple):
    """Numbers of a key for records to come, which need no lock; they count against its limits already."""

    key: RecordKey
    numbers: Iterator[int]
    expires: float


class RecordEncryptor:
    """Encrypts records under a key of its own, and takes a new one when the policy says so. Safe between threads.

    The first record makes it call the KMS and write the key file; each later one costs one AES-GCM operation.

    Args:
        keys: the KMS keys; the first generates, and any of them opens.
        store: where the key file goes, before the first envelope is returned.
        context: the encryption context.
        policy: the limits of one key.
        cipher: `record-aes-256-gcm`, or `cell-aes-256-gcm` for raw cells.
    """

    def __init__(
        self,
        keys: Sequence[KeyProvider],
        store: KeyStore,
        context: Mapping[str, str],
        policy: DataKeyPolicy,
        cipher: str = RECORD_CIPHER,
    ) -> None:
        """Make no call yet."""
        self._keys, self._store, self._context = tuple(keys), store, dict(context)
        self._policy, self._cipher = policy, cipher
        self._lock = threading.Lock()
        self._key, self._next = _NO_KEY, 0
        self._left = Allowance(policy)
        self._left.records = 0  # of no key yet
        self._lease = _NO_LEASE
        _forked.add(self)

    def encrypt(self, plaintext: bytes, place: bytes = b"\x00") -> bytes:
        """Return the envelope of one record.

        Args:
            plaintext: the record.
            place: from `record_place` or `cell_place`.

        Raises:
            AlreadyEncryptedError: the record is an envelope that was made in this process.
            KeyAccessError, KmsUnavailableError, OSError: a new key was due, and the KMS or the key store failed.
        """
        if plaintext[:1] in _SUITES:
            refuse_envelope(plaintext)
        lease = self._lease
        number = None
        if len(plaintext) <= LEASED_BYTES and time.monotonic() < lease.expires:
            number = next(
                lease.numbers, None
            )  # each number goes to one thread only: this is one step of the interpreter
        if number is None:
            lease, number = self._take(len(plaintext))
        key = lease.key
        nonce = (key.base_nonce ^ number).to_bytes(NONCE_BYTES, "big")
        return key.prefix + nonce + key.gcm.encrypt(nonce, plaintext, key.aad + place)

    def reserve(self, n_records: int, n_bytes: int) -> tuple[RecordKey, int]:
        """Return a key and the number of the first of `n_records` records to encrypt under it, for whole columns.

        The caller encrypts them with the nonces `base_nonce ^ first`, ... and no others. At most `max_records` of the
        policy are asked for at a time. Raises as `encrypt`.
        """
        if n_records > self._policy.max_records:
            msg = f"{n_records} records do not fit under one key of {self._policy.max_records}"
            raise ValueError(msg)
        with self._lock:
            if not self._left.fits(n_records, n_bytes):
                self._renew()
            self._left.spend(n_records, n_bytes)
            first = self._next
            self._next = first + n_records
            return self._key, first

    def close(self) -> None:
        """Drop the key; the next record takes a new one."""
        with self._lock:
            self._key, self._left.records = _NO_KEY, 0
            self._lease = _NO_LEASE

    def _take(self, n_bytes: int) -> tuple[_Lease, int]:
        """Return the number of one record, and the lease of those that follow it."""
        with self._lock:
            if n_bytes <= LEASED_BYTES and time.monotonic() < self._lease.expires:
                number = next(self._lease.numbers, None)
                if number is not None:  # another thread was here first
                    return self._lease, number
            if not self._left.fits(1, n_bytes):
                self._renew()
            left, first = self._left, self._next
            left.spend(1, n_bytes)
            self._next = first + 1 + (left.lease(_LEASED_RECORDS) if n_bytes <= LEASED_BYTES else 0)
            lease = _Lease(self._key, iter(range(first + 1, self._next)), left.expires)
            if n_bytes <= LEASED_BYTES:
                self._lease = lease
            return lease, first

    def _renew(self) -> None:
        with cache.generate_data_key(self._keys, self._context) as data_key:
            key, key_file = new_record_key(data_key, self._context, self._cipher)
        self._store.put(key.key_id.hex(), key_file.to_bytes())
        _remember_prefix(key.prefix)
        self._key, self._next = key, 0
        self._left = Allowance(self._policy)
        self._lease = _NO_LEASE

    def after_fork(self) -> None:
        """Start anew in a child process: parent and child must not both use a nonce."""
        self._lock = threading.Lock()
        self._left.records = 0
        self._lease = _NO_LEASE

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to pickle or copy: two copies would use the same nonces."""
        msg = f"a {type(self).__name__} cannot be pickled or copied; make one where it is needed"
        raise TypeError(msg)


class RecordDecryptor:
    """Decrypts records and cells of a key store; asks the KMS once for each data key. Safe between threads.

    Args:
        keys: the KMS keys, any of which may open a record.
        store: where the key files are.
        context: the encryption context that the records were written with, or `ANY_CONTEXT`.
    """

    def __init__(
        self, keys: Sequence[KeyProvider], store: KeyStore, context: Mapping[str, str] | AnyContext | None
    ) -> None:
        """Make no call yet."""
        self._keys, self._store, self._context = tuple(keys), store, context
        self._lock = threading.Lock()
        self._opened: dict[bytes, tuple[float, RecordKey]] = {}
        self._missing: dict[bytes, float] = {}
        _forked.add(self)

    def decrypt(self, envelope: bytes, place: bytes = b"\x00") -> bytes:
        """Return the record of an envelope.

        Args:
            envelope: what `encrypt` returned.
            place: as it was given there.

        Raises:
            NotEncryptedError, TruncatedError, FormatError: this is no envelope, or was cut.
            KeyFileMissingError: the key store has no key file for it.
            ContextMismatchError, WrongKeyError, KeyAccessError, KmsUnavailableError: the key or context is not right.
            TamperedError: envelope or key file were changed, or it was moved here from another place.
        """
        prefix = envelope[:PREFIX_BYTES]
        opened = self._opened.get(prefix)
        if opened is None or time.monotonic() >= opened[0]:
            opened = self._open(envelope)
        key = opened[1]
        try:
            if key.deterministic:
                return key.siv.decrypt(envelope[17:], [prefix + place])
            return key.gcm.decrypt(envelope[17:29], envelope[29:], prefix + place)
        except (InvalidTag, ValueError):
            check_envelope(envelope)
            raise _not_authentic(envelope) from None

    def key(self, key_id: bytes, cipher: str) -> RecordKey:
        """Return the key of a key id, for whole columns; the caller keeps it for no longer than a batch.

        Raises:
            As `decrypt`; TamperedError: the key id belongs to another cipher.
        """
        return self._load(key_id, cipher)[1]

    def close(self) -> None:
        """Drop all keys."""
        with self._lock:
            self._opened, self._missing = {}, {}

    def _open(self, envelope: bytes) -> tuple[float, RecordKey]:
        check_envelope(envelope)
        return self._load(envelope[1:PREFIX_BYTES], CIPHER_OF_SUITE[envelope[:1]])

    def _load(self, key_id: bytes, cipher: str) -> tuple[float, RecordKey]:
        """Return a key and until when it may be used, from memory or through key store and KMS."""
        slot = SUITE_OF_CIPHER.get(cipher, b"") + key_id
        known = self._opened.get(slot)
        if known is not None and time.monotonic() < known[0]:
            return known
        with self._lock:  # threads that need the same key wait for one call
            known = self._opened.get(slot)
            if known is not None and time.monotonic() < known[0]:
                return known
            opened = time.monotonic() + _OPENED_TTL_S, self._fetch(key_id, cipher)
            if len(self._opened) >= _MAX_OPENED:
                self._opened = {}
            self._opened[slot] = opened
            _remember_prefix(opened[1].prefix)
            return opened

    def _fetch(self, key_id: bytes, cipher: str) -> RecordKey:
        name = key_id.hex()
        what = f"the key file {key_file_name(name)} in {self._store.place}"
        if self._missing.get(key_id, 0.0) > time.monotonic():  # of a million broken records, each would ask the store
            raise _no_key_file(name, self._store)
        raw = self._store.get(name)
        if raw is None:
            if len(self._missing) >= _MAX_OPENED:
                self._missing = {}
            self._missing[key_id] = time.monotonic() + _MISSING_TTL_S
            raise _no_key_file(name, self._store)
        return load_record_key(raw, self._keys, self._context, (key_id, cipher), what)

    def after_fork(self) -> None:
        """Start anew in a child process, whose parent may have held the lock."""
        self._lock = threading.Lock()
        self._opened, self._missing = {}, {}

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to pickle or copy: keys must not travel."""
        msg = f"a {type(self).__name__} cannot be pickled or copied; make one where it is needed"
        raise TypeError(msg)


def load_record_key(
    raw: bytes,
    keys: Sequence[KeyProvider],
    context: Mapping[str, str] | AnyContext | None,
    expected: tuple[bytes, str],
    what: str,
) -> RecordKey:
    """Open the key of a key file.

    Args:
        raw: the key file.
        keys: the allowed KMS keys.
        context: the encryption context that the caller expects.
        expected: the key id and cipher that it has to be of.
        what: the key file, for messages.

    Raises:
        As `RecordDecryptor.decrypt`.
    """
    key_file = KeyFile.from_bytes(raw, what)
    pairs = match_context(context, key_file.context, what)
    if key_file.cipher != expected[1]:
        raise TamperedError(
            f"{what} is of the cipher {key_file.cipher}, but what names it is of {expected[1]}: one of them was changed"
        )
    (wrapped,) = key_file.data_keys
    with cache.unwrap(keys, wrapped.wrapped_keys, pairs, wrapped.key_id, what) as data_key:
        key = open_record_key(data_key, key_file, what)
    if key.key_id != expected[0]:
        raise TamperedError(f"{what} is the key file of {key.key_id.hex()}: it was put in the place of another")
    return key


def check_envelope(envelope: bytes) -> None:
    """Check all that can be told of an envelope without its key.

    Raises:
        NotEncryptedError, TruncatedError: it is none, or too short for one.
    """
    suite = bytes(envelope[:1])
    if suite not in _SUITES:
        hint = ""
        if envelope and all(byte < 0x80 for byte in envelope[:64]):  # noqa: PLR2004  # ASCII
            hint = ". It looks like text; if it is base64 or hex, decode it first"
        raise NotEncryptedError(
            f"this is no record envelope of ours: its first byte is not that of a known suite{hint}"
        )
    if len(envelope) < MIN_BYTES[suite]:
        raise TruncatedError(
            f"this record has {len(envelope)} bytes; an envelope has at least {MIN_BYTES[suite]}. It was cut short"
        )


def refuse_envelope(plaintext: bytes) -> None:
    """Raise AlreadyEncryptedError for an envelope whose key this process has used or opened."""
    if plaintext[:PREFIX_BYTES] in _prefixes:
        msg = "this record is an envelope already: it was encrypted before in this job. Encrypt it once"
        raise AlreadyEncryptedError(msg)


def _no_key_file(name: str, store: KeyStore) -> KeyFileMissingError:
    return KeyFileMissingError(
        f"there is no key file {key_file_name(name)} in {store.place}; without it nobody can open this record. "
        "Is keys= the key store that the writer had?"
    )


def _not_authentic(envelope: bytes) -> TamperedError:
    return TamperedError(
        f"this record, under the key {envelope[1:PREFIX_BYTES].hex()}, was changed after it was written, or comes from "
        "another place: another field or column, or other aad="
    )


def _remember_prefix(prefix: bytes) -> None:
    if len(_prefixes) >= _MAX_OPENED:
        _prefixes.clear()
    if prefix:
        _prefixes.add(prefix)


_NO_KEY: Final = RecordKey(
    RAW_CELL_CIPHER, bytes(32), bytes(NONCE_BYTES), bytes(32)
)  # never used: nothing is left of it
_NO_LEASE: Final = _Lease(_NO_KEY, iter(()), 0.0)
_prefixes: Final[set[bytes]] = set()
_forked: Final[weakref.WeakSet[RecordEncryptor | RecordDecryptor]] = weakref.WeakSet()


def _after_fork() -> None:
    for user in _forked:
        user.after_fork()


os.register_at_fork(after_in_child=_after_fork)
