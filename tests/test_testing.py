"""FakeKms is as strict as AWS, and find_plaintext finds what leaked."""

import base64
import json
import os
import subprocess
import sys
import threading

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, EndpointConnectionError

from beam_envelope.testing import FakeKms, find_plaintext

CONTEXT = {"dataset": "orders", "tenant": "a"}


def client(kms, **settings):
    """A plain boto3 client: these tests must not depend on our own code."""
    once = Config(retries={"total_max_attempts": 1})
    return boto3.client(
        "kms", **{"region_name": kms.region, "endpoint_url": kms.endpoint_url, "config": once, **settings}
    )


def refusal(call, **arguments):
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    return caught.value.response["Error"]["Code"], caught.value.response["Error"].get("Message", "")


@pytest.fixture
def boto(fake_kms):
    return client(fake_kms)


def test_it_encrypts_and_decrypts_for_boto3(fake_kms, boto):
    arn = fake_kms.create_key("etl")
    made = boto.generate_data_key(KeyId="alias/etl", NumberOfBytes=32, EncryptionContext=CONTEXT)
    assert made["KeyId"] == arn
    assert len(made["Plaintext"]) == 32
    assert len(made["CiphertextBlob"]) == 167  # as that of AWS
    opened = boto.decrypt(CiphertextBlob=made["CiphertextBlob"], EncryptionContext=CONTEXT)
    assert (opened["KeyId"], opened["Plaintext"]) == (arn, made["Plaintext"])
    wrapped = boto.encrypt(KeyId=arn, Plaintext=b"any", EncryptionContext=CONTEXT)
    assert boto.decrypt(CiphertextBlob=wrapped["CiphertextBlob"], EncryptionContext=CONTEXT)["Plaintext"] == b"any"
    assert fake_kms.calls == {"GenerateDataKey": 1, "Decrypt": 2, "Encrypt": 1}


@pytest.mark.parametrize("name", ["alias/etl", "key id", "key ARN", "alias ARN"])
def test_a_key_has_four_names(fake_kms, boto, name):
    arn = fake_kms.create_key("alias/etl")
    key_id = {"key id": arn.rpartition("/")[2], "key ARN": arn, "alias ARN": f"{arn.partition('key/')[0]}alias/etl"}
    described = boto.describe_key(KeyId=key_id.get(name, name))["KeyMetadata"]
    assert (described["Arn"], described["KeyState"], described["Enabled"]) == (arn, "Enabled", True)


@pytest.mark.parametrize(
    ("written", "given"),
    [
        ({"a": "bc"}, {"ab": "c"}),  # a fake that joins the pairs takes these for the same
        ({"a": "b", "c": "d"}, {"a": "b"}),
        ({"a": "b"}, {"a": "b", "c": "d"}),
        ({"a": "b"}, {"a": "B"}),
        ({"a": "b"}, {}),
        ({}, {"a": "b"}),
        ({"a": 'b","c":"d'}, {"a": "b", "c": "d"}),
    ],
)
def test_another_encryption_context_is_an_invalid_ciphertext(fake_kms, boto, written, given):
    made = boto.generate_data_key(KeyId=fake_kms.create_key(), KeySpec="AES_256", EncryptionContext=written)
    said = refusal(boto.decrypt, CiphertextBlob=made["CiphertextBlob"], EncryptionContext=given)
    assert said == ("InvalidCiphertextException", "")


def test_the_order_of_the_context_does_not_matter(fake_kms, boto):
    made = boto.generate_data_key(KeyId=fake_kms.create_key(), NumberOfBytes=32, EncryptionContext={"a": "1", "b": "2"})
    opened = boto.decrypt(CiphertextBlob=made["CiphertextBlob"], EncryptionContext={"b": "2", "a": "1"})
    assert opened["Plaintext"] == made["Plaintext"]


def test_any_changed_byte_of_a_wrapped_key_is_an_invalid_ciphertext(fake_kms, boto):
    arn = fake_kms.create_key()
    blob = boto.generate_data_key(KeyId=arn, NumberOfBytes=32)["CiphertextBlob"]
    for position in (0, 1, 50, 106, 107, 118, 119, 150, 166):
        changed = bytes([*blob[:position], blob[position] ^ 1, *blob[position + 1 :]])
        for pinned in ({}, {"KeyId": arn}):
            assert refusal(boto.decrypt, CiphertextBlob=changed, **pinned)[0] == "InvalidCiphertextException"
    for cut in (blob[:-1], blob[:107], b"x"):
        assert refusal(boto.decrypt, CiphertextBlob=cut)[0] == "InvalidCiphertextException"


def test_a_pinned_key_must_be_the_one_that_wrapped(fake_kms, boto):
    ours, other = fake_kms.create_key("ours"), fake_kms.create_key("other")
    blob = boto.generate_data_key(KeyId=ours, NumberOfBytes=32)["CiphertextBlob"]
    said = "The key ID in the request does not identify a CMK that can perform this operation."
    for wrong in (other, "alias/other"):
        assert refusal(boto.decrypt, CiphertextBlob=blob, KeyId=wrong) == ("IncorrectKeyException", said)
        reencrypt = {"CiphertextBlob": blob, "SourceKeyId": wrong, "DestinationKeyId": other}
        assert refusal(boto.re_encrypt, **reencrypt) == ("IncorrectKeyException", said)
    assert boto.decrypt(CiphertextBlob=blob, KeyId="alias/ours")["KeyId"] == ours


def test_an_alias_can_be_moved_to_another_key(fake_kms, boto):
    old = fake_kms.create_key("etl")
    new = fake_kms.create_key("etl")
    assert old != new
    assert boto.describe_key(KeyId="alias/etl")["KeyMetadata"]["Arn"] == new


def test_a_disabled_key_does_nothing_until_it_is_enabled(fake_kms, boto):
    arn = fake_kms.create_key("etl")
    blob = boto.generate_data_key(KeyId=arn, NumberOfBytes=32)["CiphertextBlob"]
    fake_kms.disable_key("alias/etl")
    said = ("DisabledException", f"{arn} is disabled.")
    assert refusal(boto.generate_data_key, KeyId=arn, NumberOfBytes=32) == said
    assert refusal(boto.encrypt, KeyId=arn, Plaintext=b"x") == said
    assert refusal(boto.decrypt, CiphertextBlob=blob) == said
    assert refusal(boto.re_encrypt, CiphertextBlob=blob, DestinationKeyId=fake_kms.create_key()) == said
    fake_kms.enable_key("alias/etl")
    boto.decrypt(CiphertextBlob=blob)


def test_a_key_that_waits_for_its_deletion_does_nothing(fake_kms, boto):
    arn = fake_kms.create_key()
    blob = boto.generate_data_key(KeyId=arn, NumberOfBytes=32)["CiphertextBlob"]
    fake_kms.schedule_key_deletion(arn)
    assert refusal(boto.decrypt, CiphertextBlob=blob) == ("KMSInvalidStateException", f"{arn} is pending deletion.")
    assert boto.describe_key(KeyId=arn)["KeyMetadata"]["KeyState"] == "PendingDeletion"


def test_reencrypt_moves_a_data_key_and_its_context(fake_kms, boto):
    old, new = fake_kms.create_key(), fake_kms.create_key()
    made = boto.generate_data_key(KeyId=old, NumberOfBytes=32, EncryptionContext={"a": "1"})
    request = {"CiphertextBlob": made["CiphertextBlob"], "DestinationKeyId": new, "SourceKeyId": old}
    said = refusal(
        boto.re_encrypt, **request, SourceEncryptionContext={"a": "2"}, DestinationEncryptionContext={"a": "2"}
    )
    assert said == ("InvalidCiphertextException", "")
    moved = boto.re_encrypt(**request, SourceEncryptionContext={"a": "1"}, DestinationEncryptionContext={"b": "2"})
    assert (moved["SourceKeyId"], moved["KeyId"]) == (old, new)
    opened = boto.decrypt(CiphertextBlob=moved["CiphertextBlob"], KeyId=new, EncryptionContext={"b": "2"})
    assert opened["Plaintext"] == made["Plaintext"]


def test_denial_reads_as_that_of_aws_and_can_be_for_one_key(fake_kms, boto):
    arn, other = fake_kms.create_key("etl"), fake_kms.create_key()
    fake_kms.deny("GenerateDataKey", "alias/etl")
    said = (
        "User: arn:aws:iam::111122223333:user/beam is not authorized to perform: kms:GenerateDataKey on resource: "
        f"{arn} because no identity-based policy allows the kms:GenerateDataKey action"
    )
    denied = ("AccessDeniedException", said)
    assert refusal(boto.generate_data_key, KeyId="alias/etl", NumberOfBytes=32) == denied
    boto.generate_data_key(KeyId=other, NumberOfBytes=32)
    boto.encrypt(KeyId=arn, Plaintext=b"x")
    fake_kms.allow("GenerateDataKey", arn)
    boto.generate_data_key(KeyId="alias/etl", NumberOfBytes=32)


@pytest.mark.parametrize("permission", ["ReEncryptFrom", "ReEncryptTo"])
def test_reencrypt_needs_a_permission_on_each_key(fake_kms, boto, permission):
    old, new = fake_kms.create_key(), fake_kms.create_key()
    blob = boto.encrypt(KeyId=old, Plaintext=b"x")["CiphertextBlob"]
    fake_kms.deny(permission, old if permission == "ReEncryptFrom" else new)
    fake_kms.deny(permission, fake_kms.create_key())
    code, message = refusal(boto.re_encrypt, CiphertextBlob=blob, DestinationKeyId=new)
    assert code == "AccessDeniedException"
    assert f"kms:{permission} on resource" in message


def test_unknown_keys_are_not_found(fake_kms, boto):
    prefix = "arn:aws:kms:us-east-1:111122223333"
    for key_id, said in {
        "alias/none": f"Alias {prefix}:alias/none is not found.",
        "1234": f"Key '{prefix}:key/1234' does not exist",
        f"{prefix}:key/1234": f"Key '{prefix}:key/1234' does not exist",
        "arn:aws:kms:eu-west-1:111122223333:key/1234": "Invalid arn eu-west-1",
    }.items():
        assert refusal(boto.encrypt, KeyId=key_id, Plaintext=b"x") == ("NotFoundException", said)
    foreign = "arn:aws:kms:us-east-1:999999999999:key/1234"
    assert refusal(boto.encrypt, KeyId=foreign, Plaintext=b"x")[0] == "AccessDeniedException"


def test_bad_requests_are_refused(fake_kms, boto):
    arn = fake_kms.create_key()
    unchecked = client(fake_kms, config=Config(parameter_validation=False, retries={"total_max_attempts": 1}))
    for request in (
        {},
        {"NumberOfBytes": 32, "KeySpec": "AES_256"},
        {"NumberOfBytes": 0},
        {"NumberOfBytes": 1025},
        {"KeySpec": "AES_512"},
        {"NumberOfBytes": 32, "EncryptionContext": {"a": "b" * 8192}},
    ):
        assert refusal(unchecked.generate_data_key, KeyId=arn, **request)[0] == "ValidationException"
    assert refusal(unchecked.generate_data_key, NumberOfBytes=32)[0] == "ValidationException"
    assert refusal(unchecked.encrypt, KeyId=arn, Plaintext=b"x" * 4097)[0] == "ValidationException"
    assert refusal(unchecked.decrypt, CiphertextBlob=b"x" * 6145)[0] == "ValidationException"
    assert refusal(unchecked.decrypt)[0] == "SerializationException"
    assert refusal(boto.list_keys)[0] == "UnknownOperationException"


def test_two_regions_share_nothing():
    settings = {"aws_access_key_id": "a", "aws_secret_access_key": "s"}
    with FakeKms() as here, FakeKms(region="eu-west-1", account="444455556666") as there:
        assert there.create_key("etl").startswith("arn:aws:kms:eu-west-1:444455556666:key/")
        assert refusal(client(here, **settings).describe_key, KeyId="alias/etl")[0] == "NotFoundException"
        client(there, **settings).describe_key(KeyId="alias/etl")
        wrong = client(there, **settings, region_name="us-east-1")
        assert refusal(wrong.describe_key, KeyId="alias/etl")[0] == "InvalidSignatureException"


def test_throttling_and_failures_come_as_planned(fake_kms, boto):
    arn = fake_kms.create_key()
    fake_kms.throttle(2)
    for _ in range(2):
        assert refusal(boto.encrypt, KeyId=arn, Plaintext=b"x")[0] == "ThrottlingException"
    boto.encrypt(KeyId=arn, Plaintext=b"x")
    fake_kms.fail(1)
    with pytest.raises(ClientError) as caught:
        boto.encrypt(KeyId=arn, Plaintext=b"x")
    assert caught.value.response["Error"]["Code"] == "KMSInternalException"
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 500
    fake_kms.fail(1, "DependencyTimeoutException", 503)
    fake_kms.throttle(0)
    boto.encrypt(KeyId=arn, Plaintext=b"x")
    assert fake_kms.calls["Encrypt"] == 5


def test_a_dry_run_gives_nothing_and_is_refused_as_the_request_would_be(fake_kms, boto):
    arn, other = fake_kms.create_key(), fake_kms.create_key()
    made = boto.encrypt(KeyId=arn, Plaintext=b"x", EncryptionContext=CONTEXT)["CiphertextBlob"]
    requests = {
        "GenerateDataKey": (boto.generate_data_key, {"KeyId": arn, "NumberOfBytes": 32}),
        "Encrypt": (boto.encrypt, {"KeyId": arn, "Plaintext": b"x"}),
        "Decrypt": (boto.decrypt, {"CiphertextBlob": made, "EncryptionContext": CONTEXT}),
        "ReEncryptTo": (
            boto.re_encrypt,
            {"CiphertextBlob": made, "SourceEncryptionContext": CONTEXT, "DestinationKeyId": other},
        ),
    }
    for permission, (call, arguments) in requests.items():
        assert refusal(call, **arguments, DryRun=True) == (
            "DryRunOperationException",
            "The request would have succeeded, but the DryRun option is set.",
        )
        fake_kms.deny(permission)
        assert refusal(call, **arguments, DryRun=True)[0] == "AccessDeniedException"
        fake_kms.allow(permission)
    assert refusal(boto.decrypt, CiphertextBlob=made, DryRun=True)[0] == "InvalidCiphertextException"  # no context
    assert refusal(boto.generate_data_key, KeyId=arn, DryRun=True)[0] == "ValidationException"
    fake_kms.disable_key(arn)
    assert refusal(boto.encrypt, KeyId=arn, Plaintext=b"x", DryRun=True)[0] == "DisabledException"


def test_a_dry_run_may_do_without_a_ciphertext(fake_kms, boto):
    if "DryRunModifiers" not in boto.meta.service_model.operation_model("Decrypt").input_shape.members:
        pytest.skip("this boto3 knows no DryRunModifiers")
    arn = fake_kms.create_key()
    modified = {"KeyId": arn, "DryRunModifiers": ["IGNORE_CIPHERTEXT"]}
    assert refusal(boto.decrypt, **modified, DryRun=True)[0] == "DryRunOperationException"
    assert refusal(boto.decrypt, **modified)[0] == "ValidationException"
    fake_kms.deny("Decrypt")
    assert refusal(boto.decrypt, **modified, DryRun=True)[0] == "AccessDeniedException"


def test_users_are_told_apart(fake_kms, monkeypatch):
    arn = fake_kms.create_key()
    fake_kms.deny("Encrypt", arn, user="worker")
    for user, denied in (("beam", False), ("worker", True)):
        for name, value in fake_kms.environment(user).items():
            monkeypatch.setenv(name, value)
        who = f"arn:aws:iam::111122223333:user/{user}"
        assert boto3.Session().client("sts").get_caller_identity()["Arn"] == who
        encrypt = client(fake_kms, **credentials()).encrypt
        if denied:
            assert who in refusal(encrypt, KeyId=arn, Plaintext=b"x")[1]
        else:
            encrypt(KeyId=arn, Plaintext=b"x")


def credentials():
    """Return those of the environment: boto3's default session keeps older ones."""
    names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
    return {name: os.environ[variable] for name, variable in names.items()}


def test_calls_from_many_threads_are_all_counted(fake_kms, boto):
    arn = fake_kms.create_key()
    counts = fake_kms.calls

    def encrypt():
        for _ in range(20):
            boto.encrypt(KeyId=arn, Plaintext=b"x")

    threads = [threading.Thread(target=encrypt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake_kms.calls == {"Encrypt": 80}
    assert counts == {}  # what was taken before is a copy


def test_outside_its_block_nobody_answers(monkeypatch):
    with pytest.raises(RuntimeError, match="FakeKms serves inside its with block only"):
        FakeKms().environment()
    with FakeKms() as kms:
        arn = kms.create_key()
        for name, value in kms.environment().items():
            monkeypatch.setenv(name, value)
        boto = client(kms)
        boto.describe_key(KeyId=arn)
    with pytest.raises(EndpointConnectionError):  # also over a connection that was open
        boto.describe_key(KeyId=arn)
    with kms:  # the same one at the same place: an outage is over
        boto.describe_key(KeyId=arn)


def test_its_environment_is_all_that_another_process_needs(fake_kms):
    arn = fake_kms.create_key("etl")
    program = "import boto3; print(boto3.client('kms').describe_key(KeyId='alias/etl')['KeyMetadata']['Arn'])"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment = clean | fake_kms.environment()
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == arn


CANARY = b"CANARY\x00\xff\xfe-7f3a91"


@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize(
    "encode",
    [
        bytes,
        base64.b64encode,
        base64.urlsafe_b64encode,
        lambda data: data.hex().encode(),
        lambda data: data.hex().upper().encode(),
    ],
    ids=["raw", "base64", "urlsafe base64", "hex", "HEX"],
)
def test_plaintext_is_found_however_it_is_written(tmp_path, encode, offset):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    leak = tmp_path / "deep" / "er" / "leak"
    leak.write_bytes(b"{" + encode(b"x" * offset + CANARY + b"yz") + b"}")
    (tmp_path / "clean").write_bytes(b"nothing here" * 100)
    assert find_plaintext([tmp_path], b"another needle", CANARY) == [leak]


def test_plaintext_is_found_across_the_blocks_of_a_large_file(tmp_path):
    for shift in range(1, len(CANARY)):
        leak = tmp_path / "leak"
        leak.write_bytes(bytes(2 * (1 << 20) - shift) + CANARY)
        assert find_plaintext(leak, CANARY) == [leak]


def test_nothing_is_found_where_there_is_nothing(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "near").write_text(json.dumps([CANARY[:-1].hex(), "CANARY"]))
    (tmp_path / "link").symlink_to(tmp_path)
    assert find_plaintext(str(tmp_path), CANARY) == []
    assert find_plaintext([], CANARY) == []


@pytest.mark.parametrize("needles", [(), (b"short",), (CANARY, b"")])
def test_a_needle_that_chance_could_write_is_refused(tmp_path, needles):
    with pytest.raises(ValueError, match="needles have 6 bytes or more; shorter ones are found by chance"):
        find_plaintext(tmp_path, *needles)
