"""Who calls AWS: boto3's usual chain or a profile, and the role that it assumes, if any; and boto3's sessions for it.

Roles are assumed by botocore's own fetchers, when they are first needed and again before their credentials end.
"""

from __future__ import annotations

import json
import os
import re
import threading
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from typing import Any, Final

import boto3
import botocore.session
from botocore import exceptions as boto_errors
from botocore.config import Config
from botocore.credentials import (
    AssumeRoleCredentialFetcher,
    AssumeRoleWithWebIdentityCredentialFetcher,
    CredentialProvider,
    CredentialResolver,
    DeferredRefreshableCredentials,
)

from beam_envelope.errors import EnvelopeError, FormatError, KeyAccessError, KmsUnavailableError
from beam_envelope.keys import google_identity
from beam_envelope.keys.aws_retries import be_patient
from beam_envelope.keys.defaults import option_or_environment
from beam_envelope.keys.wire_log import wire_log_off

GOOGLE: Final = "google"
AUDIENCE: Final = "sts.amazonaws.com"
"""For whom Google's token is, unless it is said: the `accounts.google.com:oaud` of the role's trust policy."""
SESSION_NAME: Final = "beam-envelope"

_ROLE: Final = re.compile(r"arn:[\w-]+:iam::\d{12}:role/[\w+=,.@/-]+", re.ASCII)
_ASSUMED: Final = re.compile(r"arn:(?P<partition>[\w-]+):sts::(?P<account>\d+):assumed-role/(?P<role>[^/]+)/.*")
_SAID_USER: Final = re.compile(r"User: (\S+) is not authorized")
_STS: Final = Config(
    connect_timeout=5,
    read_timeout=10,
    retries={"mode": "standard"},
    user_agent_extra="beam-envelope",
)
_DENIED: Final = {"AccessDenied", "AccessDeniedException"}
_NOT_TAKEN: Final = {"InvalidIdentityToken", "IDPRejectedClaim", "ExpiredTokenException"}
_SERVER_ERROR: Final = 500


@dataclass(frozen=True)
class Identity:
    """Who calls AWS. None of it is a secret, the external id neither (IAM User Guide, "Access for third parties").

    Args:
        profile: a profile of the AWS configuration. Default: boto3's usual chain.
        role_arn: the role to assume.
        external_id: what the role's trust policy may ask for.
        session_name: how CloudTrail shows the role's session. Default: `beam-envelope`.
        web_identity: `google`: assume the role with the identity token of this Google Cloud machine's service account;
            no AWS credentials are needed then.
        audience: for whom that token is. Default: `sts.amazonaws.com`.

    Raises:
        FormatError: a setting is not of the right form.
        KeyAccessError: the settings do not go together. (A FormatError could become a dead letter of each file.)
    """

    profile: str | None = None
    role_arn: str | None = None
    external_id: str | None = None
    session_name: str | None = None
    web_identity: str | None = None
    audience: str | None = None

    def __post_init__(self) -> None:
        """Check what would otherwise fail on a worker, or be ignored there."""
        check_role(self.role_arn, self.web_identity)
        if self.web_identity is not None and self.role_arn is None:
            msg = (
                "web_identity=google needs the role to assume: give --envelope_aws_role_arn="
                "arn:aws:iam::ACCOUNT:role/NAME, or BEAM_ENVELOPE_AWS_ROLE_ARN where options do not reach the workers"
            )
            raise KeyAccessError(msg)
        if self.web_identity is not None and self.external_id is not None:
            msg = "an external id is not for web_identity=google, whose trust policy names an audience; leave it out"
            raise KeyAccessError(msg)


def check_role(role_arn: str | None, web_identity: str | None) -> None:
    """Check the form of two settings. Raises FormatError."""
    if role_arn is not None and not _ROLE.fullmatch(role_arn):
        msg = f"{role_arn!r} is not the ARN of a role; one looks like arn:aws:iam::ACCOUNT:role/NAME"
        raise FormatError(msg)
    if web_identity not in {None, GOOGLE}:
        msg = (
            f"web_identity is {GOOGLE!r}, not {web_identity!r}. A token in a file (EKS) needs no setting of ours: set "
            "AWS_ROLE_ARN and AWS_WEB_IDENTITY_TOKEN_FILE"
        )
        raise FormatError(msg)


def s3_identity() -> Identity:
    """Return who calls S3: with `aws_role_for_s3`, the role of the options or the environment; else, the usual chain.

    Raises:
        KeyAccessError, FormatError: as `Identity`.
    """
    if not option_or_environment("aws_role_for_s3"):
        return Identity()
    identity = Identity(**{field.name: option_or_environment(f"aws_{field.name}") for field in fields(Identity)})
    if identity.role_arn is None:
        msg = "envelope_aws_role_for_s3 needs a role: give --envelope_aws_role_arn=arn:aws:iam::ACCOUNT:role/NAME"
        raise KeyAccessError(msg)
    return identity


# One session for each identity and region: it costs 100 to 280 ms, and the credentials of a role are fetched once.
_lock = threading.Lock()
_sessions: dict[tuple[Identity, str | None], boto3.Session] = {}


def new_client(service: Any, identity: Identity, region: str | None, **settings: Any) -> Any:  # boto3's client
    """Return a new client of a service, in this process's session of an identity and a region.

    The role is assumed by the first request, not here. Requests raise KeyAccessError and KmsUnavailableError if it
    cannot be.

    Raises:
        botocore's errors, for settings of AWS that are missing or wrong.
    """
    with _lock:
        session = _sessions.get((identity, region))
        if session is None:
            session = _sessions[identity, region] = _new_session(identity, region)
        return be_patient(session.client(service, **settings))


def clear_sessions() -> None:
    """Forget all sessions and their credentials, so that changed AWS settings are read anew."""
    global _lock  # noqa: PLW0603  # a lock held by another thread at fork stays locked in the child
    _lock = threading.Lock()
    _sessions.clear()


os.register_at_fork(after_in_child=clear_sessions)


def _new_session(identity: Identity, region: str | None) -> boto3.Session:
    inner = botocore.session.get_session()
    session = boto3.Session(botocore_session=inner, profile_name=identity.profile, region_name=region)
    if identity.role_arn is not None:
        chain = inner.get_component("credential_provider")
        role = _AssumedRole(identity, identity.role_arn, inner, chain)
        inner.register_component("credential_provider", CredentialResolver([role]))
    return session


def _now() -> datetime:
    return datetime.now(timezone.utc)


class _AssumedRole(CredentialProvider):
    """Gives the credentials of a role: fetched when first needed, and again a quarter of an hour before they end."""

    METHOD = "beam-envelope-role"

    def __init__(
        self, identity: Identity, role_arn: str, session: botocore.session.Session, chain: CredentialResolver
    ) -> None:
        super().__init__(session)
        self._identity, self._role_arn, self._inner, self._chain = identity, role_arn, session, chain
        self._fetcher: AssumeRoleCredentialFetcher | AssumeRoleWithWebIdentityCredentialFetcher | None = None
        self._claims: dict[str, Any] = {}

    def load(self) -> DeferredRefreshableCredentials:
        """Return credentials that fetch themselves."""
        return DeferredRefreshableCredentials(self._fetch, self.METHOD, _now)

    def _fetch(self) -> dict[str, Any]:
        with wire_log_off():
            try:
                if self._fetcher is None:
                    self._fetcher = self._new_fetcher()
                credentials: dict[str, Any] = self._fetcher.fetch_credentials()
            except boto_errors.ClientError as error:
                raise self._refused(error) from None
            except boto_errors.BotoCoreError as error:
                raise self._not_reached(error) from None
            return credentials

    def _new_fetcher(self) -> AssumeRoleCredentialFetcher | AssumeRoleWithWebIdentityCredentialFetcher:
        arguments = {"RoleSessionName": self._identity.session_name or SESSION_NAME}
        if self._identity.web_identity == GOOGLE:
            return AssumeRoleWithWebIdentityCredentialFetcher(self._client, self._token, self._role_arn, arguments)
        source = self._chain.load_credentials()
        if source is None:
            raise boto_errors.NoCredentialsError
        if self._identity.external_id is not None:
            arguments["ExternalId"] = self._identity.external_id
        return AssumeRoleCredentialFetcher(self._client, source, self._role_arn, arguments)

    def _client(self, service: Any, *, config: Config | None = None, **settings: Any) -> Any:
        return be_patient(self._inner.create_client(service, config=_STS.merge(config or Config()), **settings))

    def _token(self) -> str:
        token = google_identity.identity_token(self._identity.audience or AUDIENCE)
        self._claims = google_identity.claims(token)
        return token

    def _refused(self, error: boto_errors.ClientError) -> EnvelopeError:
        code = str(error.response.get("Error", {}).get("Code", ""))
        message = str(error.response.get("Error", {}).get("Message") or "no more")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        said = f"AWS says {code}: {message}"
        google = self._identity.web_identity == GOOGLE
        if code in _DENIED or (google and code in _NOT_TAKEN):
            return KeyAccessError(f"{self._google_denied() if google else self._denied(message)}. {said}")
        if code == "ValidationError":
            return KeyAccessError(f"{self._wrong()}. {said}")
        if status >= _SERVER_ERROR or "Throttl" in code or code == "IDPCommunicationError":
            return KmsUnavailableError(
                f"AWS STS did not give the credentials of role {self._role_arn} after all retries; run the job again. "
                f"{said}"
            )
        return KeyAccessError(
            f"AWS STS refused to give the credentials of role {self._role_arn}; check the credentials that assume it "
            f"(aws sts get-caller-identity shows whose they are). {said}"
        )

    def _wrong(self) -> str:
        return f"AWS does not take the role {self._role_arn}, its session name or its external id"

    def _denied(self, message: str) -> str:
        found = _SAID_USER.search(message)
        caller = found[1] if found else "the caller (aws sts get-caller-identity shows who that is)"
        assumed = _ASSUMED.fullmatch(caller)
        # A trust policy names the role, not its session. The ARN of a session leaves the role's path out.
        principal = "arn:{partition}:iam::{account}:role/{role}".format(**assumed.groupdict()) if assumed else caller
        external = self._identity.external_id
        statement: dict[str, Any] = {
            "Effect": "Allow",
            "Principal": {"AWS": principal if found else "ARN"},
            "Action": "sts:AssumeRole",
        }
        if external is not None:
            statement["Condition"] = {"StringEquals": {"sts:ExternalId": external}}
            hint = ""
        else:
            hint = "; if it asks for an external id, give --envelope_aws_external_id"
        return (
            f"{caller} may not assume role {self._role_arn}. The role's trust policy must hold "
            f"{json.dumps(statement)}, and the caller's own policy must allow sts:AssumeRole on the role{hint}"
        )

    def _google_denied(self) -> str:
        token = self._claims
        conditions = {
            "accounts.google.com:aud": token.get("azp", "NUMBER"),  # of a token that has both (IAM User Guide,
            "accounts.google.com:oaud": token.get("aud", "AUDIENCE"),  # "IAM and AWS STS condition context keys")
            "accounts.google.com:sub": token.get("sub", "NUMBER"),
        }
        statement = {
            "Effect": "Allow",
            "Principal": {"Federated": "accounts.google.com"},
            "Action": "sts:AssumeRoleWithWebIdentity",
            "Condition": {"StringEquals": conditions},
        }
        return (
            f"the Google service account {token.get('email', 'of this machine')} may not assume role {self._role_arn}. "
            f"The role's trust policy must hold {json.dumps(statement)}"
        )

    def _not_reached(self, error: boto_errors.BotoCoreError) -> EnvelopeError:
        if isinstance(error, boto_errors.NoRegionError):
            return KeyAccessError(
                f"no AWS region is set to assume role {self._role_arn} in. Set AWS_DEFAULT_REGION, or name the key's "
                "region (aws-kms://...?region=REGION)"
            )
        if isinstance(error, boto_errors.ParamValidationError):
            return KeyAccessError(f"{self._wrong()}. {error}")
        if isinstance(error, (boto_errors.HTTPClientError, boto_errors.EndpointConnectionError)):
            return KmsUnavailableError(
                f"AWS STS could not be reached to assume role {self._role_arn}: {error}. Check network and endpoint "
                "(AWS_ENDPOINT_URL_STS)"
            )
        return KeyAccessError(
            f"no usable AWS credentials to assume role {self._role_arn} with: {error}. Set a profile, a role or the "
            "environment (aws sts get-caller-identity shows who you are); on Google Cloud, "
            "--envelope_aws_web_identity=google needs none"
        )
