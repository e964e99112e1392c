"""beam_envelope: encrypt datasets at scale with KMS envelope encryption in Apache Beam, and open them again."""

from beam_envelope.errors import (
    AlreadyEncryptedError,
    ContextMismatchError,
    EnvelopeError,
    FormatError,
    KeyAccessError,
    KeyFileMissingError,
    KmsUnavailableError,
    ManifestError,
    NotEncryptedError,
    TamperedError,
    TruncatedError,
    WrongKeyError,
)
from beam_envelope.formats.shard import create_shard, open_shard
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.cache import DataKeyPolicy
from beam_envelope.keys.context import ANY_CONTEXT
from beam_envelope.keys.local import LocalKms
from beam_envelope.keys.provider import DataKey, KeyProvider, WrappedKey
from beam_envelope.keys.uri import open_key
from beam_envelope.transforms.files import DecryptFiles, EncryptFiles
from beam_envelope.transforms.plan import DecryptedFile, EncryptedFile, FailedFile

__version__ = "0.1.0"

__all__ = [
    "ANY_CONTEXT",
    "AlreadyEncryptedError",
    "AwsKms",
    "ContextMismatchError",
    "DataKey",
    "DataKeyPolicy",
    "DecryptFiles",
    "DecryptedFile",
    "EncryptFiles",
    "EncryptedFile",
    "EnvelopeError",
    "FailedFile",
    "FormatError",
    "KeyAccessError",
    "KeyFileMissingError",
    "KeyProvider",
    "KmsUnavailableError",
    "LocalKms",
    "ManifestError",
    "NotEncryptedError",
    "TamperedError",
    "TruncatedError",
    "WrappedKey",
    "WrongKeyError",
    "create_shard",
    "open_key",
    "open_shard",
]
