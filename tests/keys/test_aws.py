"""AwsKms, over HTTP, against a KMS that is as strict as AWS."""

import base64
import logging
import os
import pickle
import signal
from dataclasses import replace
from types import SimpleNamespace

import boto3
import pytest
from botocore import exceptions as boto_errors

from beam_envelope.errors import (
    FormatError,
    KeyAccessError,
    KmsUnavailableError,
    TamperedError,
    WrongKeyError,
)
from beam_envelope.keys import aws, aws_credentials, wire_log
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.provider import DataKey, WrappedKey, kms_calls
from beam_envelope.testing import FakeKms

CONTEXT = {"dataset": "orders", "tenant": "a"}
KEY_1 = "arn:aws:kms:us-east-1:111122223333:key/1"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Take the waits out of boto3's retries; return those before each retry."""
    waits = []
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr("botocore.retries.bucket.TokenBucket.acquire", lambda *_, **__: True)
    return waits


@pytest.fixture
def key(fake_kms):
    fake_kms.create_key("etl")
    return AwsKms("alias/etl")


@pytest.fixture
def wrapped(key):
    with key.generate_data_key(CONTEXT) as data_key:
        return data_key.wrapped_keys[0]


def message(error, call, *arguments):
    with pytest.raises(error) as caught:
        call(*arguments)
    assert type(caught.value) is error
    return str(caught.value)


def opened(key, form, context=None):
    """Return the bytes of a data key; a DataKey that nobody holds is erased at once."""
    with key.unwrap(form, CONTEXT if context is None else context) as data_key:
        return bytes(data_key.material)


# The happy path


def test_a_data_key_comes_back_from_its_wrapped_key(fake_kms):
    arn = fake_kms.create_key("etl")
    key = AwsKms("alias/etl")
    data_key = key.generate_data_key(CONTEXT)
    (form,) = data_key.wrapped_keys
    assert (form.provider, form.kms_key) == ("aws-kms", arn)
    again = key.unwrap(form, CONTEXT)
    assert again.material == data_key.material
    assert again.wrapped_keys == (form,)
    assert fake_kms.calls == {"GenerateDataKey": 1, "Decrypt": 1}


def test_each_data_key_is_another(key):
    with key.generate_data_key(CONTEXT) as one, key.generate_data_key(CONTEXT) as other:
        assert one.material != other.material


def test_a_second_key_wraps_the_same_data_key(fake_kms, key):
    fake_kms.create_key("dr")
    second = AwsKms("alias/dr")
    data_key = key.generate_data_key(CONTEXT)
    form = second.wrap(data_key, CONTEXT)
    assert opened(second, form) == data_key.material
    assert "did not wrap this data key" in message(WrongKeyError, second.unwrap, data_key.wrapped_keys[0], CONTEXT)


def test_calls_are_counted_for_metrics(fake_kms, key):
    kms_calls.counts.clear()
    form = key.generate_data_key(CONTEXT).wrapped_keys[0]
    key.wrap(key.unwrap(form, CONTEXT), CONTEXT)
    key.rewrap(form, CONTEXT, key)
    assert kms_calls.counts == {"GenerateDataKey": 1, "Decrypt": 1, "Encrypt": 1, "ReEncrypt": 1}
    assert fake_kms.calls == kms_calls.counts


# Errors of the key


def test_denied_names_the_permission_and_the_key(fake_kms, key, wrapped):
    fake_kms.deny("GenerateDataKey")
    assert message(KeyAccessError, key.generate_data_key, CONTEXT) == (
        "not allowed to use KMS key alias/etl: the caller needs kms:GenerateDataKey on it, in its IAM policy and in "
        "the key's policy. AWS says AccessDeniedException: User: arn:aws:iam::111122223333:user/beam is not "
        f"authorized to perform: kms:GenerateDataKey on resource: {wrapped.kms_key} because no identity-based policy "
        "allows the kms:GenerateDataKey action"
    )
    fake_kms.deny("Decrypt")
    assert "the caller needs kms:Decrypt on it" in message(KeyAccessError, key.unwrap, wrapped, CONTEXT)
    fake_kms.deny("Encrypt")
    assert "the caller needs kms:Encrypt on it" in message(KeyAccessError, key.wrap, DataKey(bytes(32)), CONTEXT)
    fake_kms.deny("ReEncryptTo")
    said = message(KeyAccessError, key.rewrap, wrapped, CONTEXT, key)
    assert "needs kms:ReEncryptFrom on the old key and kms:ReEncryptTo on the new one" in said
    assert set(fake_kms.calls.values()) == {
        1,
        2,
    }  # the first of two GenerateDataKey was allowed: nothing is tried again


def test_check_names_the_missing_permission(fake_kms, key):
    key.check(CONTEXT)
    fake_kms.deny("GenerateDataKey", "alias/etl")
    assert "needs kms:GenerateDataKey" in message(KeyAccessError, key.check, CONTEXT)


def test_a_disabled_key(fake_kms, key, wrapped):
    fake_kms.disable_key("alias/etl")
    said = (
        "KMS key alias/etl is disabled or pending deletion: nothing it wrapped opens until it is enabled again (aws "
        "kms enable-key, or cancel-key-deletion first). AWS says "
    )
    disabled = f"{said}DisabledException: {wrapped.kms_key} is disabled."
    assert message(KeyAccessError, key.unwrap, wrapped, CONTEXT) == disabled
    assert message(KeyAccessError, key.generate_data_key, CONTEXT) == disabled
    fake_kms.schedule_key_deletion("alias/etl")
    deleted = f"{said}KMSInvalidStateException: {wrapped.kms_key} is pending deletion."
    assert message(KeyAccessError, key.unwrap, wrapped, CONTEXT) == deleted
    assert fake_kms.calls == {"GenerateDataKey": 2, "Decrypt": 2}
    fake_kms.enable_key("alias/etl")
    key.unwrap(wrapped, CONTEXT)


def test_an_unknown_key(fake_kms):
    key = AwsKms("alias/none")
    assert message(KeyAccessError, key.generate_data_key, CONTEXT) == (
        "there is no KMS key alias/none in the region of the AWS settings. Check the name and the region "
        "(aws-kms://...?region=...). AWS says NotFoundException: "
        "Alias arn:aws:kms:us-east-1:111122223333:alias/none is not found."
    )
    assert "in region us-east-1." in message(KeyAccessError, replace(key, region="us-east-1").generate_data_key, {})


@pytest.mark.parametrize("operation", ["unwrap", "rewrap"])
def test_an_alias_that_now_points_to_another_key_does_not_open_old_data(fake_kms, key, wrapped, operation):
    fake_kms.create_key("etl")
    arguments = (wrapped, CONTEXT) if operation == "unwrap" else (wrapped, CONTEXT, key)
    assert message(WrongKeyError, getattr(key, operation), *arguments) == (
        "KMS key alias/etl did not wrap this data key. Give the key that the key file names. AWS says "
        "IncorrectKeyException: The key ID in the request does not identify a CMK that can perform this operation."
    )
    assert AwsKms(wrapped.kms_key).unwrap(wrapped, CONTEXT)


@pytest.mark.parametrize("operation", ["unwrap", "rewrap"])
def test_the_key_file_cannot_name_another_kms_key_than_the_one_that_opened(fake_kms, key, wrapped, operation):
    forged = replace(wrapped, kms_key=fake_kms.create_key("other"))
    arguments = (forged, CONTEXT) if operation == "unwrap" else (forged, CONTEXT, key)
    said = message(TamperedError, getattr(key, operation), *arguments)
    done = "decrypted its data key with" if operation == "unwrap" else "re-encrypted from"
    assert said == (
        f"the key file names {forged.kms_key}, but KMS {done} {wrapped.kms_key}: "
        "the key file was changed. Restore it from a copy"
    )


def test_a_changed_wrapped_key(key, wrapped):
    for position in (0, 60, 110, 166):
        changed = bytearray(wrapped.wrapped)
        changed[position] ^= 1
        said = message(TamperedError, key.unwrap, replace(wrapped, wrapped=bytes(changed)), CONTEXT)
        assert said == (
            "KMS key alias/etl does not open the wrapped data key: the key file or its encryption context was changed "
            "after it was written. Restore the key file from a copy. AWS says InvalidCiphertextException: no more"
        )


@pytest.mark.parametrize("context", [{}, {"dataset": "orders"}, {**CONTEXT, "more": "x"}, {"datasetorders": "tenanta"}])
def test_another_context(key, wrapped, context):
    assert "encryption context was changed" in message(TamperedError, key.unwrap, wrapped, context)
    assert "encryption context was changed" in message(TamperedError, key.rewrap, wrapped, context, key)


def test_a_wrapped_key_of_no_bytes_or_too_many(key, wrapped):
    for blob in (b"", bytes(6145)):
        assert "KMS does not take" in message(FormatError, key.unwrap, replace(wrapped, wrapped=blob), CONTEXT)


@pytest.mark.parametrize("size", [15, 31, 33, 64])
def test_what_kms_decrypts_is_a_data_key_only_if_it_has_the_length_of_one(fake_kms, key, wrapped, size):
    blob = boto3.client("kms").encrypt(KeyId="alias/etl", Plaintext=bytes(size), EncryptionContext=CONTEXT)[
        "CiphertextBlob"
    ]
    said = message(TamperedError, key.unwrap, replace(wrapped, wrapped=blob), CONTEXT)
    assert said == (
        f"what {wrapped.kms_key} decrypted has {size} bytes, so it is no data key: the key file was changed. "
        "Restore it from a copy"
    )


@pytest.mark.parametrize("size", [16, 24])
def test_the_shorter_data_keys_of_other_software_are_opened(fake_kms, key, wrapped, size):
    answer = boto3.client("kms").encrypt(KeyId="alias/etl", Plaintext=bytes(size), EncryptionContext=CONTEXT)
    with key.unwrap(replace(wrapped, wrapped=answer["CiphertextBlob"]), CONTEXT) as data_key:
        assert data_key.material == bytes(size)


@pytest.mark.parametrize("size", [16, 24, 31, 33])
def test_a_data_key_that_kms_makes_has_32_bytes(key, monkeypatch, size):
    answer = {"KeyId": "k", "Plaintext": bytes(size), "CiphertextBlob": b"x"}
    monkeypatch.setattr(AwsKms, "_call", lambda *_, **__: answer)
    with pytest.raises(ValueError, match=f"^a data key has 32 bytes; alias/etl made one of {size}$"):
        key.generate_data_key(CONTEXT)


def test_a_context_that_is_too_large_for_kms(key):
    said = message(FormatError, key.generate_data_key, {"a": "b" * 9000})
    assert said.startswith("KMS does not take the key name 'alias/etl' or the context. AWS says ValidationException: ")


def test_a_key_name_that_is_too_short_for_boto3(fake_kms):
    assert message(FormatError, AwsKms("").generate_data_key, {}).startswith(
        "KMS does not take the key name '' or the context. Parameter validation failed"
    )


def test_a_key_that_signs(fake_kms, key):
    fake_kms.fail(1, "InvalidKeyUsageException", 400)
    assert message(KeyAccessError, key.generate_data_key, {}).startswith(
        "KMS key alias/etl is no symmetric encryption key (SYMMETRIC_DEFAULT). Name one that is. AWS says"
    )


@pytest.mark.parametrize("code", ["ExpiredTokenException", "UnrecognizedClientException", "InvalidSignatureException"])
def test_credentials_that_aws_does_not_take(fake_kms, key, code):
    fake_kms.fail(100, code, 400)
    assert message(KeyAccessError, key.generate_data_key, {}) == (
        f"KMS refused GenerateDataKey on alias/etl; check the AWS credentials. AWS says {code}: planned by the test"
    )
    assert fake_kms.calls == {"GenerateDataKey": 1}


# Which key may open what


@pytest.mark.parametrize(
    ("key", "kms_key", "may"),
    [
        (AwsKms(KEY_1), KEY_1, True),
        (AwsKms("1"), KEY_1, True),
        (AwsKms("1", region="us-east-1"), KEY_1, True),
        (AwsKms("alias/etl"), KEY_1, True),
        (AwsKms("alias/etl", region="us-east-1"), KEY_1, True),
        (AwsKms("arn:aws:kms:us-east-1:111122223333:alias/etl"), KEY_1, True),
        (AwsKms("alias/etl", region="eu-west-1"), KEY_1, False),
        (AwsKms("1", region="eu-west-1"), KEY_1, False),
        (AwsKms("2"), KEY_1, False),
        (AwsKms(KEY_1.replace("key/1", "key/2")), KEY_1, False),
        (AwsKms(KEY_1.replace("us-east-1", "eu-west-1")), KEY_1, False),
        (AwsKms(KEY_1.replace("111122223333", "444455556666")), KEY_1, False),
        (AwsKms("arn:aws:kms:us-east-1:444455556666:alias/etl"), KEY_1, False),
        (AwsKms("arn:aws:kms:eu-west-1:111122223333:alias/etl"), KEY_1, False),
        (AwsKms("alias/etl"), "default/1234", False),
        (AwsKms("alias/etl"), "", False),
    ],
)
def test_what_a_key_may_open_is_told_without_a_call(key, kms_key, may):
    form = WrappedKey("aws-kms", kms_key, b"x")
    assert key.may_open(form) is may
    assert key.may_open(replace(form, provider="local-kms")) is False
    if not may:
        for call in (key.unwrap, lambda *arguments: key.rewrap(*arguments, key)):
            with pytest.raises((WrongKeyError, KeyAccessError)):  # there is no KMS, and no region
                call(form, {})


def test_the_wrong_key_is_told_before_any_call(fake_kms, key, wrapped):
    other = AwsKms(fake_kms.create_key())
    for option, call in (("--key", other.unwrap), ("--from", lambda *arguments: other.rewrap(*arguments, other))):
        said = message(WrongKeyError, call, wrapped, CONTEXT)
        named = f"the data key was wrapped by {wrapped.kms_key}, which is not {other.key_id}"
        assert said == f"{named}. Give that key with {option}"
    assert fake_kms.calls == {"GenerateDataKey": 1}


# Rewrapping


def test_rewrapping_stays_inside_kms(fake_kms, key, wrapped):
    new = AwsKms(fake_kms.create_key("new"))
    material = opened(key, wrapped)
    before = fake_kms.calls
    form = key.rewrap(wrapped, CONTEXT, new)
    assert fake_kms.calls - before == {"ReEncrypt": 1}
    assert form.kms_key == new.key_id
    assert opened(new, form) == material
    assert "encryption context was changed" in message(TamperedError, new.unwrap, form, {})


def test_rewrapping_stays_inside_kms_when_one_key_names_its_region_and_the_other_does_not(fake_kms, key, wrapped):
    new = AwsKms("alias/new", region="us-east-1", endpoint_url=fake_kms.endpoint_url)
    fake_kms.create_key("new")
    key.rewrap(wrapped, CONTEXT, new)
    assert fake_kms.calls == {"GenerateDataKey": 1, "ReEncrypt": 1}


def test_rewrapping_into_another_region_decrypts_here_and_encrypts_there(fake_kms, key, wrapped):
    with FakeKms(region="eu-west-1") as there:
        new = AwsKms(there.create_key(), endpoint_url=there.endpoint_url)
        form = key.rewrap(wrapped, CONTEXT, new)
        assert there.calls == {"Encrypt": 1}
        assert fake_kms.calls == {"GenerateDataKey": 1, "Decrypt": 1}
        assert form.kms_key.startswith("arn:aws:kms:eu-west-1:")
        assert opened(new, form) == opened(key, wrapped)


def test_rewrapping_to_and_from_another_provider(key, wrapped, local_key):
    form = key.rewrap(wrapped, CONTEXT, local_key)
    assert form.provider == "local-kms"
    back = local_key.rewrap(form, CONTEXT, key)
    assert opened(key, back) == opened(local_key, form) == opened(key, wrapped)


# A KMS that does not serve


def test_throttling_is_waited_out(fake_kms, key, no_waiting):
    fake_kms.throttle(7)
    key.generate_data_key(CONTEXT)
    assert fake_kms.calls == {"GenerateDataKey": 8}
    assert len(no_waiting) == 7


@pytest.mark.parametrize("where", ["variable", "profile"])
def test_aws_own_setting_of_the_attempts_holds(fake_kms, key, no_waiting, monkeypatch, tmp_path, where):
    if where == "variable":
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    else:
        (tmp_path / "config").write_text("[profile patient]\nmax_attempts = 3\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.setenv("AWS_PROFILE", "patient")
    fake_kms.fail(10**6, "KMSInternalException", 500)
    message(KmsUnavailableError, key.generate_data_key, CONTEXT)
    assert fake_kms.calls == {"GenerateDataKey": 3}


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("ThrottlingException", 400),
        ("KMSInternalException", 500),
        ("DependencyTimeoutException", 503),
        ("KeyUnavailableException", 500),
        ("LimitExceededException", 400),
    ],
)
def test_a_kms_that_never_serves_is_unavailable(fake_kms, key, code, status):
    fake_kms.fail(10**6, code, status)
    assert message(KmsUnavailableError, key.generate_data_key, CONTEXT) == (
        "KMS did not serve GenerateDataKey on alias/etl after all retries; run the job again, or ask AWS for a higher "
        f"KMS request quota. AWS says {code}: planned by the test"
    )
    assert fake_kms.calls == {"GenerateDataKey": 8}


def test_nobody_listens(no_waiting, monkeypatch):
    with FakeKms() as gone:
        key = AwsKms(KEY_1, endpoint_url=gone.endpoint_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    said = message(KmsUnavailableError, key.generate_data_key, CONTEXT)
    assert said.startswith(
        f"KMS could not be reached for GenerateDataKey on {KEY_1}: Could not connect to the endpoint"
    )
    assert said.endswith("Check network and endpoint")
    assert len(no_waiting) == 7


def test_nobody_answers(monkeypatch):
    def generate_data_key(**_arguments):
        raise boto_errors.ReadTimeoutError(endpoint_url="https://kms.us-east-1.amazonaws.com/")

    monkeypatch.setattr(aws, "_client", lambda *_: SimpleNamespace(generate_data_key=generate_data_key))
    said = message(KmsUnavailableError, AwsKms(KEY_1).generate_data_key, CONTEXT)
    assert said.startswith(f"KMS could not be reached for GenerateDataKey on {KEY_1}: Read timeout on endpoint URL")


# Settings


def test_no_credentials(fake_kms, key, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert message(KeyAccessError, key.generate_data_key, CONTEXT) == (
        "no usable AWS credentials for GenerateDataKey on alias/etl: Unable to locate credentials. Set a profile, a "
        "role or the environment (aws configure; aws sts get-caller-identity shows who you are)"
    )


def test_no_such_profile(fake_kms):
    said = message(KeyAccessError, AwsKms("alias/etl", profile="nobody").generate_data_key, CONTEXT)
    assert (
        "no usable AWS credentials for GenerateDataKey on alias/etl: The config profile (nobody) could not be found"
        in said
    )


def test_no_region(fake_kms, key, monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.delenv("AWS_REGION")
    assert message(KeyAccessError, key.generate_data_key, CONTEXT) == (
        "no AWS region is set for KMS key alias/etl. Set AWS_DEFAULT_REGION, or write aws-kms://alias/etl?region=REGION"
    )
    clear_caches()
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")  # the advice works
    key.generate_data_key(CONTEXT)


def test_the_region_of_an_arn_is_enough(fake_kms, monkeypatch):
    arn = fake_kms.create_key()
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.delenv("AWS_REGION")
    AwsKms(arn).generate_data_key(CONTEXT)
    assert AwsKms(arn).region == "us-east-1"


@pytest.mark.parametrize("settings", [{"endpoint_url": "nonsense"}, {"region": "not a region"}])
def test_settings_of_the_wrong_form(fake_kms, settings):
    key = AwsKms("alias/etl", **settings)
    said = message(KeyAccessError, key.generate_data_key, CONTEXT)
    assert said.startswith(f"the region or the endpoint of {key} is not of the right form: ")


def test_an_arn_of_another_kind_is_refused_at_once():
    with pytest.raises(
        FormatError, match=r"^'arn:aws:iam::1:role/x' is not the ARN of a KMS key; one looks like arn:aws:kms:"
    ):
        AwsKms("arn:aws:iam::1:role/x")


def test_a_key_travels_to_workers_and_stays_equal(fake_kms, key):
    key.generate_data_key(CONTEXT)  # with a client built
    twin = pickle.loads(pickle.dumps(key))
    assert (twin, hash(twin)) == (key, hash(key))
    assert len(pickle.dumps(key)) < 300
    assert key != replace(key, region="us-east-1")
    twin.generate_data_key(CONTEXT)


def test_a_process_builds_one_client_for_each_set_of_settings(fake_kms, key, monkeypatch):
    built = []
    session = boto3.Session
    monkeypatch.setattr(boto3, "Session", lambda **settings: built.append(settings) or session(**settings))
    for _ in range(3):
        pickle.loads(pickle.dumps(key)).generate_data_key(CONTEXT)
    assert len(built) == 1
    replace(key, region="us-east-1").generate_data_key(CONTEXT)
    assert len(built) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_builds_its_own_client(fake_kms, key):
    key.generate_data_key(CONTEXT)
    with aws._lock, aws_credentials._lock:  # as if another thread were just building a client
        child = os.fork()
        if not child:
            signal.alarm(20)  # a child that waits for a lock must not wait for ever
            try:
                key.generate_data_key(CONTEXT).close()
                os._exit(0)
            except BaseException:  # noqa: BLE001  # a child of a test must not go on as a test
                os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(aws._clients) == 1


# Logs


def forms_of(material):
    data = bytes(material)
    return [base64.b64encode(data).decode(), data.hex(), repr(data), repr(data)[2:-1], str(list(data))]


def everything_logged(caplog):
    return "\n".join(
        f"{record.getMessage()} {record.msg!r} {record.args!r} {record.exc_text}" for record in caplog.records
    )


def use_every_operation(fake_kms, key):
    """Return the forms of a data key that went through all operations."""
    data_key = key.generate_data_key(CONTEXT)
    form = key.wrap(data_key, CONTEXT)
    key.unwrap(form, CONTEXT)
    key.rewrap(form, CONTEXT, AwsKms(fake_kms.create_key("new")))
    with FakeKms(region="eu-west-1") as there:
        key.rewrap(form, CONTEXT, AwsKms(there.create_key(), endpoint_url=there.endpoint_url))
    return forms_of(data_key.material)


def test_no_data_key_is_logged_even_at_debug(fake_kms, key, caplog):
    caplog.set_level(logging.DEBUG)
    boto3.set_stream_logger("", logging.DEBUG)
    try:
        forms = use_every_operation(fake_kms, key)
    finally:
        logging.getLogger().handlers = [
            handler for handler in logging.getLogger().handlers if type(handler) is not logging.StreamHandler
        ]
    logged = everything_logged(caplog)
    assert "kms" in logged  # the rest of boto3's log is there
    assert [form for form in forms if form in logged] == []


def test_without_the_filter_the_data_key_would_be_logged(fake_kms, key, caplog, monkeypatch):
    monkeypatch.setattr(wire_log._WireLogFilter, "filter", lambda *_: True)
    caplog.set_level(logging.DEBUG)
    logged_forms = use_every_operation(fake_kms, key)
    assert logged_forms[0] in everything_logged(caplog)


def test_other_calls_of_boto3_are_logged_as_ever(fake_kms, key, caplog):
    caplog.set_level(logging.DEBUG)
    key.generate_data_key(CONTEXT)
    caplog.clear()
    boto3.client("kms").describe_key(KeyId="alias/etl")
    assert "KeyMetadata" in everything_logged(caplog)


def test_a_refused_call_lets_the_log_go_on(fake_kms, key, caplog):
    caplog.set_level(logging.DEBUG)
    fake_kms.deny("GenerateDataKey")
    message(KeyAccessError, key.generate_data_key, CONTEXT)
    boto3.client("kms").describe_key(KeyId="alias/etl")
    assert "KeyMetadata" in everything_logged(caplog)


# Another imitation of AWS


@pytest.mark.parametrize("name", ["alias", "ARN", "id with a region"])
def test_moto_serves_it_as_well(moto_server, name):
    client = boto3.client("kms")
    arn = client.create_key()["KeyMetadata"]["Arn"]
    client.create_alias(AliasName="alias/etl", TargetKeyId=arn)
    key = {
        "alias": AwsKms("alias/etl"),
        "ARN": AwsKms(arn),
        "id with a region": AwsKms(arn.rpartition("/")[2], region="us-east-1", endpoint_url=moto_server),
    }[name]
    data_key = key.generate_data_key(CONTEXT)
    (form,) = data_key.wrapped_keys
    assert form.kms_key == arn
    assert opened(key, form) == data_key.material
    new = AwsKms(client.create_key()["KeyMetadata"]["Arn"])
    assert opened(new, key.rewrap(form, CONTEXT, new)) == data_key.material
    assert opened(new, new.wrap(data_key, CONTEXT)) == data_key.material
    assert "encryption context was changed" in message(TamperedError, key.unwrap, form, {"a": "b"})
