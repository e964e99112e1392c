"""beam_envelope: encrypt datasets at scale with KMS envelope encryption in Apache Beam, and open them again."""

import importlib
from typing import TYPE_CHECKING

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
from beam_envelope.keys.vault import Vault

if TYPE_CHECKING:
    from beam_envelope.io.fileio import WriteEncryptedFiles
    from beam_envelope.io.filesystem import register_filesystem
    from beam_envelope.io.options import EnvelopeOptions
    from beam_envelope.io.text import ReadAllEncryptedText, ReadEncryptedText, WriteEncryptedText
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
    "EnvelopeOptions",
    "FailedFile",
    "FormatError",
    "KeyAccessError",
    "KeyFileMissingError",
    "KeyProvider",
    "KmsUnavailableError",
    "LocalKms",
    "ManifestError",
    "NotEncryptedError",
    "ReadAllEncryptedText",
    "ReadEncryptedText",
    "TamperedError",
    "TruncatedError",
    "Vault",
    "WrappedKey",
    "WriteEncryptedFiles",
    "WriteEncryptedText",
    "WrongKeyError",
    "create_shard",
    "open_key",
    "open_shard",
    "register_filesystem",
]

# Beam takes seconds to import, and shards need none of it: these names bring it in when they are first used.
_NEED_BEAM = {
    "DecryptFiles": "beam_envelope.transforms.files",
    "DecryptedFile": "beam_envelope.transforms.plan",
    "EncryptFiles": "beam_envelope.transforms.files",
    "EncryptedFile": "beam_envelope.transforms.plan",
    "EnvelopeOptions": "beam_envelope.io.options",
    "FailedFile": "beam_envelope.transforms.plan",
    "ReadAllEncryptedText": "beam_envelope.io.text",
    "ReadEncryptedText": "beam_envelope.io.text",
    "WriteEncryptedFiles": "beam_envelope.io.fileio",
    "WriteEncryptedText": "beam_envelope.io.text",
    "register_filesystem": "beam_envelope.io.filesystem",
}


def __getattr__(name: str) -> object:
    if name in _NEED_BEAM:
        return getattr(importlib.import_module(_NEED_BEAM[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
