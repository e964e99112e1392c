"""The body and the footer of an AWS Encryption SDK message: frames or one block, and the signature.

Bytes: docs/format.md, 8; the standard: AWS Encryption SDK Specification, "message-body.md" and "message-footer.md".
"""

from __future__ import annotations

import base64
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from beam_envelope.errors import FormatError, TamperedError
from beam_envelope.formats.esdk_header import IV_BYTES, PUBLIC_KEY, TAG_BYTES, Header, cut

# message-body-aad.md
_FRAME: Final = b"AWSKMSEncryptionClient Frame"
_FINAL_FRAME: Final = b"AWSKMSEncryptionClient Final Frame"
_SINGLE_BLOCK: Final = b"AWSKMSEncryptionClient Single Block"

_IV_START: Final = bytes(IV_BYTES - 4)  # the sequence number follows
_END: Final = b"\xff\xff\xff\xff"
_FRAME_HEAD_BYTES: Final = 4 + IV_BYTES
_FINAL_HEAD_BYTES: Final = 4 + 4 + IV_BYTES + 4
_ONE: Final = (1).to_bytes(4, "big")
_ONLY_IV: Final = _IV_START + _ONE
_ONLY_FRAME: Final = _END + _ONE + _ONLY_IV
_ONLY_FRAME_AAD: Final = _FINAL_FRAME + _ONE
_DIGEST: Final = {"secp256r1": hashes.SHA256(), "secp384r1": hashes.SHA384()}


def seal_body(gcm: AESGCM, header: bytes, plaintext: bytes, message_id: bytes, frame_bytes: int) -> bytes:
    """Return a message: its header and the framed body, whose last frame is empty only if the plaintext is."""
    size = len(plaintext)
    if size > frame_bytes:
        return b"".join([header, *_seal_frames(gcm, plaintext, message_id, frame_bytes)])
    sealed = gcm.encrypt(_ONLY_IV, plaintext, message_id + _ONLY_FRAME_AAD + size.to_bytes(8, "big"))
    return header + _ONLY_FRAME + size.to_bytes(4, "big") + sealed


def _seal_frames(gcm: AESGCM, plaintext: bytes, message_id: bytes, frame_bytes: int) -> list[bytes]:
    """Return the parts of a body of several frames; the last is never empty."""
    parts = []
    last = (len(plaintext) - 1) // frame_bytes
    aad = message_id + _FRAME
    for index in range(last + 1):
        number = (index + 1).to_bytes(4, "big")
        chunk = plaintext[index * frame_bytes : (index + 1) * frame_bytes]
        size = len(chunk).to_bytes(8, "big")
        iv = _IV_START + number
        if index == last:
            sealed = gcm.encrypt(iv, chunk, message_id + _FINAL_FRAME + number + size)
            parts += [_END + number + iv + size[4:], sealed]
        else:
            parts += [number + iv, gcm.encrypt(iv, chunk, aad + number + size)]
    return parts


def open_frames(
    gcm: AESGCM, message: bytes, at: int, message_id: bytes, frame_bytes: int, what: str
) -> tuple[bytes, int]:
    """Return the plaintext of a framed body that starts at `at`, and where it ends."""
    chunks = []
    number = _ONE
    while message[at : at + 4] != _END:
        stop = at + _FRAME_HEAD_BYTES + frame_bytes + TAG_BYTES
        if stop > len(message):
            raise cut(what)
        if message[at : at + 4] != number:
            raise _out_of_order(what)
        iv, sealed = message[at + 4 : at + _FRAME_HEAD_BYTES], message[at + _FRAME_HEAD_BYTES : stop]
        chunks.append(gcm.decrypt(iv, sealed, message_id + _FRAME + number + frame_bytes.to_bytes(8, "big")))
        at = stop
        number = (len(chunks) + 1).to_bytes(4, "big")
    start = at + _FINAL_HEAD_BYTES
    size = int.from_bytes(message[start - 4 : start], "big")
    stop = start + size + TAG_BYTES
    if message[at + 4 : at + 8] != number or size > frame_bytes:
        raise cut(what) if len(message) < start else _out_of_order(what)
    if stop > len(message):
        raise cut(what)
    aad = message_id + _FINAL_FRAME + number + size.to_bytes(8, "big")
    plaintext = gcm.decrypt(message[at + 8 : at + 8 + IV_BYTES], message[start:stop], aad)
    return (b"".join([*chunks, plaintext]) if chunks else plaintext), stop


def open_block(gcm: AESGCM, message: bytes, at: int, message_id: bytes, what: str) -> tuple[bytes, int]:
    """Return the plaintext of an unframed body that starts at `at`, and where it ends."""
    start = at + IV_BYTES + 8
    size = int.from_bytes(message[start - 8 : start], "big")
    stop = start + size + TAG_BYTES
    if stop > len(message):
        raise cut(what)
    aad = message_id + _SINGLE_BLOCK + _ONE + size.to_bytes(8, "big")
    return gcm.decrypt(message[at : at + IV_BYTES], message[start:stop], aad), stop


def read_public_key(header: Header, what: str) -> ec.EllipticCurvePublicKey | None:
    """Return the key that a signature is checked with: a compressed point, in base64, in the context."""
    if header.suite.curve is None:
        return None
    try:
        point = base64.b64decode(header.context[PUBLIC_KEY], validate=True)
        return ec.EllipticCurvePublicKey.from_encoded_point(header.suite.curve, point)
    except ValueError:
        raise FormatError(f"{what} names a public key that is none of its suite, {header.suite}") from None


def check_signature(message: bytes, at: int, public_key: ec.EllipticCurvePublicKey, what: str) -> int:
    """Check the footer at `at`: a length of 2 bytes and a signature over all before it. Return where it ends."""
    start = at + 2
    stop = start + int.from_bytes(message[at:start], "big")
    if max(start, stop) > len(message):
        raise cut(what)
    try:
        public_key.verify(message[start:stop], message[:at], ec.ECDSA(_DIGEST[public_key.curve.name]))
    except InvalidSignature:
        raise TamperedError(f"the signature of {what} does not fit: it was changed after it was written") from None
    return stop


def _out_of_order(what: str) -> TamperedError:
    return TamperedError(f"a frame of {what} is out of order or of another length: it was changed after it was written")
