"""AWS Encryption SDK messages written out from the specification, for any suite.

Nothing of the package writes a byte of them; it only wraps their data keys.
"""

import base64
import hashlib
import hmac
import os
import struct
from dataclasses import dataclass, field

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from beam_envelope.keys.provider import DataKey

# algorithm-suites.md: key bytes, hash of the HKDF, curve, hash of the signature
SUITES = {
    "0014": (16, None, None, None),
    "0046": (24, None, None, None),
    "0078": (32, None, None, None),
    "0114": (16, "sha256", None, None),
    "0146": (24, "sha256", None, None),
    "0178": (32, "sha256", None, None),
    "0214": (16, "sha256", ec.SECP256R1(), hashes.SHA256()),
    "0346": (24, "sha384", ec.SECP384R1(), hashes.SHA384()),
    "0378": (32, "sha384", ec.SECP384R1(), hashes.SHA384()),
    "0478": (32, "sha512", None, None),
    "0578": (32, "sha512", ec.SECP384R1(), hashes.SHA384()),
}
COMMITTING = ("0478", "0578")


def hkdf(digest, salt, key, info, size):
    """RFC 5869, for outputs of one block."""
    salt = salt or bytes(hashlib.new(digest).digest_size)
    prk = hmac.new(salt, key, digest).digest()
    return hmac.new(prk, info + b"\x01", digest).digest()[:size]


def counted(data):
    """A length of two bytes and the data."""
    return struct.pack(">H", len(data)) + data


def pairs(context):
    """An encryption context, serialised."""
    if not context:
        return b""
    entries = sorted((key.encode(), value.encode()) for key, value in context.items())
    return struct.pack(">H", len(entries)) + b"".join(counted(key) + counted(value) for key, value in entries)


@dataclass
class Message:
    """The parts of a message; change one and take `bytes(message)`."""

    suite: str
    data_key: bytes
    context: dict
    edks: list
    plaintext: bytes = b"plaintext"
    frame_bytes: int = 4096
    required: dict = field(default_factory=dict)
    message_id: bytes = b""
    signing_key: ec.EllipticCurvePrivateKey | None = None
    aad: bytes | None = None
    edk_count: int | None = None
    content_type: int | None = None
    reserved: bytes = bytes(4)
    iv_bytes: int = 12
    final_number: int | None = None
    as_we_do: bool = False
    """The IVs are sequence numbers, and the last frame is full if it can be: both are a writer's choice."""

    def __post_init__(self):
        self.message_id = self.message_id or os.urandom(32 if self.suite in COMMITTING else 16)

    def __bytes__(self):
        size, digest, _, signature_digest = SUITES[self.suite]
        suite = bytes.fromhex(self.suite)
        if self.suite in COMMITTING:
            key = hkdf(digest, self.message_id, self.data_key, suite + b"DERIVEKEY", size)
            commitment = hkdf(digest, self.message_id, self.data_key, b"COMMITKEY", 32)
        else:
            key = hkdf(digest, b"", self.data_key, suite + self.message_id, size) if digest else self.data_key
        gcm = AESGCM(key)
        aad = pairs(self.context) if self.aad is None else self.aad
        edks = b"".join(counted(part) for edk in self.edks for part in edk)
        count = len(self.edks) if self.edk_count is None else self.edk_count
        framed = 2 if self.frame_bytes else 1
        section = counted(aad) + struct.pack(">H", count) + edks + bytes([self.content_type or framed])
        length = struct.pack(">I", self.frame_bytes)
        if self.suite in COMMITTING:
            header = b"\x02" + suite + self.message_id + section + length + commitment
            tag = gcm.encrypt(bytes(12), b"", header + pairs(self.required))
        else:
            header = b"\x01\x80" + suite + self.message_id + section + self.reserved + bytes([self.iv_bytes]) + length
            tag = bytes(12) + gcm.encrypt(bytes(12), b"", header + pairs(self.required))
        message = header + tag + (self.frames(gcm) if self.frame_bytes else self.block(gcm))
        if signature_digest:
            message += counted(self.signing_key.sign(message, ec.ECDSA(signature_digest)))
        return message

    def block(self, gcm):
        """An unframed body."""
        size, iv = struct.pack(">Q", len(self.plaintext)), os.urandom(12)
        aad = self.message_id + b"AWSKMSEncryptionClient Single Block" + struct.pack(">I", 1) + size
        return iv + size + gcm.encrypt(iv, self.plaintext, aad)

    def frames(self, gcm):
        """A framed body. The last frame may be empty, or full."""
        parts, number, rest = [], 1, self.plaintext
        while len(rest) > self.frame_bytes or (len(rest) == self.frame_bytes and not self.as_we_do):
            chunk, rest = rest[: self.frame_bytes], rest[self.frame_bytes :]
            iv, label = self.iv(number), b"AWSKMSEncryptionClient Frame"
            aad = self.message_id + label + struct.pack(">IQ", number, len(chunk))
            parts.append(struct.pack(">I", number) + iv + gcm.encrypt(iv, chunk, aad))
            number += 1
        number = self.final_number or number
        iv, label = self.iv(number), b"AWSKMSEncryptionClient Final Frame"
        aad = self.message_id + label + struct.pack(">IQ", number, len(rest))
        end = b"\xff\xff\xff\xff" + struct.pack(">I", number) + iv + struct.pack(">I", len(rest))
        return b"".join([*parts, end, gcm.encrypt(iv, rest, aad)])

    def iv(self, number):
        """The IV of a frame."""
        return struct.pack(">12xI", number)[4:] if self.as_we_do else os.urandom(12)


def message_under(key, suite, context=None, **parts):
    """Return a message whose data key a KMS key wrapped; of a signed suite, with its public key in the context."""
    context = dict(context or {})
    size, _, curve, _ = SUITES[suite]
    if curve:
        parts["signing_key"] = ec.generate_private_key(curve)
        point = serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
        context["aws-crypto-public-key"] = base64.b64encode(
            parts["signing_key"].public_key().public_bytes(*point)
        ).decode()
    data_key, edk = wrapped_key(key, size, {**context, **parts.get("required", {})})
    return Message(suite, data_key, context, [edk], **parts)


def wrapped_key(key, size, context):
    """Return a new data key and its wrapped form, as messages have it."""
    data_key = os.urandom(size)
    form = key.wrap(DataKey(data_key), context)
    return data_key, (form.provider.encode(), form.kms_key.encode(), form.wrapped)
