"""S3 as a role: only where it is asked for, and without a session token in the log."""

import logging

import boto3
import pytest
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from beam_envelope.errors import KeyAccessError
from beam_envelope.io.s3 import S3Store, clear_s3_clients, s3_client
from beam_envelope.keys import wire_log
from beam_envelope.testing.filesystem import CANARY
from tests.identities import Sts

ROLE = "arn:aws:iam::123456789012:role/etl"


@pytest.fixture
def sts(moto_server, monkeypatch):
    """A bucket of moto's, and an STS whose role `BEAM_ENVELOPE_AWS_ROLE_ARN` names."""
    boto3.client("s3").create_bucket(Bucket="bucket")
    clear_s3_clients()
    FileSystems.set_options(PipelineOptions([]))
    with Sts() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("BEAM_ENVELOPE_AWS_ROLE_ARN", ROLE)
        yield server
    clear_s3_clients()
    FileSystems.set_options(PipelineOptions([]))


def write_and_read():
    """Write an object and read it; return the access keys of the requests."""
    signers = set()

    def keep(request, **_):
        signers.add(request.headers["Authorization"].decode().partition("Credential=")[2].partition("/")[0])

    s3_client().meta.events.register("before-send.s3", keep)
    output = S3Store().create("s3://bucket/a", overwrite=True, size_hint=0)
    output.write(CANARY * 1000)
    output.commit()
    with S3Store().open("s3://bucket/a") as stream:
        assert stream.read() == CANARY * 1000
    return signers


def test_s3_is_used_as_the_usual_caller_unless_it_is_said(sts):
    assert write_and_read() == {"testing"}
    assert sts.requests == []


def test_s3_is_used_as_the_role_if_it_is_said(sts, monkeypatch):
    monkeypatch.setenv("BEAM_ENVELOPE_AWS_ROLE_FOR_S3", "1")
    assert write_and_read() == {"ASIATEMPORARY0000001"}
    (request,) = sts.requests
    assert request["RoleArn"] == ROLE


def test_credentials_in_beams_own_options_come_first(sts, monkeypatch):
    monkeypatch.setenv("BEAM_ENVELOPE_AWS_ROLE_FOR_S3", "1")
    FileSystems.set_options(PipelineOptions(["--s3_access_key_id=ours", "--s3_secret_access_key=s"]))
    assert write_and_read() == {"ours"}
    assert sts.requests == []


def test_it_needs_a_role(sts, monkeypatch):
    monkeypatch.setenv("BEAM_ENVELOPE_AWS_ROLE_FOR_S3", "1")
    monkeypatch.delenv("BEAM_ENVELOPE_AWS_ROLE_ARN")
    with pytest.raises(KeyAccessError, match=r"^envelope_aws_role_for_s3 needs a role: give --envelope_aws_role_arn="):
        S3Store().size("s3://bucket/a")


def test_a_role_that_cannot_be_assumed_says_so(sts, monkeypatch):
    monkeypatch.setenv("BEAM_ENVELOPE_AWS_ROLE_FOR_S3", "1")
    sts.refusals = [(403, "AccessDenied", "no")]
    with pytest.raises(KeyAccessError, match=f"may not assume role {ROLE}. The role's trust policy must hold"):
        S3Store().size("s3://bucket/a")


def test_neither_plaintext_nor_a_session_token_is_logged(sts, monkeypatch, caplog):
    monkeypatch.setenv("BEAM_ENVELOPE_AWS_ROLE_FOR_S3", "1")
    caplog.set_level(logging.DEBUG)
    write_and_read()
    with pytest.raises(FileNotFoundError):
        S3Store().open("s3://bucket/none").read()
    assert len(sts.secrets) == 2
    assert [secret for secret in (*sts.secrets, CANARY.decode()) if secret in caplog.text] == []
    caplog.clear()
    boto3.client("s3").list_objects_v2(Bucket="bucket")
    assert "ListBucketResult" in caplog.text, "other clients log as ever, also after a request that failed"


def test_without_the_filter_the_session_token_would_be_logged(sts, monkeypatch, caplog):
    monkeypatch.setattr(wire_log._WireLogFilter, "filter", lambda *_: True)
    monkeypatch.setenv("BEAM_ENVELOPE_AWS_ROLE_FOR_S3", "1")
    caplog.set_level(logging.DEBUG)
    write_and_read()
    assert all(secret in caplog.text for secret in sts.secrets)
