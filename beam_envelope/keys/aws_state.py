"""Whether an AWS KMS key can decrypt, as DescribeKey tells it."""

from __future__ import annotations

from datetime import timezone
from typing import TYPE_CHECKING, Final

from botocore import exceptions as boto_errors

from beam_envelope.errors import EnvelopeError
from beam_envelope.keys import aws_errors
from beam_envelope.keys.provider import kms_calls
from beam_envelope.keys.state import (
    DISABLED,
    ENABLED,
    NOT_FOUND,
    NOT_PERMITTED,
    PENDING_DELETION,
    UNAVAILABLE,
    UNKNOWN,
    KeyState,
)
from beam_envelope.keys.wire_log import wire_log_off

if TYPE_CHECKING:
    from beam_envelope.keys.aws import AwsKms

# "Key states of AWS KMS keys", AWS KMS Developer Guide. Creating, PendingImport and Unavailable: it does not decrypt.
_STATES: Final = {
    "Enabled": ENABLED,
    "Updating": ENABLED,
    "Disabled": DISABLED,
    "PendingDeletion": PENDING_DELETION,
    "PendingReplicaDeletion": PENDING_DELETION,
}
_PLAIN_STATES: Final = frozenset({"Enabled", "Disabled", "PendingDeletion"})
_STATE_OF_REFUSAL: Final = {
    "NotFoundException": NOT_FOUND,
    "AccessDeniedException": NOT_PERMITTED,
    "AccessDenied": NOT_PERMITTED,
}


def state(key: AwsKms) -> KeyState:
    """Call DescribeKey. Raises nothing of the KMS's."""
    kms_calls.counts["DescribeKey"] += 1
    try:
        with wire_log_off():
            described = key._client("DescribeKey").describe_key(KeyId=key.key_id)["KeyMetadata"]  # noqa: SLF001  # of the same package
    except boto_errors.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        found = _STATE_OF_REFUSAL.get(code, UNKNOWN)
        if found == NOT_PERMITTED:
            return KeyState(found, f"the caller needs kms:DescribeKey on it. AWS says {code}")
        return KeyState(found, str(aws_errors.refused(key, "DescribeKey", error)))
    except boto_errors.BotoCoreError as error:
        return KeyState(UNKNOWN, str(aws_errors.not_reached(key, "DescribeKey", error)))
    except EnvelopeError as error:  # no client
        return KeyState(UNKNOWN, str(error))
    said = str(described.get("KeyState", ""))
    due = described.get("DeletionDate")
    return KeyState(
        _STATES.get(said, UNAVAILABLE),
        "" if said in _PLAIN_STATES else f"AWS says {said}",
        due.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ") if due else "",
    )
