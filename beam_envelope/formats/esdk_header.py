"""The header of an AWS Encryption SDK message: its suites, and how it is written and parsed. No key is used here.

Bytes: docs/format.md, 8; the standard: AWS Encryption SDK Specification, "message-header.md" and
"algorithm-suites.md".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from beam_envelope.errors import FormatError, NotEncryptedError, TruncatedError
from beam_envelope.formats.keyfile import MAX_WRAPPED_BYTES, MAX_WRAPPED_KEYS
from beam_envelope.keys.provider import WrappedKey

COMMITMENT_BYTES: Final = 32
IV_BYTES: Final = 12
TAG_BYTES: Final = 16
PUBLIC_KEY: Final = "aws-crypto-public-key"
"""The context's key under which a signed message names the key that its signature is checked with."""
RESERVED_PREFIX: Final = "aws-crypto-"

_MAX_NAME_BYTES: Final = 2048  # the longest KeyId of AWS KMS ("Decrypt", AWS KMS API Reference)
_MAX_SHORT: Final = 0xFFFF
_UNFRAMED, _FRAMED = 1, 2
_BASE64_STARTS: Final = (b"AgR4", b"AgV4", b"AYA")  # versions 2 and 1
_VERSIONS: Final = (b"\x01", b"\x02")
_TELLING_BYTES: Final = 64
_SHA512: Final = hashes.SHA512()


@dataclass(frozen=True)
class Suite:
    """An algorithm suite: AES-GCM with IVs of 12 bytes and tags of 16, and what goes with it.

    Attributes:
        id: its two bytes.
        key_bytes: the length of the data key, and of the key derived from it.
        kdf: the hash function of HKDF; None: the data key itself encrypts.
        commits: whether the message commits to its key. If so, its format is version 2, else 1.
        curve: of the ECDSA signature, if there is one.
    """

    id: bytes
    key_bytes: int
    kdf: hashes.HashAlgorithm | None = None
    commits: bool = False
    curve: ec.EllipticCurve | None = None

    @property
    def message_id_bytes(self) -> int:
        """The length of the message id."""
        return 32 if self.commits else 16

    @property
    def lead(self) -> bytes:
        """What a message begins with: version, type (in version 1) and suite."""
        return (b"\x02" if self.commits else b"\x01\x80") + self.id

    def derive(self, data_key: bytearray, message_id: bytes) -> tuple[bytes, bytes]:
        """Return the key that encrypts one message, and the commitment to it, which is empty without commitment."""
        if self.commits:
            # HKDF with the message id as salt (RFC 5869 2.2, 2.3); one extraction serves both expansions.
            prk = HKDF.extract(_SHA512, message_id, data_key)
            key = HKDFExpand(_SHA512, 32, self.id + b"DERIVEKEY").derive(prk)
            return key, HKDFExpand(_SHA512, COMMITMENT_BYTES, b"COMMITKEY").derive(prk)
        if self.kdf is None:
            return bytes(data_key), b""
        return HKDF(self.kdf, self.key_bytes, None, self.id + message_id).derive(data_key), b""

    def __str__(self) -> str:
        """Return the id, as AWS's documents write it."""
        return f"0x{self.id.hex().upper()}"


def _suites() -> dict[bytes, Suite]:
    sha256, sha384, sha512 = hashes.SHA256(), hashes.SHA384(), _SHA512
    p256, p384 = ec.SECP256R1(), ec.SECP384R1()
    rows = (
        Suite(b"\x00\x14", 16),
        Suite(b"\x00\x46", 24),
        Suite(b"\x00\x78", 32),
        Suite(b"\x01\x14", 16, sha256),
        Suite(b"\x01\x46", 24, sha256),
        Suite(b"\x01\x78", 32, sha256),
        Suite(b"\x02\x14", 16, sha256, curve=p256),
        Suite(b"\x03\x46", 24, sha384, curve=p384),
        Suite(b"\x03\x78", 32, sha384, curve=p384),
        Suite(b"\x04\x78", 32, sha512, commits=True),
        Suite(b"\x05\x78", 32, sha512, commits=True, curve=p384),
    )
    return {suite.id: suite for suite in rows}


SUITES: Final = _suites()
WRITTEN_SUITE: Final = SUITES[b"\x04\x78"]


@dataclass(frozen=True)
class Header:
    """What a header says beyond its message id and commitment.

    Attributes:
        suite: the algorithm suite.
        context: the encryption context, with the public key of a signed message.
        wrapped_keys: the wrapped forms of the data key ("encrypted data keys").
        frame_bytes: the plaintext's length in all frames but the last; 0: the body is not framed.
        section: where the part between message id and commitment starts and ends. It is the same for all messages of
            one writer, data key and context, and says all that this object says except the suite.
    """

    suite: Suite
    context: Mapping[str, str]
    wrapped_keys: tuple[WrappedKey, ...]
    frame_bytes: int
    section: slice


def serialise_context(context: Mapping[str, str]) -> bytes:
    """Return a context as messages have it ("Key Value Pairs"): sorted by UTF-8 bytes; of no pairs, nothing.

    Raises:
        ValueError: it is too long.
    """
    if not context:
        return b""
    pairs = sorted((key.encode(), value.encode()) for key, value in context.items())
    return _short(len(pairs)) + b"".join(_counted(key) + _counted(value) for key, value in pairs)


def write_section(context: Mapping[str, str], wrapped_keys: Sequence[WrappedKey], frame_bytes: int) -> bytes:
    """Return the part of a framed message's header between message id and commitment.

    Raises:
        ValueError: there is no wrapped key, or one that a reader would refuse, or too many.
    """
    if not 0 < len(wrapped_keys) <= MAX_WRAPPED_KEYS:
        msg = f"a message holds between 1 and {MAX_WRAPPED_KEYS} wrapped keys, not {len(wrapped_keys)}"
        raise ValueError(msg)
    parts = [_counted(serialise_context(context)), _short(len(wrapped_keys))]
    for form in wrapped_keys:
        name = form.kms_key.encode()
        if len(name) > _MAX_NAME_BYTES or len(form.wrapped) > MAX_WRAPPED_BYTES:
            msg = f"a message has no room for the key under {form.kms_key[:100]}: its name or wrapped key is too long"
            raise ValueError(msg)
        parts += [_counted(form.provider.encode()), _counted(name), _counted(form.wrapped)]
    return b"".join([*parts, bytes([_FRAMED]), frame_bytes.to_bytes(4, "big")])


def read_suite(message: bytes, what: str) -> Suite:
    """Return the suite of a message.

    Raises:
        NotEncryptedError, FormatError, TruncatedError: it is no message, or of a version or suite not known here.
    """
    if message[:1] not in _VERSIONS:
        _refuse_other_data(message, what)
    start = 2 if message[0] == 1 else 1
    if len(message) < start + 2:
        raise cut(what)
    suite = SUITES.get(message[start : start + 2])
    if suite is None or not message.startswith(suite.lead):
        if _was_decoded(message):
            _refuse_other_data(message, what)
        _refuse(what, f"it names the algorithm suite 0x{message[start : start + 2].hex().upper()}, unknown here")
    return suite


def read_header(message: bytes, suite: Suite, what: str) -> Header:
    """Parse the rest of the header; nothing of it is authentic yet.

    Raises:
        FormatError, TruncatedError: it is not in the standard's form, or cut.
    """
    try:
        return _read_header(message, suite, what)
    except (FormatError, TruncatedError):
        if _was_decoded(message):
            _refuse_other_data(message, what)
        raise


def cut(what: str) -> TruncatedError:
    """Return the error for a message whose end is missing."""
    return TruncatedError(f"{what} was cut short: its end is missing. Fetch it again from where it came from")


class _Cursor:
    """Reads numbers and counted bytes from a message; nothing beyond its end."""

    def __init__(self, message: bytes, at: int, what: str) -> None:
        self.message, self.at, self.what = message, at, what

    def take(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > len(self.message):
            raise cut(self.what)
        return self.message[start : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def counted(self) -> bytes:
        return self.take(self.number(2))


def _read_header(message: bytes, suite: Suite, what: str) -> Header:
    cursor = _Cursor(message, len(suite.lead), what)
    cursor.take(suite.message_id_bytes)
    start = cursor.at
    context = _read_context(cursor.counted(), what)
    count = cursor.number(2)
    if not 0 < count <= MAX_WRAPPED_KEYS:
        _refuse(what, f"it holds {count} encrypted data keys; between 1 and {MAX_WRAPPED_KEYS} are taken")
    wrapped_keys = tuple(_read_wrapped_key(cursor) for _ in range(count))
    content_type = cursor.number(1)
    if not suite.commits and (cursor.number(4), cursor.number(1)) != (0, IV_BYTES):
        _refuse(what, "a reserved field of its header is not 0, or its IV is not of 12 bytes")
    frame_bytes = cursor.number(4)
    if content_type not in {_UNFRAMED, _FRAMED} or (content_type == _FRAMED) != (frame_bytes > 0):
        _refuse(what, "its content type is unknown or does not go with its frame length")
    if (PUBLIC_KEY in context) != (suite.curve is not None):
        _refuse(what, f"its context {'has' if PUBLIC_KEY in context else 'lacks'} a public key, contrary to its suite")
    section = slice(start, cursor.at)
    cursor.take((COMMITMENT_BYTES if suite.commits else IV_BYTES) + TAG_BYTES)
    return Header(suite, context, wrapped_keys, frame_bytes, section)


def _read_context(raw: bytes, what: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    if not raw:
        return pairs
    cursor = _Cursor(raw, 0, what)
    try:
        count = cursor.number(2)
        for _ in range(count):
            key = cursor.counted().decode()
            pairs[key] = cursor.counted().decode()
    except (TruncatedError, UnicodeDecodeError):
        _refuse(what, "its encryption context is broken")
    if not count or len(pairs) != count or cursor.at != len(raw):
        _refuse(what, "its encryption context is empty, too long or has a key twice")
    return pairs


def _read_wrapped_key(cursor: _Cursor) -> WrappedKey:
    # Other software's providers put binary data here; such a form is for others, and only named in messages.
    provider = cursor.counted().decode(errors="backslashreplace")
    name = cursor.counted()
    if len(provider) + len(name) > 2 * _MAX_NAME_BYTES:
        _refuse(cursor.what, "it names a KMS key that is longer than any")
    return WrappedKey(provider, name.decode(errors="backslashreplace"), cursor.counted())


def _counted(data: bytes) -> bytes:
    return _short(len(data)) + data


def _short(number: int) -> bytes:
    if number > _MAX_SHORT:
        msg = f"the encryption context or a wrapped key is too long for a message: {number} is above {_MAX_SHORT}"
        raise ValueError(msg)
    return number.to_bytes(2, "big")


def _is_text(message: bytes) -> bool:
    try:
        message.decode()
    except UnicodeDecodeError:
        return False
    return True


def _was_decoded(message: bytes) -> bool:
    """Whether someone decoded a message as text: of a message, so many bytes would else hold some that are no UTF-8."""
    return len(message) >= _TELLING_BYTES and _is_text(message)


def _refuse_other_data(message: bytes, what: str) -> NoReturn:
    if not message:
        msg = f"{what} is empty, so it was cut short or never written. Fetch it again from where it came from"
        raise TruncatedError(msg)
    if message.startswith(_BASE64_STARTS):
        _refuse(what, "this looks base64-encoded; decode it first")
    if _is_text(message):
        if message[:1] in _VERSIONS:
            msg = (
                f"{what} was decoded as text on its way, which destroys it for good. Fetch it again, and carry it as "
                "bytes or as base64"
            )
            raise FormatError(msg) from None
        msg = f"{what} is text, not an encrypted message. Leave it out of what is to be decrypted"
        raise NotEncryptedError(msg)
    _refuse(what, f"it begins with the byte 0x{message[0]:02X}, and messages of versions 1 and 2 do with 0x01 or 0x02")


def _refuse(what: str, why: str) -> NoReturn:
    msg = f"{what} is not a readable AWS Encryption SDK message: {why}"
    raise FormatError(msg) from None
