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
from beam_envelope.formats.record import RecordDecryptor, RecordEncryptor
from beam_envelope.formats.shard import create_shard, open_shard
from beam_envelope.io.keystore import create_dataset_key, create_records, open_key_store, open_records
from beam_envelope.keys.allowed import AllowedKeys
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.cache import DataKeyPolicy
from beam_envelope.keys.context import ANY_CONTEXT
from beam_envelope.keys.local import LocalKms
from beam_envelope.keys.provider import DataKey, KeyProvider, Need, WrappedKey
from beam_envelope.keys.uri import open_key
from beam_envelope.keys.vault import Vault

if TYPE_CHECKING:
    from beam_envelope.formats.parquet import create_parquet, open_parquet
    from beam_envelope.io.fileio import WriteEncryptedFiles
    from beam_envelope.io.filesystem import EncryptedPath, register_filesystem
    from beam_envelope.io.options import EnvelopeOptions
    from beam_envelope.io.parquet_bundle import EncryptedParquetFile
    from beam_envelope.io.parquet_read import (
        ReadAllEncryptedParquet,
        ReadAllEncryptedParquetBatched,
        ReadEncryptedParquet,
        ReadEncryptedParquetBatched,
    )
    from beam_envelope.io.parquet_write import WriteEncryptedParquet
    from beam_envelope.io.text import ReadAllEncryptedText, ReadEncryptedText, WriteEncryptedText
    from beam_envelope.preflight import check_workers
    from beam_envelope.transforms.columns import DecryptColumns, EncryptColumns
    from beam_envelope.transforms.elements import FailedRecord
    from beam_envelope.transforms.fields import DecryptFields, EncryptFields
    from beam_envelope.transforms.files import DecryptFiles, EncryptFiles
    from beam_envelope.transforms.plan import DecryptedFile, EncryptedFile, FailedFile
    from beam_envelope.transforms.records import DecryptRecords, EncryptRecords
    from beam_envelope.transforms.rotate import RotatedFile, RotateKeys
    from beam_envelope.transforms.secret import AwsKmsSecret
    from beam_envelope.transforms.table_plan import DecryptedTable, EncryptedTable
    from beam_envelope.transforms.tables import DecryptTables, EncryptTables
    from beam_envelope.transforms.verify import VerifyShards
    from beam_envelope.transforms.verify_plan import VerifiedFile

__version__ = "0.1.0"

__all__ = [
    "ANY_CONTEXT",
    "AllowedKeys",
    "AlreadyEncryptedError",
    "AwsKms",
    "AwsKmsSecret",
    "ContextMismatchError",
    "DataKey",
    "DataKeyPolicy",
    "DecryptColumns",
    "DecryptFields",
    "DecryptFiles",
    "DecryptRecords",
    "DecryptTables",
    "DecryptedFile",
    "DecryptedTable",
    "EncryptColumns",
    "EncryptFields",
    "EncryptFiles",
    "EncryptRecords",
    "EncryptTables",
    "EncryptedFile",
    "EncryptedParquetFile",
    "EncryptedPath",
    "EncryptedTable",
    "EnvelopeError",
    "EnvelopeOptions",
    "FailedFile",
    "FailedRecord",
    "FormatError",
    "KeyAccessError",
    "KeyFileMissingError",
    "KeyProvider",
    "KmsUnavailableError",
    "LocalKms",
    "ManifestError",
    "Need",
    "NotEncryptedError",
    "ReadAllEncryptedParquet",
    "ReadAllEncryptedParquetBatched",
    "ReadAllEncryptedText",
    "ReadEncryptedParquet",
    "ReadEncryptedParquetBatched",
    "ReadEncryptedText",
    "RecordDecryptor",
    "RecordEncryptor",
    "RotateKeys",
    "RotatedFile",
    "TamperedError",
    "TruncatedError",
    "Vault",
    "VerifiedFile",
    "VerifyShards",
    "WrappedKey",
    "WriteEncryptedFiles",
    "WriteEncryptedParquet",
    "WriteEncryptedText",
    "WrongKeyError",
    "check_workers",
    "create_dataset_key",
    "create_parquet",
    "create_records",
    "create_shard",
    "open_key",
    "open_key_store",
    "open_parquet",
    "open_records",
    "open_shard",
    "register_filesystem",
]

# Beam takes seconds to import and pyarrow a third of one, and shards need neither: these names bring them in when they
# are first used.
_LATE = {
    "AwsKmsSecret": "beam_envelope.transforms.secret",
    "DecryptColumns": "beam_envelope.transforms.columns",
    "DecryptFields": "beam_envelope.transforms.fields",
    "DecryptFiles": "beam_envelope.transforms.files",
    "DecryptRecords": "beam_envelope.transforms.records",
    "DecryptTables": "beam_envelope.transforms.tables",
    "DecryptedTable": "beam_envelope.transforms.table_plan",
    "DecryptedFile": "beam_envelope.transforms.plan",
    "EncryptColumns": "beam_envelope.transforms.columns",
    "EncryptFields": "beam_envelope.transforms.fields",
    "EncryptFiles": "beam_envelope.transforms.files",
    "EncryptRecords": "beam_envelope.transforms.records",
    "EncryptTables": "beam_envelope.transforms.tables",
    "EncryptedTable": "beam_envelope.transforms.table_plan",
    "EncryptedFile": "beam_envelope.transforms.plan",
    "EncryptedParquetFile": "beam_envelope.io.parquet_bundle",
    "EncryptedPath": "beam_envelope.io.filesystem",
    "EnvelopeOptions": "beam_envelope.io.options",
    "FailedFile": "beam_envelope.transforms.plan",
    "FailedRecord": "beam_envelope.transforms.elements",
    "ReadAllEncryptedParquet": "beam_envelope.io.parquet_read",
    "ReadAllEncryptedParquetBatched": "beam_envelope.io.parquet_read",
    "ReadAllEncryptedText": "beam_envelope.io.text",
    "ReadEncryptedParquet": "beam_envelope.io.parquet_read",
    "ReadEncryptedParquetBatched": "beam_envelope.io.parquet_read",
    "ReadEncryptedText": "beam_envelope.io.text",
    "RotateKeys": "beam_envelope.transforms.rotate",
    "RotatedFile": "beam_envelope.transforms.rotate",
    "VerifiedFile": "beam_envelope.transforms.verify_plan",
    "VerifyShards": "beam_envelope.transforms.verify",
    "WriteEncryptedFiles": "beam_envelope.io.fileio",
    "WriteEncryptedParquet": "beam_envelope.io.parquet_write",
    "WriteEncryptedText": "beam_envelope.io.text",
    "check_workers": "beam_envelope.preflight",
    "create_parquet": "beam_envelope.formats.parquet",
    "open_parquet": "beam_envelope.formats.parquet",
    "register_filesystem": "beam_envelope.io.filesystem",
}


def __getattr__(name: str) -> object:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
