"""What KMS answers or does not, as errors that name the key, the permission that is missing and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from botocore import exceptions as boto_errors

from beam_envelope.errors import (
    EnvelopeError,
    FormatError,
    KeyAccessError,
    KmsUnavailableError,
    TamperedError,
    WrongKeyError,
)
from beam_envelope.keys.aws_retries import is_throttling

if TYPE_CHECKING:
    from beam_envelope.keys.aws import AwsKms

_PERMISSION: Final = {
    "GenerateDataKey": "kms:GenerateDataKey",
    "Encrypt": "kms:Encrypt",
    "Decrypt": "kms:Decrypt",
    "ReEncrypt": "kms:ReEncryptFrom on the old key and kms:ReEncryptTo on the new one",
    "DescribeKey": "kms:DescribeKey (or name the key by its ARN, which needs none)",
    "ListAliases": "kms:ListAliases (for all resources, since it takes no key; or give no alias=)",
}
_SERVER_ERROR: Final = 500


def refused(  # noqa: PLR0911  # one for each answer of KMS
    key: AwsKms, operation: str, error: boto_errors.ClientError
) -> EnvelopeError:
    """Return the error for an answer of KMS."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    said = f"AWS says {code}: {error.response.get('Error', {}).get('Message') or 'no more'}"
    if code in {"AccessDeniedException", "AccessDenied"}:
        return KeyAccessError(
            f"not allowed to use KMS key {key.key_id}: the caller needs {_PERMISSION[operation]} on it, in its "
            f"IAM policy and in the key's policy. {said}"
        )
    if code == "NotFoundException":
        where = f"region {key.region}" if key.region else "the region of the AWS settings"
        return KeyAccessError(
            f"there is no KMS key {key.key_id} in {where}. Check the name and "
            f"the region (aws-kms://...?region=...). {said}"
        )
    if code in {"DisabledException", "KMSInvalidStateException"}:
        return KeyAccessError(
            f"KMS key {key.key_id} is disabled or pending deletion: nothing it wrapped opens until it is enabled "
            f"again (aws kms enable-key, or cancel-key-deletion first). {said}"
        )
    if code == "IncorrectKeyException":
        return WrongKeyError(
            f"KMS key {key.key_id} did not wrap this data key. Give the key that the key file names. {said}"
        )
    if code == "InvalidCiphertextException":
        return TamperedError(
            f"KMS key {key.key_id} does not open the wrapped data key: the key file or its encryption context was "
            f"changed after it was written. Restore the key file from a copy. {said}"
        )
    if code == "InvalidKeyUsageException":
        return KeyAccessError(
            f"KMS key {key.key_id} is no symmetric encryption key (SYMMETRIC_DEFAULT). Name one that is. {said}"
        )
    if code == "ValidationException":
        return FormatError(f"KMS does not take the key name {key.key_id!r} or the context. {said}")
    if status >= _SERVER_ERROR or is_throttling(code):
        return KmsUnavailableError(
            f"KMS did not serve {operation} on {key.key_id} after all retries; run the job again, or ask AWS for "
            f"a higher KMS request quota. {said}"
        )
    return KeyAccessError(f"KMS refused {operation} on {key.key_id}; check the AWS credentials. {said}")


def not_reached(key: AwsKms, operation: str, error: boto_errors.BotoCoreError) -> EnvelopeError:
    """Return the error for a request that KMS did not answer."""
    if isinstance(error, boto_errors.NoRegionError):
        return KeyAccessError(
            f"no AWS region is set for KMS key {key.key_id}. Set AWS_DEFAULT_REGION, or write {key}?region=REGION"
        )
    if isinstance(error, (boto_errors.HTTPClientError, boto_errors.EndpointConnectionError)):
        return KmsUnavailableError(
            f"KMS could not be reached for {operation} on {key.key_id}: {error}. Check network and endpoint"
        )
    if isinstance(error, boto_errors.ParamValidationError):
        return FormatError(f"KMS does not take the key name {key.key_id!r} or the context. {error}")
    return KeyAccessError(
        f"no usable AWS credentials for {operation} on {key.key_id}: {error}. Set a profile, a role or the "
        "environment (aws configure; aws sts get-caller-identity shows who you are)"
    )
