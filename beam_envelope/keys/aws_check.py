"""How `AwsKms.check` asks KMS what a job may do, without doing it, and STS who is asking.

A request with `DryRun` is authorized and validated as any other, and then answered by DryRunOperationException: no
data key leaves KMS ("Testing your permissions", AWS KMS Developer Guide). It counts against the same quota. A KMS that
knows no `DryRun`, as imitations may, serves the request, and what it answers is dropped.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import boto3
from botocore import exceptions as boto_errors
from botocore.config import Config

from beam_envelope.errors import EnvelopeError, WrongKeyError
from beam_envelope.keys.provider import DATA_KEY_BYTES, KeyProvider, Need, WrappedKey

if TYPE_CHECKING:
    from beam_envelope.keys.aws import AwsKms

PERMISSIONS: Final = {
    Need.GENERATE: "kms:GenerateDataKey",
    Need.WRAP: "kms:Encrypt",
    Need.UNWRAP: "kms:Decrypt",
    Need.REWRAP: "kms:ReEncryptFrom, kms:ReEncryptTo",
    Need.NAME: "kms:DescribeKey",
}


def check(
    key: AwsKms, context: Mapping[str, str], need: Need, sample: WrappedKey | None, to: KeyProvider | None
) -> str | None:
    """Do what `KeyProvider.check` says."""
    if need is Need.NAME:
        key.full_name()
        return None
    pairs = dict(context)
    if need is Need.GENERATE:
        _ask(key, need, KeyId=key.key_id, NumberOfBytes=DATA_KEY_BYTES, EncryptionContext=pairs)
    elif need is Need.WRAP:
        _ask(key, need, KeyId=key.key_id, Plaintext=secrets.token_bytes(DATA_KEY_BYTES), EncryptionContext=pairs)
    elif sample is None and not _knows_modifiers(key, need):
        return "no wrapped key is there to try it on, and this boto3 cannot ask without one; a newer one can"
    else:
        _check_opening(key, pairs, need, sample, key if to is None else to)
    return None


def _check_opening(key: AwsKms, pairs: dict[str, str], need: Need, sample: WrappedKey | None, to: KeyProvider) -> None:
    if sample is None:
        what: dict[str, Any] = {"DryRunModifiers": ["IGNORE_CIPHERTEXT"]}
    elif key.may_open(sample):
        what = {"CiphertextBlob": sample.wrapped}
    else:
        raise WrongKeyError(f"the data key was wrapped by {sample.kms_key}, which is not {key.key_id}. Give that key")
    if need is Need.UNWRAP:
        _ask(key, need, KeyId=key.key_id, EncryptionContext=pairs, **what)
    else:
        what |= {"SourceKeyId": key.key_id, "DestinationKeyId": getattr(to, "key_id", None)}
        _ask(key, need, SourceEncryptionContext=pairs, DestinationEncryptionContext=pairs, **what)


def principal(key: AwsKms) -> str | None:
    """Return the ARN of the caller, with the credentials that the KMS client has; None if STS does not tell."""
    try:
        client = key._client("GetCallerIdentity")  # noqa: SLF001  # part of it
        credentials = client._request_signer._credentials  # noqa: SLF001  # no public way leads from a client to them
        if credentials is None:
            return None
        frozen = credentials.get_frozen_credentials()
        sts = boto3.Session().client(
            "sts",
            region_name=client.meta.region_name,
            aws_access_key_id=frozen.access_key,
            aws_secret_access_key=frozen.secret_key,
            aws_session_token=frozen.token,
            config=Config(connect_timeout=3, read_timeout=5, retries={"total_max_attempts": 2}),
        )
        return str(sts.get_caller_identity()["Arn"])
    except (boto_errors.ClientError, boto_errors.BotoCoreError, EnvelopeError, AttributeError, KeyError, ValueError):
        return None


def _ask(key: AwsKms, need: Need, **arguments: Any) -> None:  # as boto3 has it
    key._call(need.value, **arguments, DryRun=True)  # noqa: SLF001  # part of it


def _knows_modifiers(key: AwsKms, need: Need) -> bool:
    model = key._client(need.value).meta.service_model.operation_model(need.value)  # noqa: SLF001  # part of it
    return "DryRunModifiers" in model.input_shape.members
