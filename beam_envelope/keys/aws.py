"""AwsKms: a symmetric AWS KMS key, through boto3."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Final
from urllib.parse import parse_qsl, urlencode

from botocore import exceptions as boto_errors
from botocore.config import Config

from beam_envelope.errors import (
    FormatError,
    KeyAccessError,
    TamperedError,
    WrongKeyError,
)
from beam_envelope.keys import aws_check, aws_errors, aws_state
from beam_envelope.keys.aws_credentials import Identity, check_role, clear_sessions, new_client
from beam_envelope.keys.defaults import option, option_or_environment
from beam_envelope.keys.provider import (
    DATA_KEY_BYTES,
    DATA_KEY_SIZES,
    NOTHING,
    DataKey,
    KeyProvider,
    Need,
    WrappedKey,
    kms_calls,
)
from beam_envelope.keys.state import KeyState
from beam_envelope.keys.wire_log import wire_log_off

_ARN: Final = re.compile(r"arn:(?P<partition>[\w-]+):kms:(?P<region>[\w-]+):(?P<account>\d+):(?P<resource>.+)")
_IDENTITY: Final = tuple(field.name for field in fields(Identity))
_SETTINGS: Final = ("region", "profile", "endpoint_url", *_IDENTITY[1:])
_FORM: Final = "aws-kms://KEY_ID[?region=...&profile=...&endpoint_url=...&role_arn=...]"


@dataclass(frozen=True)
class AwsKms(KeyProvider):
    """An AWS KMS key.

    Args:
        key_id: `alias/NAME`, a key id, a key ARN or an alias ARN.
        region: where the key is. Default: the ARN's region, or the usual AWS settings.
        profile: a profile of the AWS configuration. Default: the usual credentials chain.
        endpoint_url: another endpoint, such as a VPC endpoint. Default: the usual AWS settings
            (`AWS_ENDPOINT_URL_KMS`, `AWS_ENDPOINT_URL`).
        role_arn: a role to assume. This and what follows: `aws_credentials.Identity` and docs/credentials.md.
        external_id: what the role's trust policy may ask for.
        session_name: how CloudTrail shows the role's session.
        web_identity: `google`, to assume the role with the identity token of a Google Cloud machine.
        audience: for whom that token is.

    What is not given comes from the pipeline options `--envelope_aws_region`, `--envelope_aws_role_arn` and so on, then
    from the environment (`BEAM_ENVELOPE_AWS_ROLE_ARN`).

    Permissions on the key: `kms:GenerateDataKey` to write, `kms:Decrypt` to read, `kms:Encrypt` for every key after the
    first when writing under several, `kms:ReEncryptFrom` and `kms:ReEncryptTo` to rotate, `kms:DescribeKey` to
    tell the key's state.
    """

    key_id: str
    region: str | None = None
    profile: str | None = None
    endpoint_url: str | None = None
    role_arn: str | None = None
    external_id: str | None = None
    session_name: str | None = None
    web_identity: str | None = None
    audience: str | None = None

    provider: ClassVar[str] = "aws-kms"

    def __post_init__(self) -> None:
        """Take the region from an ARN. Raises FormatError: a setting is not of the right form."""
        arn = _ARN.fullmatch(self.key_id)
        if self.key_id.startswith("arn:") and arn is None:
            msg = f"{self.key_id!r} is not the ARN of a KMS key; one looks like arn:aws:kms:REGION:ACCOUNT:key/ID"
            raise FormatError(msg)
        if arn is not None and self.region is None:
            object.__setattr__(self, "region", arn["region"])
        check_role(self.role_arn, self.web_identity)

    @classmethod
    def from_uri(cls, uri: str) -> AwsKms:
        """Parse `aws-kms://KEY_ID` or `aws-kms://KEY_ID?region=...&role_arn=...`, with any arguments of the class."""
        key_id, _, query = uri.removeprefix(f"{cls.provider}://").partition("?")
        settings = dict(parse_qsl(query))
        if not key_id or not settings.keys() <= set(_SETTINGS):
            msg = f"{uri!r} is not of the form {_FORM}"
            raise FormatError(msg)
        return replace(cls(key_id), **settings)

    def with_options(self) -> AwsKms:
        """Return the key with the pipeline's options for what it does not say, so that they travel with it."""
        return self._filled(option)

    def generate_data_key(self, context: Mapping[str, str]) -> DataKey:
        """Call GenerateDataKey for 32 bytes. Raises KeyAccessError, KmsUnavailableError."""
        answer = self._call(
            "GenerateDataKey", KeyId=self.key_id, NumberOfBytes=DATA_KEY_BYTES, EncryptionContext=dict(context)
        )
        if len(answer["Plaintext"]) != DATA_KEY_BYTES:
            msg = f"a data key has {DATA_KEY_BYTES} bytes; {self.key_id} made one of {len(answer['Plaintext'])}"
            raise ValueError(msg)
        wrapped = WrappedKey(self.provider, answer["KeyId"], answer["CiphertextBlob"])
        return DataKey(answer["Plaintext"], [wrapped])

    def wrap(self, data_key: DataKey, context: Mapping[str, str]) -> WrappedKey:
        """Call Encrypt with the data key. Raises KeyAccessError, KmsUnavailableError."""
        answer = self._call(
            "Encrypt", KeyId=self.key_id, Plaintext=bytes(data_key.material), EncryptionContext=dict(context)
        )
        return WrappedKey(self.provider, answer["KeyId"], answer["CiphertextBlob"])

    def unwrap(self, wrapped: WrappedKey, context: Mapping[str, str]) -> DataKey:
        """Call Decrypt with this key's id pinned, and check the key id that comes back.

        Raises:
            WrongKeyError, TamperedError, KeyAccessError, KmsUnavailableError.
        """
        if not self.may_open(wrapped):
            msg = f"the data key was wrapped by {wrapped.kms_key}, which is not {self.key_id}. Give that key with --key"
            raise WrongKeyError(msg)
        answer = self._call(
            "Decrypt", KeyId=self.key_id, CiphertextBlob=wrapped.wrapped, EncryptionContext=dict(context)
        )
        if answer["KeyId"] != wrapped.kms_key:
            msg = (
                f"the key file names {wrapped.kms_key}, but KMS decrypted its data key with {answer['KeyId']}: "
                "the key file was changed. Restore it from a copy"
            )
            raise TamperedError(msg)
        if len(answer["Plaintext"]) not in DATA_KEY_SIZES:
            msg = (
                f"what {wrapped.kms_key} decrypted has {len(answer['Plaintext'])} bytes, so it is no data key: "
                "the key file was changed. Restore it from a copy"
            )
            raise TamperedError(msg)
        return DataKey(answer["Plaintext"], [wrapped])

    def rewrap(self, wrapped: WrappedKey, context: Mapping[str, str], to: KeyProvider) -> WrappedKey:
        """Call ReEncrypt, so that the data key never leaves KMS; to another region or provider, decrypt and wrap.

        Raises:
            WrongKeyError, TamperedError, KeyAccessError, KmsUnavailableError.
        """
        if not isinstance(to, AwsKms) or not self.rewraps_inside(to):
            with self.unwrap(wrapped, context) as data_key:
                return to.wrap(data_key, context)
        if not self.may_open(wrapped):
            msg = (
                f"the data key was wrapped by {wrapped.kms_key}, which is not {self.key_id}. Give that key with --from"
            )
            raise WrongKeyError(msg)
        answer = self._call(
            "ReEncrypt",
            CiphertextBlob=wrapped.wrapped,
            SourceKeyId=self.key_id,
            SourceEncryptionContext=dict(context),
            DestinationKeyId=to.key_id,
            DestinationEncryptionContext=dict(context),
        )
        if answer["SourceKeyId"] != wrapped.kms_key:
            msg = (
                f"the key file names {wrapped.kms_key}, but KMS re-encrypted from {answer['SourceKeyId']}: "
                "the key file was changed. Restore it from a copy"
            )
            raise TamperedError(msg)
        return WrappedKey(self.provider, answer["KeyId"], answer["CiphertextBlob"])

    def may_open(self, wrapped: WrappedKey) -> bool:
        """Compare what can be compared without a call: the whole ARN, or the key id, account and region in it.

        An alias may point anywhere, so it may open any key of its region; KMS itself then refuses the wrong one.
        """
        theirs = _ARN.fullmatch(wrapped.kms_key)
        if wrapped.provider != self.provider or theirs is None or self.region not in {None, theirs["region"]}:
            return False
        ours = _ARN.fullmatch(self.key_id)
        if ours is not None and ours["account"] != theirs["account"]:
            return False
        name = ours["resource"] if ours is not None else self.key_id
        return name.startswith("alias/") or name.removeprefix("key/") == theirs["resource"].removeprefix("key/")

    def full_name(self) -> str:
        """Return the key's ARN; that of an alias or of a bare key id comes from DescribeKey. Raises as `unwrap`."""
        arn = _ARN.fullmatch(self.key_id)
        if arn is not None and arn["resource"].startswith("key/"):
            return self.key_id
        return str(self._call("DescribeKey", KeyId=self.key_id)["KeyMetadata"]["Arn"])

    def check(
        self,
        context: Mapping[str, str],
        need: Need = Need.GENERATE,
        *,
        sample: WrappedKey | None = None,
        to: KeyProvider | None = None,
    ) -> str | None:
        """Ask KMS, with `DryRun`, whether it would serve the request; as `KeyProvider.check`."""
        return aws_check.check(self, context, need, sample, to)

    def permission(self, need: Need) -> str:
        """Return the IAM actions; of a key that is named by its ARN, the name is known."""
        named = need is Need.NAME and ":key/" in self.key_id
        return NOTHING if named else aws_check.PERMISSIONS[need]

    def rewraps_inside(self, to: KeyProvider) -> bool:
        """Whether ReEncrypt can do it: both keys are of one KMS service. Raises KeyAccessError, FormatError."""
        return isinstance(to, AwsKms) and self._service() == to._service()  # noqa: SLF001  # the same class

    def principal(self) -> str | None:
        """Return the ARN that STS GetCallerIdentity gives, which needs no permission; or None."""
        return aws_check.principal(self)

    def state(self) -> KeyState:
        """Call DescribeKey, for which the caller needs `kms:DescribeKey`. Raises nothing of the KMS's."""
        return aws_state.state(self)

    def aliases(self) -> tuple[str, ...]:
        """Return the aliases that point to this key, `alias/NAME`; KMS tells those of the caller's account and region.

        Raises:
            KeyAccessError, KmsUnavailableError: as `unwrap`.
        """
        names: list[str] = []
        more: dict[str, str] = {}
        while True:
            answer = self._call("ListAliases", KeyId=self.key_id, **more)
            names += [entry["AliasName"] for entry in answer["Aliases"]]
            if not answer.get("Truncated"):
                return tuple(names)
            more = {"Marker": answer["NextMarker"]}

    def __str__(self) -> str:
        """Return the URI."""
        arn = _ARN.fullmatch(self.key_id)
        settings = {name: getattr(self, name) for name in _SETTINGS if getattr(self, name)}
        if arn is not None and settings.get("region") == arn["region"]:
            del settings["region"]
        return f"{self.provider}://{self.key_id}" + (f"?{urlencode(settings, safe=':/')}" if settings else "")

    def _filled(self, source: Callable[[str], Any]) -> AwsKms:
        """Return the key with what `source` has for settings that the key does not say."""
        found = {name: source(f"aws_{name}") for name in _SETTINGS if getattr(self, name) is None}
        found = {name: value for name, value in found.items() if value is not None}
        return replace(self, **found) if found else self

    def _full(self) -> AwsKms:
        """Return the key with all that holds in this process. Raises KeyAccessError: a setting is wrong."""
        try:
            return self._filled(option_or_environment)
        except FormatError as error:  # of a worker's settings, so it must not become a dead letter of each file
            msg = f"{error}. It comes from --envelope_aws_... or BEAM_ENVELOPE_AWS_..."
            raise KeyAccessError(msg) from None

    def _identity(self) -> Identity:
        return Identity(**{name: getattr(self, name) for name in _IDENTITY})

    def _service(self) -> tuple[object, ...]:
        """Return which KMS service, with whose credentials, a request goes to, also where the AWS settings say it."""
        meta = self._client("ReEncrypt").meta
        return (meta.region_name, meta.endpoint_url, self._full()._identity())  # noqa: SLF001

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:  # as boto3 has it
        kms_calls.counts[operation] += 1
        try:
            method = getattr(self._client(operation), _METHOD[operation])
            with wire_log_off():
                answer: dict[str, Any] = method(**arguments)
        except boto_errors.ClientError as error:
            if "DryRun" in arguments and error.response.get("Error", {}).get("Code") == "DryRunOperationException":
                return {}  # it would have succeeded
            raise aws_errors.refused(self, operation, error) from None
        except boto_errors.BotoCoreError as error:
            raise aws_errors.not_reached(self, operation, error) from None
        return answer

    def _client(self, operation: str) -> Any:  # boto3's client
        full = self._full()
        try:
            return _client(full.region, full.endpoint_url, full._identity())  # noqa: SLF001  # the same class
        except ValueError as error:  # botocore's own InvalidRegionError is one, too
            msg = f"the region or the endpoint of {full} is not of the right form: {error}"
            raise KeyAccessError(msg) from None  # a setting, so it must not become a dead letter of each file
        except boto_errors.BotoCoreError as error:
            raise aws_errors.not_reached(self, operation, error) from None


_METHOD: Final = {
    "GenerateDataKey": "generate_data_key",
    "Encrypt": "encrypt",
    "Decrypt": "decrypt",
    "ReEncrypt": "re_encrypt",
    "DescribeKey": "describe_key",
    "ListAliases": "list_aliases",
}

# One client per configuration and process: a boto3 Session costs 100 to 280 ms, and clients are thread-safe.
_lock = threading.Lock()
_clients: dict[tuple[object, ...], Any] = {}


def _client(region: str | None, endpoint_url: str | None, identity: Identity) -> Any:  # boto3's client
    key = (region, endpoint_url, identity)
    with _lock:
        if key not in _clients:
            _clients[key] = new_client(
                "kms",
                identity,
                region,
                endpoint_url=endpoint_url,
                config=Config(
                    connect_timeout=5,
                    read_timeout=10,
                    max_pool_connections=32,
                    # With a client-side rate limit once KMS throttles. Access and key errors are never sent again.
                    retries={"mode": "adaptive"},
                    user_agent_extra="beam-envelope",
                ),
            )
        return _clients[key]


def clear_clients() -> None:
    """Forget all clients and the credentials of roles, so that changed AWS settings are read anew."""
    global _lock  # noqa: PLW0603  # a lock held by another thread at fork stays locked in the child
    _lock = threading.Lock()
    _clients.clear()
    clear_sessions()


os.register_at_fork(after_in_child=clear_clients)
