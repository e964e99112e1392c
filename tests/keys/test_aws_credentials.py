"""Roles that a worker assumes to use its key: with AWS credentials, or with the identity of a Google Cloud machine."""

import json
import logging
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import apache_beam as beam
import boto3
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to

from beam_envelope import jobs
from beam_envelope.errors import FormatError, KeyAccessError, KmsUnavailableError
from beam_envelope.keys import aws, aws_credentials, google_identity, wire_log
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.aws_credentials import Identity
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.defaults import option_or_environment
from beam_envelope.keys.uri import open_key
from beam_envelope.testing import FakeKms
from tests.identities import EMAIL, NUMBER, Metadata, Sts

ROLE = "arn:aws:iam::111122223333:role/etl"
MOTO_ROLE = "arn:aws:iam::123456789012:role/team/etl"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Take the waits out of retries; return those of the metadata server."""
    waits = []
    monkeypatch.setattr(google_identity, "_sleep", waits.append)
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda _: None))
    return waits


@pytest.fixture
def sts(fake_kms, monkeypatch):
    with Sts() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        fake_kms.create_key("etl")
        yield server


@pytest.fixture
def metadata(monkeypatch):
    with Metadata() as server:
        monkeypatch.setenv("GCE_METADATA_HOST", server.host)
        yield server


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests move on."""
    clock = SimpleNamespace(now=datetime.now(timezone.utc))
    clock.forward = lambda **time: setattr(clock, "now", clock.now + timedelta(**time))
    monkeypatch.setattr(aws_credentials, "_now", lambda: clock.now)
    monkeypatch.setattr("botocore.credentials._local_now", lambda: clock.now)
    return clock


def key_of(kind, **settings):
    google = {"web_identity": "google"} if kind == "google" else {}
    return AwsKms("alias/etl", **{"role_arn": ROLE, **google, **settings})


@pytest.fixture(params=["role", "google"])
def key(request, sts, metadata):
    """A key that is used as a role, which is assumed in either way."""
    if request.param == "google":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            request.getfixturevalue("monkeypatch").delenv(name)
    return key_of(request.param)


def signers_of(key):
    """Return a list that will hold the access keys of the requests to the key."""
    signers = []

    def keep(request, **_):
        signers.append(re.search(r"Credential=(\w+)/", request.headers["Authorization"].decode())[1])

    key._client("Decrypt").meta.events.register("before-send.kms", keep)
    return signers


def message(error, call, *arguments):
    with pytest.raises(error) as caught:
        call(*arguments)
    assert type(caught.value) is error
    return str(caught.value)


# The happy path


def test_the_role_is_assumed_once_and_signs_all_requests(key, sts, fake_kms):
    signers = signers_of(key)
    assert sts.requests == [], "nothing is asked before it is needed"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: key.generate_data_key({}).close(), range(20)))
    assert len(sts.requests) == 1
    assert signers == ["ASIATEMPORARY0000001"] * 20
    assert fake_kms.calls == {"GenerateDataKey": 20}


@pytest.mark.parametrize("kind", ["role", "google"])
def test_moto_gives_a_role_that_it_knows_again(kind, moto_server, metadata, monkeypatch):
    kms = boto3.client("kms")
    kms.create_alias(AliasName="alias/etl", TargetKeyId=kms.create_key()["KeyMetadata"]["KeyId"])
    key = key_of(kind, role_arn=MOTO_ROLE, session_name="nightly")
    signers = signers_of(key)
    with key.generate_data_key({"a": "b"}) as data_key:
        key.unwrap(data_key.wrapped_keys[0], {"a": "b"}).close()
    (signer,) = set(signers)
    who = boto3.client("sts", aws_access_key_id=signer, aws_secret_access_key="x").get_caller_identity()
    assert who["Arn"] == "arn:aws:sts::123456789012:assumed-role/etl/nightly"


def test_a_role_is_asked_for_with_its_external_id_by_the_usual_credentials(sts):
    key_of("role", external_id="ours", session_name="nightly").check({})
    (request,) = sts.requests
    assert request["Action"] == "AssumeRole"
    assert (request["RoleArn"], request["ExternalId"], request["RoleSessionName"]) == (ROLE, "ours", "nightly")
    assert "Credential=testing/" in sts.signers[0]


def test_a_profile_assumes_the_role(sts, tmp_path, monkeypatch):
    path = tmp_path / "credentials"
    path.write_text("[other]\naws_access_key_id = AKIAOTHER\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    key_of("role", profile="other").check({})
    assert "Credential=AKIAOTHER/" in sts.signers[0]


def test_google_is_asked_for_a_token_as_it_wants_to_be_and_aws_without_a_signature(sts, metadata, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # the metadata server is never behind a proxy
    token = google_identity.identity_token("https://ours.example/?a&b")
    path = "/computeMetadata/v1/instance/service-accounts/default/identity"
    assert metadata.requests == [(path, {"audience": "https://ours.example/?a&b", "format": "full"}, "Google")]
    assert google_identity.claims(token)["email"] == EMAIL
    monkeypatch.delenv("http_proxy")
    key_of("google").check({})
    (request,) = sts.requests
    assert (request["Action"], request["RoleArn"]) == ("AssumeRoleWithWebIdentity", ROLE)
    assert (request["WebIdentityToken"], request["RoleSessionName"]) == (metadata.tokens[1], "beam-envelope")
    assert sts.signers == [None]


def test_the_audience_is_that_of_aws_unless_it_is_said(sts, metadata):
    key_of("google").check({})
    assert metadata.requests[0][1]["audience"] == "sts.amazonaws.com"


def test_without_a_setting_the_host_is_googles(monkeypatch):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    assert google_identity.metadata_host() == "metadata.google.internal"


# Credentials that end


def test_credentials_are_fetched_anew_before_they_end(key, sts, metadata, clock, fake_kms):
    sts.clock = lambda: clock.now
    signers = signers_of(key)
    for _ in range(6):
        key.generate_data_key({}).close()
        clock.forward(minutes=30)
    # An hour each, and a new one in the last quarter of it.
    assert signers == [f"ASIATEMPORARY{n:07}" for n in (1, 1, 2, 2, 3, 3)]
    assert len(sts.requests) == 3
    assert len(metadata.tokens) == (3 if key.web_identity else 0), "each with a fresh token"


def test_a_job_goes_on_beyond_the_end_of_its_credentials(key, sts, clock):
    sts.clock = lambda: clock.now
    signers = signers_of(key)

    def encrypt(number):
        open_key(key).generate_data_key({}).close()
        clock.forward(minutes=30)
        return number

    _clock_of_job.append(encrypt)
    try:
        with jobs.make_pipeline(PipelineOptions([]), 1, 0) as p:
            assert_that(p | beam.Create(range(6)) | beam.Map(_in_job), equal_to(list(range(6))))
    finally:
        _clock_of_job.clear()
    assert len(sts.requests) == len(set(signers)) == 3


_clock_of_job = []


def _in_job(number):
    """Call what is no part of the pickled pipeline; a function of a module is pickled by its name."""
    return _clock_of_job[0](number)


def test_a_refresh_that_fails_in_good_time_is_tried_again_and_at_the_end_stops_the_job(sts, metadata, clock, caplog):
    sts.clock = lambda: clock.now
    key = key_of("google")
    key.check({})
    metadata.statuses = [503] * 1000
    clock.forward(minutes=48)
    key.check({})  # the credentials still hold
    clock.forward(minutes=10)
    said = message(KmsUnavailableError, key.check, {})
    assert "gave no identity token, so no AWS role can be assumed: it answers with status 503" in said
    metadata.statuses = []
    key.check({})
    assert len(sts.requests) == 2
    assert "Traceback" not in caplog.text, "the error says it all, and says it once"


# Google's metadata server


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_metadata_server_is_asked_again(metadata, no_waiting, status):
    metadata.statuses = [status] * 3
    assert google_identity.identity_token("a") == metadata.tokens[0]
    assert no_waiting == [0.5, 1.0, 2.0]
    metadata.statuses = [status] * 4
    assert message(KmsUnavailableError, google_identity.identity_token, "a") == (
        f"Google's metadata server ({metadata.host}) gave no identity token, so no AWS role can be assumed: it answers "
        f"with status {status}. --envelope_aws_web_identity=google works on Google Cloud's machines only; elsewhere "
        "leave it out. There, run the job again"
    )


def test_elsewhere_there_is_no_metadata_server(monkeypatch, no_waiting):
    with Metadata() as gone:
        monkeypatch.setenv("GCE_METADATA_HOST", gone.host)
    said = message(KmsUnavailableError, google_identity.identity_token, "a")
    assert said.startswith(
        f"Google's metadata server ({gone.host}) gave no identity token, so no AWS role can be assumed"
    )
    assert "Connection refused. --envelope_aws_web_identity=google works on Google Cloud's machines only" in said
    assert len(no_waiting) == 3


def test_a_machine_without_a_service_account(metadata, no_waiting):
    metadata.statuses = [404]
    assert message(KeyAccessError, google_identity.identity_token, "a") == (
        f"this machine has no Google service account ({metadata.host} answers 404), so no AWS role can be assumed. "
        "Give the workers one (on Dataflow: --service_account_email=NAME@PROJECT.iam.gserviceaccount.com)"
    )
    metadata.statuses = [403]
    said = message(KeyAccessError, google_identity.identity_token, "a")
    assert said.startswith(f"Google's metadata server ({metadata.host}) refuses an identity token with status 403")
    assert "BODY-CANARY" not in said
    assert no_waiting == []


@pytest.mark.parametrize(("headers", "body"), [({}, None), ({"Metadata-Flavor": "Google"}, "no token")])
def test_what_is_not_googles_is_not_believed(metadata, headers, body):
    metadata.headers, metadata.body = headers, body
    said = message(KeyAccessError, google_identity.identity_token, "a")
    assert said.startswith(
        f"what answers at {metadata.host} is not Google's metadata server: it gave no identity token"
    )
    assert "no token" not in said


@pytest.mark.parametrize("token", ["", "a.b.c", "a.W10.c", "a.YQ.c", "a"])
def test_claims_that_cannot_be_read_are_none(token):
    assert google_identity.claims(token) == {}


# Refusals of STS


def test_a_role_that_does_not_trust_the_caller(sts):
    user = "arn:aws:iam::444455556666:user/beam"
    said = f"User: {user} is not authorized to perform: sts:AssumeRole on resource: {ROLE}"
    sts.refusals = [(403, "AccessDenied", said)]
    assert message(KeyAccessError, key_of("role").check, {}) == (
        f"{user} may not assume role {ROLE}. The role's trust policy must hold "
        f'{{"Effect": "Allow", "Principal": {{"AWS": "{user}"}}, "Action": "sts:AssumeRole"}}, and the caller\'s own '
        "policy must allow sts:AssumeRole on the role; if it asks for an external id, give --envelope_aws_external_id. "
        f"AWS says AccessDenied: {said}"
    )
    session = "arn:aws:sts::444455556666:assumed-role/worker/i-0123"
    sts.refusals = [(403, "AccessDenied", said.replace(user, session))]
    said = message(KeyAccessError, key_of("role", external_id="ours").check, {})
    assert said.startswith(
        f"{session} may not assume role {ROLE}. The role's trust policy must hold "
        '{"Effect": "Allow", "Principal": {"AWS": "arn:aws:iam::444455556666:role/worker"}, '
        '"Action": "sts:AssumeRole", "Condition": {"StringEquals": {"sts:ExternalId": "ours"}}}, and the caller\'s own '
        "policy must allow sts:AssumeRole on the role. AWS says"
    )
    sts.refusals = [(403, "AccessDenied", "no")]
    said = message(KeyAccessError, key_of("role", session_name="other").check, {})
    assert said.startswith("the caller (aws sts get-caller-identity shows who that is) may not assume role")


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidIdentityToken", "IDPRejectedClaim", "ExpiredTokenException"])
def test_a_role_that_does_not_trust_the_google_service_account(sts, metadata, code):
    sts.refusals = [(403 if code == "AccessDenied" else 400, code, "no")]
    said = message(KeyAccessError, key_of("google", audience="ours").check, {})
    condition = {f"accounts.google.com:{name}": NUMBER for name in ("aud", "oaud", "sub")}
    condition["accounts.google.com:oaud"] = "ours"
    statement = {
        "Effect": "Allow",
        "Principal": {"Federated": "accounts.google.com"},
        "Action": "sts:AssumeRoleWithWebIdentity",
        "Condition": {"StringEquals": condition},
    }
    assert said == (
        f"the Google service account {EMAIL} may not assume role {ROLE}. The role's trust policy must hold "
        f"{json.dumps(statement)}. AWS says {code}: no"
    )


@pytest.mark.parametrize(
    ("status", "code", "error", "start"),
    [
        (
            400,
            "ValidationError",
            KeyAccessError,
            f"AWS does not take the role {ROLE}, its session name or its external id.",
        ),
        (400, "Throttling", KmsUnavailableError, f"AWS STS did not give the credentials of role {ROLE} after all"),
        (503, "ServiceUnavailable", KmsUnavailableError, f"AWS STS did not give the credentials of role {ROLE}"),
        (403, "InvalidClientTokenId", KeyAccessError, f"AWS STS refused to give the credentials of role {ROLE}; check"),
    ],
)
def test_other_refusals(sts, status, code, error, start):
    sts.refusals = [(status, code, "no")] * 100
    said = message(error, key_of("role").check, {})
    assert said.startswith(start)
    assert said.endswith(f"AWS says {code}: no")
    assert len(sts.requests) == (8 if error is KmsUnavailableError else 1)


def test_a_session_name_that_boto3_does_not_take(sts):
    said = message(KeyAccessError, key_of("role", session_name="x").check, {})
    assert said.startswith(
        f"AWS does not take the role {ROLE}, its session name or its external id. Parameter validation"
    )


def test_an_sts_that_is_not_there(sts, monkeypatch):
    with Sts() as gone:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://{gone.host}")
    said = message(KmsUnavailableError, key_of("role").check, {})
    assert said.startswith(f"AWS STS could not be reached to assume role {ROLE}: Could not connect to the endpoint URL")
    assert said.endswith("Check network and endpoint (AWS_ENDPOINT_URL_STS)")


def test_a_role_needs_credentials_that_assume_it(sts, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    said = message(KeyAccessError, key_of("role").check, {})
    assert said.startswith(f"no usable AWS credentials to assume role {ROLE} with: Unable to locate credentials.")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    key_of("role").check({})  # they are looked for again


# Settings


def test_a_uri_holds_all_settings_and_comes_back():
    uri = f"aws-kms://alias/etl?region=eu-west-1&role_arn={ROLE}&web_identity=google&audience=ours&session_name=s"
    key = open_key(uri)
    expected = AwsKms(
        "alias/etl", region="eu-west-1", role_arn=ROLE, web_identity="google", audience="ours", session_name="s"
    )
    assert key == expected
    assert open_key(str(key)) == pickle.loads(pickle.dumps(key)) == key


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"role_arn": "etl"}, "'etl' is not the ARN of a role; one looks like arn:aws:iam::ACCOUNT:role/NAME"),
        ({"web_identity": "azure", "role_arn": ROLE}, "web_identity is 'google', not 'azure'. A token in a file (EKS)"),
    ],
)
def test_settings_of_a_wrong_form(settings, said, monkeypatch):
    assert message(FormatError, lambda: AwsKms("alias/etl", **settings)).startswith(said)
    for name, value in settings.items():
        monkeypatch.setenv(f"BEAM_ENVELOPE_AWS_{name.upper()}", value)
    denied = message(KeyAccessError, AwsKms("alias/etl").check, {})  # which never becomes a dead letter of each file
    assert denied.startswith(said)
    assert denied.endswith(". It comes from --envelope_aws_... or BEAM_ENVELOPE_AWS_...")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"web_identity": "google"}, "web_identity=google needs the role to assume: give --envelope_aws_role_arn="),
        ({"web_identity": "google", "role_arn": ROLE, "external_id": "a"}, "an external id is not for web_identity="),
    ],
)
def test_settings_that_do_not_go_together(settings, said):
    assert message(KeyAccessError, AwsKms("alias/etl", **settings).check, {}).startswith(said)


def test_each_setting_may_come_from_the_environment(sts, metadata, monkeypatch):
    for field in fields(Identity):
        monkeypatch.setenv(f"BEAM_ENVELOPE_AWS_{field.name.upper()}", field.name)
        assert option_or_environment(f"aws_{field.name}") == field.name
        monkeypatch.delenv(f"BEAM_ENVELOPE_AWS_{field.name.upper()}")
    monkeypatch.setenv("BEAM_ENVELOPE_AWS_ROLE_ARN", ROLE)
    monkeypatch.setenv("BEAM_ENVELOPE_AWS_WEB_IDENTITY", "google")
    monkeypatch.setenv("BEAM_ENVELOPE_AWS_AUDIENCE", "ours")
    monkeypatch.setenv("BEAM_ENVELOPE_AWS_SESSION_NAME", "nightly")
    AwsKms("alias/etl").check({})
    (request,) = sts.requests
    assert (request["RoleArn"], request["RoleSessionName"]) == (ROLE, "nightly")
    assert metadata.requests[0][1]["audience"] == "ours"
    other = ROLE.replace("etl", "other")
    AwsKms("alias/etl", role_arn=other).check({})
    assert sts.requests[1]["RoleArn"] == other, "what the key itself says comes first"


def test_each_identity_has_a_client_and_a_session_of_its_own_and_shares_it(sts, monkeypatch):
    built, session = [], boto3.Session
    monkeypatch.setattr(boto3, "Session", lambda **settings: built.append(settings) or session(**settings))
    key = key_of("role")
    other = replace(key, role_arn=ROLE.replace("etl", "other"))
    for _ in range(3):
        pickle.loads(pickle.dumps(key)).check({})
        other.check({})
    assert len(built) == len(sts.requests) == 2
    clear_caches()
    key.check({})
    assert len(built) == len(sts.requests) == 3


def test_two_endpoints_share_the_credentials_of_a_role(sts, fake_kms):
    key_of("role", region="us-east-1").check({})
    key_of("role", region="us-east-1", endpoint_url=fake_kms.endpoint_url).check({})
    assert (len(aws._clients), len(sts.requests)) == (2, 1)


def test_rewrapping_to_a_key_of_another_role_decrypts_as_one_and_encrypts_as_the_other(sts, fake_kms):
    key = key_of("role")
    form = key.generate_data_key({}).wrapped_keys[0]
    key.rewrap(form, {}, replace(key, session_name=None))
    key.rewrap(form, {}, AwsKms("alias/etl"))
    assert fake_kms.calls == {"GenerateDataKey": 1, "ReEncrypt": 1, "Decrypt": 1, "Encrypt": 1}


# Secrets


def everything_logged(caplog):
    return "\n".join(
        f"{record.getMessage()} {record.msg!r} {record.args!r} {record.exc_text}" for record in caplog.records
    )


def test_no_token_and_no_secret_key_shows_anywhere(key, sts, metadata, clock, caplog):
    caplog.set_level(logging.DEBUG)
    sts.clock = lambda: clock.now
    shown = []
    for _ in range(3):
        key.check({})
        clock.forward(hours=1)
    sts.refusals = [(403, "AccessDenied", "no")]
    shown.append(message(KeyAccessError, key.check, {}))
    client = key._client("Decrypt")
    credentials = client._request_signer._credentials
    role = credentials._refresh_using.__self__
    things = (key, key._identity(), client, credentials, role, role._fetcher, aws_credentials._sessions)
    shown += map(repr, things)
    shown += [pickle.dumps(key).decode("latin-1"), everything_logged(caplog)]
    secrets = [*sts.secrets, *metadata.tokens, "SIGNATURE-CANARY", "not-a-secret"]
    assert len(sts.secrets) == 6
    assert [secret for secret in secrets if any(secret in text for text in shown)] == []
    assert "urllib3" in [record.name.partition(".")[0] for record in caplog.records], "the rest of the log is there"


def test_without_the_filter_they_would_be_logged(key, sts, metadata, caplog, monkeypatch):
    monkeypatch.setattr(wire_log._WireLogFilter, "filter", lambda *_: True)
    caplog.set_level(logging.DEBUG)
    key.check({})
    logged = everything_logged(caplog)
    assert all(secret in logged for secret in (*sts.secrets, *metadata.tokens))


def test_nothing_is_logged_either_when_others_ask_for_the_credentials(key, sts, metadata, caplog):
    caplog.set_level(logging.DEBUG)
    key._client("Decrypt")._request_signer._credentials.get_frozen_credentials()
    assert len(sts.secrets) == 2
    assert [secret for secret in (*sts.secrets, *metadata.tokens) if secret in everything_logged(caplog)] == []


def test_of_a_failing_refresh_nothing_is_logged_and_the_log_goes_on(sts, metadata, caplog):
    caplog.set_level(logging.DEBUG)
    sts.refusals = [(403, "AccessDenied", "no")]
    message(KeyAccessError, key_of("google").check, {})
    assert "SIGNATURE-CANARY" not in everything_logged(caplog)
    caplog.clear()
    boto3.client("kms").describe_key(KeyId="alias/etl")
    assert "KeyMetadata" in everything_logged(caplog)


def test_two_kms_of_two_regions_are_used_as_one_role(sts, fake_kms):
    with FakeKms(region="eu-west-1") as there:
        there.create_key("etl")
        key_of("role").check({})
        key_of("role", region="eu-west-1", endpoint_url=there.endpoint_url).check({})
    assert [re.search(r"/(\w+-\w+-\d)/sts/", signer)[1] for signer in sts.signers] == ["us-east-1", "eu-west-1"]
    assert len(aws._clients) == 2
