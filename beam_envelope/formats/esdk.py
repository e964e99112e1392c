"""Self-contained records: AWS Encryption SDK messages, which any AWS Encryption SDK reads. Bytes: docs/format.md, 8.

Headers are parsed in esdk_header.py, bodies in esdk_body.py; the standard is the AWS Encryption SDK Specification.
Encryptors and decryptors are for one process: they cannot be pickled, and a fork leaves them without keys.
"""

from __future__ import annotations

import hmac
import os
import time
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Final, Literal, NoReturn, get_args

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from beam_envelope.errors import FormatError, TamperedError, WrongKeyError
from beam_envelope.formats.esdk_body import check_signature, open_block, open_frames, read_public_key, seal_body
from beam_envelope.formats.esdk_header import (
    COMMITMENT_BYTES,
    IV_BYTES,
    PUBLIC_KEY,
    RESERVED_PREFIX,
    SUITES,
    TAG_BYTES,
    WRITTEN_SUITE,
    Header,
    Suite,
    cut,
    read_header,
    read_suite,
    serialise_context,
    write_section,
)
from beam_envelope.keys import cache
from beam_envelope.keys.context import AnyContext, checked_context, match_context
from beam_envelope.keys.provider import DATA_KEY_BYTES, DataKey, KeyProvider

CommitmentPolicy = Literal[
    "forbid-encrypt-allow-decrypt", "require-encrypt-allow-decrypt", "require-encrypt-require-decrypt"
]
"""AWS's names. On reading, the last takes messages with key commitment only, the others take all."""
FRAME_BYTES: Final = 4096
"""The default length of a frame, as in AWS's own SDKs."""

_MAX_FRAME_BYTES: Final = 2**31 - 1 - TAG_BYTES  # what one call of the cipher takes
_MAX_OPENED: Final = 1000
_MAX_LAYOUTS: Final = 16
# A decryptor keeps a data key for so long and then asks the cache of the process again, whose own limit is what counts.
_OPENED_TTL_S: Final = 10.0
_HEADER_IV: Final = bytes(IV_BYTES)


class MessageEncryptor:
    """Makes messages under one data key: format version 2, suite 0x0478, framed. Safe between threads.

    Each message has a key of its own, derived from the data key and 32 fresh random bytes, so one data key may serve
    as many messages as the policy of its owner allows.

    Args:
        data_key: of 32 bytes; a copy is kept until `close`.
        context: the encryption context that the data key's wrapped forms are bound to.
        frame_bytes: how many bytes of plaintext each frame but the last holds.
        required_context_keys: which pairs of the context the messages do not hold, though they are bound to them: who
            reads has to name them too ("required encryption context" with AWS).

    Raises:
        ValueError: an argument is out of range, or the context is not one that AWS takes.
    """

    def __init__(
        self,
        data_key: DataKey,
        context: Mapping[str, str] | None,
        *,
        frame_bytes: int = FRAME_BYTES,
        required_context_keys: Collection[str] = (),
    ) -> None:
        """Serialise what all messages share."""
        if len(data_key.material) != DATA_KEY_BYTES:
            msg = f"messages are written under data keys of {DATA_KEY_BYTES} bytes, not {len(data_key.material)}"
            raise ValueError(msg)
        if not 0 < frame_bytes <= _MAX_FRAME_BYTES:
            msg = f"frame_bytes is between 1 and {_MAX_FRAME_BYTES}, not {frame_bytes}"
            raise ValueError(msg)
        pairs = checked_context(context)
        if any(key.startswith(RESERVED_PREFIX) for key in pairs):
            msg = f"an encryption context key starts with {RESERVED_PREFIX!r}, which AWS reserves; choose another"
            raise ValueError(msg)
        stored, required = _split(pairs, required_context_keys)
        self._section = write_section(stored, data_key.wrapped_keys, frame_bytes)
        self._required = serialise_context(required)
        self._frame_bytes = frame_bytes
        self._data_key = data_key.duplicate()
        _forked.add(self)

    def encrypt(self, plaintext: bytes) -> bytes:
        """Return the message of `plaintext`.

        Raises:
            ValueError: this encryptor was closed, or is in a forked child.
        """
        return self._seal(plaintext, os.urandom(WRITTEN_SUITE.message_id_bytes))

    def close(self) -> None:
        """Erase the data key. May be called again."""
        self._data_key.close()

    def _seal(self, plaintext: bytes, message_id: bytes) -> bytes:
        key, commitment = WRITTEN_SUITE.derive(self._data_key.material, message_id)
        gcm = AESGCM(key)
        header = b"\x02\x04\x78" + message_id + self._section + commitment
        header += gcm.encrypt(_HEADER_IV, b"", header + self._required)
        return seal_body(gcm, header, plaintext, message_id, self._frame_bytes)

    def after_fork(self) -> None:
        """Erase the child's copy of the data key."""
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to pickle or copy: key material must not travel."""
        msg = f"a {type(self).__name__} cannot be pickled or copied; make one where it is needed"
        raise TypeError(msg)


class _Opened:
    """A data key and what goes with it, for all messages with the same suite and the same section in their header."""

    __slots__ = ("data_key", "expires", "frame_bytes", "message_id", "public_key", "section", "suite")

    def __init__(self, header: Header, data_key: DataKey, what: str) -> None:
        self.suite, self.section, self.frame_bytes = header.suite, header.section, header.frame_bytes
        self.message_id = slice(header.section.start - header.suite.message_id_bytes, header.section.start)
        self.data_key = data_key
        self.expires = time.monotonic() + _OPENED_TTL_S
        self.public_key = read_public_key(header, what)


class MessageDecryptor:
    """Opens messages of any AWS Encryption SDK; asks the KMS once for each data key. Safe between threads.

    Args:
        keys: the KMS keys, any of which may open a message; a message never decides which key is asked.
        context: the encryption context that the messages were written with, or `ANY_CONTEXT`. The public key that
            signed messages hold is no part of it.
        commitment_policy: one of AWS's three names.
        required_context_keys: the keys of those pairs of the context that the messages do not hold.

    Raises:
        ValueError: the policy is unknown, or the context lacks a required key.
    """

    def __init__(
        self,
        keys: Sequence[KeyProvider],
        context: Mapping[str, str] | AnyContext | None,
        commitment_policy: CommitmentPolicy = "require-encrypt-require-decrypt",
        *,
        required_context_keys: Collection[str] = (),
    ) -> None:
        """Make no call yet."""
        if commitment_policy not in get_args(CommitmentPolicy):
            msg = f"commitment_policy is one of {', '.join(get_args(CommitmentPolicy))}, not {commitment_policy!r}"
            raise ValueError(msg)
        self._keys = tuple(keys)
        self._allowed = frozenset(
            suite for suite in SUITES if SUITES[suite].commits or commitment_policy.endswith("-allow-decrypt")
        )
        pairs = {} if isinstance(context, AnyContext) else checked_context(context)
        stored, required = _split(pairs, required_context_keys)
        self._expected = context if isinstance(context, AnyContext) else stored
        self._required_pairs, self._required = required, serialise_context(required)
        self._opened: dict[bytes, _Opened] = {}
        self._layouts: tuple[tuple[bytes, slice], ...] = ()
        _forked.add(self)

    def decrypt(self, message: bytes, what: str = "the message") -> bytes:
        """Return the plaintext of a message, after all of it is found authentic.

        Args:
            message: its bytes.
            what: its name for messages.

        Raises:
            NotEncryptedError, TruncatedError, FormatError: this is no message, was cut, or its suite is not allowed.
            ContextMismatchError, WrongKeyError, KeyAccessError, KmsUnavailableError: the key or context is not right.
            TamperedError: it was changed after it was written.
        """
        if type(message) is not bytes:
            message = bytes(memoryview(message))
        opened = None
        # Messages of one place have headers of a few lengths: what was parsed once is found again by its bytes.
        for lead, section in self._layouts:
            if message.startswith(lead):
                opened = self._opened.get(lead + message[section])
                if opened is not None:
                    break
        known = opened is not None and time.monotonic() < opened.expires
        if opened is None or not known:
            opened = self._open(message, what)
        # A key that is known already is no reason to take a suite that is not allowed (CVE-2026-6550).
        if opened.suite.id not in self._allowed:
            raise _not_allowed(opened.suite, what)
        plaintext = self._unseal(message, opened, what)
        if not known:
            self._remember(message, opened)
        return plaintext

    def close(self) -> None:
        """Drop the data keys, which are erased when no thread uses them any more. May be called again."""
        self._opened, self._layouts = {}, ()

    def _open(self, message: bytes, what: str) -> _Opened:
        """Return the data key of a message, from memory or from the KMS."""
        suite = read_suite(message, what)
        if suite.id not in self._allowed:
            raise _not_allowed(suite, what)
        header = read_header(message, suite, what)
        opened = self._opened.get(suite.lead + message[header.section])
        if opened is not None and time.monotonic() < opened.expires:
            return opened
        stored = {key: value for key, value in header.context.items() if key != PUBLIC_KEY}
        match_context(self._expected, stored, what)
        pairs = {**header.context, **self._required_pairs}
        return _Opened(header, cache.unwrap(self._keys, header.wrapped_keys, pairs, None, what), what)

    def _remember(self, message: bytes, opened: _Opened) -> None:
        """Keep the data key of a message that proved authentic, so that none that did not can push it out."""
        # What is replaced or dropped here is not closed: another thread may be using it.
        layout = (opened.suite.lead, opened.section)
        slot = layout[0] + message[opened.section]
        if slot not in self._opened and len(self._opened) >= _MAX_OPENED:
            self._opened = {}
        self._opened[slot] = opened
        if layout not in self._layouts:
            self._layouts = (layout, *self._layouts[: _MAX_LAYOUTS - 1])

    def _unseal(self, message: bytes, opened: _Opened, what: str) -> bytes:
        suite, end = opened.suite, opened.section.stop
        message_id = message[opened.message_id]
        material = opened.data_key.material
        if len(material) != suite.key_bytes:
            msg = (
                f"{what} is of suite {suite}, which its data key of {len(material)} bytes does not fit: it was changed"
            )
            raise TamperedError(msg)
        key, commitment = suite.derive(material, message_id)
        body = end + (COMMITMENT_BYTES if suite.commits else IV_BYTES) + TAG_BYTES
        if len(message) < body:
            raise cut(what)
        if suite.commits:
            if not hmac.compare_digest(commitment, message[end : end + COMMITMENT_BYTES]):
                msg = (
                    f"the data key of {what} is not the one that its commitment names: the message was changed, or its "
                    "encrypted data keys come from another message"
                )
                raise WrongKeyError(msg)
            header, iv = message[: end + COMMITMENT_BYTES], _HEADER_IV
        else:
            header, iv = message[:end], message[end : end + IV_BYTES]
        gcm = AESGCM(key)
        try:
            gcm.decrypt(iv, message[body - TAG_BYTES : body], header + self._required)
            if opened.frame_bytes:
                plaintext, at = open_frames(gcm, message, body, message_id, opened.frame_bytes, what)
            else:
                plaintext, at = open_block(gcm, message, body, message_id, what)
        except InvalidTag:
            msg = f"{what} was changed after it was written, or is of another key or encryption context"
            raise TamperedError(msg) from None
        except OverflowError:
            raise FormatError(f"{what} has a frame of over 2 GiB, more than can be opened at once here") from None
        if opened.public_key is not None:
            at = check_signature(message, at, opened.public_key, what)
        if at != len(message):
            msg = f"{what} has {len(message) - at} bytes after its end: something was added to it"
            raise FormatError(msg)
        return plaintext

    def after_fork(self) -> None:
        """Drop the child's copies of the data keys."""
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to pickle or copy: key material must not travel."""
        msg = f"a {type(self).__name__} cannot be pickled or copied; make one where it is needed"
        raise TypeError(msg)


def encrypt_message(plaintext: bytes, data_key: DataKey, context: Mapping[str, str] | None) -> bytes:
    """Return one message; for many under one data key, a `MessageEncryptor` is faster. Raises as it does.

    Example:
        >>> with generate_data_key(keys, {"dataset": "a"}) as data_key:
        ...     message = encrypt_message(b"data", data_key, {"dataset": "a"})
    """
    encryptor = MessageEncryptor(data_key, context)
    try:
        return encryptor.encrypt(plaintext)
    finally:
        encryptor.close()


def decrypt_message(
    message: bytes,
    keys: Sequence[KeyProvider],
    context: Mapping[str, str] | AnyContext | None,
    *,
    commitment_policy: CommitmentPolicy = "require-encrypt-require-decrypt",
    what: str = "the message",
) -> bytes:
    """Return the plaintext of one message; for many, a `MessageDecryptor` is faster. Raises as it does.

    Example:
        >>> decrypt_message(message, keys, {"dataset": "a"})
        b'data'
    """
    return MessageDecryptor(keys, context, commitment_policy).decrypt(message, what)


def _split(context: Mapping[str, str], required: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the pairs of a context that messages hold, and those that they do not."""
    missing = sorted(set(required) - context.keys())
    if missing:
        msg = f"required_context_keys names {', '.join(missing)}, which context= does not have"
        raise ValueError(msg)
    stored = {key: value for key, value in context.items() if key not in required}
    return stored, {key: context[key] for key in required}


def _not_allowed(suite: Suite, what: str) -> FormatError:
    return FormatError(
        f"{what} is of suite {suite}, which does not commit to its key, and the commitment policy does not take that. "
        "If it comes from an old AWS Encryption SDK, give commitment_policy='require-encrypt-allow-decrypt'"
    )


_forked: Final[weakref.WeakSet[MessageEncryptor | MessageDecryptor]] = weakref.WeakSet()


def _after_fork() -> None:
    for user in list(_forked):
        user.after_fork()


os.register_at_fork(after_in_child=_after_fork)
