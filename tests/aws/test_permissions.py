"""docs/permissions.md: each role's whole job runs under exactly the page's policy, and not with any action less."""

import base64
import json
import random
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import boto3
import pytest

from beam_envelope import create_records, open_records
from beam_envelope.keys.cache import clear_caches
from tests.aws.conftest import _request

PAGE = (Path(__file__).parents[2] / "docs" / "permissions.md").read_text(encoding="utf-8")
JSON = [json.loads(block.partition("\n")[2]) for block in PAGE.split("```")[1::2] if block.startswith("json\n")]
POLICIES = dict(zip(("writer", "reader", "rotator", "auditor", "root", "key"), JSON, strict=True))
ROLES = ("writer", "reader", "rotator", "auditor")
CONTEXT = {"dataset": "flights"}
WORDS = ("--context", "dataset=flights")
CONDITION = {"StringEquals": {"kms:EncryptionContext:dataset": "flights"}}
FILES = {"2026/a.csv": b"1,2\n" * 500, "2026/b.csv": b"3,4\n"}
LARGE = {"2026/large.bin": random.Random(1).randbytes(9 << 20)}  # in two parts
KMS_ACTIONS = ("GenerateDataKey", "Encrypt", "Decrypt", "ReEncryptFrom", "ReEncryptTo", "DescribeKey")
# What an S3 operation takes, as the Amazon S3 User Guide has it ("Required permissions for Amazon S3 API operations").
S3_ACTIONS = {
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
}


class Grant(NamedTuple):
    """One action on one resource of a policy."""

    action: str
    resource: str


def listed(value):
    return value if isinstance(value, list) else [value]


def grants(policy, service):
    return {
        Grant(action, resource)
        for statement in policy["Statement"]
        for action in listed(statement["Action"])
        for resource in listed(statement["Resource"])
        if action.startswith(service)
    }


class Enforcer:
    """A WSGI application before S3 that lets through what is granted, and refuses all else as S3 does."""

    def __init__(self, application, allowed):
        self.application, self.allowed, self.used = application, allowed, set()
        self.broken = ""

    def __call__(self, environ, start_response):
        request = _request(environ)
        action = S3_ACTIONS[request.operation]
        path = request.path.strip("/")
        bucket = path.partition("/")[0]
        allowed = self._allows(action, bucket if action == "s3:ListBucket" else path)
        if allowed and request.operation != self.broken:
            answer = []
            body = b"".join(self.application(environ, lambda *head: answer.append(head)))
            # Of an object that is not there, S3 says so only to those who may list the bucket.
            if not answer[0][0].startswith("404") or self._allows("s3:ListBucket", bucket):
                start_response(*answer[0])
                return [body]
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        start_response("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [] if request.operation == "HeadObject" else [body]

    def _allows(self, action, path):
        resource = f"arn:aws:s3:::{path}"
        granted = {one for one in self.allowed if one.action == action and fnmatchcase(resource, one.resource)}
        self.used |= granted
        return bool(granted)


class World:
    """An S3 and a KMS that hold to a policy of the page."""

    def __init__(self, aws, kms, recorder, command, monkeypatch):
        self.aws, self.kms, self._recorder, self._patch = aws, kms, recorder, monkeypatch
        self._application, self.command = recorder.application, command
        self.old, self.new = kms.create_key("old"), kms.create_key("new")
        for bucket in ("opened", "audit"):
            aws.s3.create_bucket(Bucket=bucket)
        self.jobs = 0

    def under(self, kms_actions, s3_grants):
        """From now on, allow this and nothing else; returns who watches over S3."""
        for action in KMS_ACTIONS:
            for key in (self.old, self.new):
                self.kms.deny(action, key)
        for action in kms_actions:
            self.kms.allow(action.removeprefix("kms:"), self.new if action == "kms:ReEncryptTo" else self.old)
        enforcer = Enforcer(self._application, s3_grants)
        self._patch.setattr(self._recorder, "application", enforcer)
        return enforcer

    def seal(self, files):
        """Put files into `raw`, and seal them."""
        self.aws.put("raw", files)
        key = ("--key", f"aws-kms://{self.old}")
        for name in files:
            assert (
                self.command("encrypt", f"s3://raw/{name}", "--output", "s3://sealed/2026/", *key, *WORDS).status == 0
            )

    def free(self):
        """Allow everything."""
        for action in KMS_ACTIONS:
            for key in (self.old, self.new):
                self.kms.allow(action, key)
        self._patch.setattr(self._recorder, "application", self._application)

    def words(self, role):
        """Return the role's job, to or on a place of its own."""
        self.jobs += 1
        key, place = f"aws-kms://{self.old}", f"2026/{self.jobs}"
        return {
            "writer": ("encrypt", "s3://raw/2026/*", "--output", f"s3://sealed/{place}/", "--key", key, *WORDS),
            "reader": ("decrypt", "s3://sealed/2026/*", "--output", f"s3://opened/{place}/", "--key", key, *WORDS),
            "rotator": (
                *("rotate", "s3://sealed/2026/", "--from", key, "--to", f"aws-kms://{self.new}"),
                *("--log", f"s3://audit/{place}.jsonl"),
            ),
            "auditor": ("verify", "s3://sealed/2026/", "--key", key, *WORDS),
        }[role]

    def everything(self):
        """Return all objects that there are."""
        return {bucket: self.aws.read(bucket) for bucket in ("sealed", "opened", "audit")}


@pytest.fixture
def world(aws, fake_kms, recorder, command, monkeypatch):
    world = World(aws, fake_kms, recorder, command, monkeypatch)
    world.seal(FILES)
    return world


@pytest.mark.parametrize("role", ROLES)
def test_a_policy_is_enough_for_the_roles_whole_job_and_no_action_in_it_is_idle(world, role):
    policy = POLICIES[role]
    kms_actions, s3_grants = {one.action for one in grants(policy, "kms:")}, grants(policy, "s3:")
    world.seal(LARGE)
    enforcer = world.under(kms_actions, s3_grants)
    before = world.kms.calls
    said = world.command(*world.words(role))
    assert said.status == 0, said.errors
    called = {
        action
        for call in world.kms.calls - before
        for action in ({"kms:ReEncryptFrom", "kms:ReEncryptTo"} if call == "ReEncrypt" else {f"kms:{call}"})
    }
    assert called == kms_actions
    if "s3:AbortMultipartUpload" in {one.action for one in s3_grants}:
        enforcer.broken = "CompleteMultipartUpload"  # a job that fails drops the parts that it uploaded
        assert world.command(*world.words(role)).status == 1
    assert enforcer.used == s3_grants
    assert [upload for bucket in ("sealed", "opened") for upload in world.aws.uploads(bucket)] == []


@pytest.mark.parametrize("role", ROLES)
def test_without_any_one_action_of_kms_the_job_stops_before_it_starts_and_names_it(world, role):
    policy = POLICIES[role]
    kms_actions, s3_grants = {one.action for one in grants(policy, "kms:")}, grants(policy, "s3:")
    before = world.everything()
    for action in sorted(kms_actions):
        world.under(kms_actions - {action}, s3_grants)
        said = world.command(*world.words(role))
        assert said.status == 1
        assert re.search(rf"is not authorized to\s+perform:\s+{action}\s", said.errors), said.errors
        world.free()
        assert world.everything() == before


@pytest.mark.parametrize("role", ROLES)
def test_without_any_one_action_of_s3_the_job_fails_and_names_it(world, role):
    policy = POLICIES[role]
    kms_actions, s3_grants = {one.action for one in grants(policy, "kms:")}, grants(policy, "s3:")
    before = world.aws.read("sealed")
    for grant in sorted(s3_grants):
        world.aws.put("sealed", before)  # as it was before the last rotation
        if grant.action == "s3:AbortMultipartUpload":
            continue  # of a job that fails, and says why it does
        world.under(kms_actions, s3_grants - {grant})
        said = world.command(*world.words(role))
        assert said.status == 1, grant
        told = said.output + said.errors
        assert grant.action in told, (grant, told)
        assert grant.resource.removeprefix("arn:aws:s3:::").partition("/")[0] in told


def test_an_auditor_inspects_without_any_key(world):
    world.under((), grants(POLICIES["auditor"], "s3:"))
    before = world.kms.calls
    said = world.command("inspect", "s3://sealed/2026/", "--json")
    assert (said.status, len(json.loads(said.output))) == (0, len(FILES))
    assert world.kms.calls == before


def test_a_writer_that_overwrites_needs_to_delete(world):
    policy = POLICIES["writer"]
    words = [*world.words("writer"), "--if-exists=overwrite"]
    words[words.index("--output") + 1] = "s3://sealed/2026/"
    world.under({"kms:GenerateDataKey"}, grants(policy, "s3:"))
    said = world.command(*words)
    assert (said.status, "s3:DeleteObject" in said.errors) == (1, True)
    world.under({"kms:GenerateDataKey"}, grants(policy, "s3:") | {Grant("s3:DeleteObject", "arn:aws:s3:::sealed/*")})
    assert world.command(*words).status == 0


def test_a_key_store_takes_nothing_else(world):
    settings = {"key": f"aws-kms://{world.old}", "keys": "s3://sealed/keys/", "context": CONTEXT}
    enforcer = world.under({"kms:GenerateDataKey"}, grants(POLICIES["writer"], "s3:"))
    envelope = create_records(**settings).encrypt(b"4111")
    assert {one.action for one in enforcer.used} >= {"s3:PutObject"}
    clear_caches()
    world.under({"kms:Decrypt"}, grants(POLICIES["auditor"], "s3:"))
    assert open_records(**settings).decrypt(envelope) == b"4111"


def test_a_second_key_of_a_writer_needs_encrypt_and_an_alias_of_a_rotator_describe_key(world):
    words = (*world.words("writer"), "--key", f"aws-kms://{world.new}")
    world.under({"kms:GenerateDataKey"}, grants(POLICIES["writer"], "s3:"))
    said = world.command(*words)
    assert (said.status, "perform: kms:Encrypt on" in said.errors) == (1, True)
    world.kms.allow("Encrypt", world.new)
    assert world.command(*words).status == 0
    policy = POLICIES["rotator"]
    world.under({one.action for one in grants(policy, "kms:")}, grants(policy, "s3:"))
    words = [word.replace(world.new, "alias/new") for word in world.words("rotator")]
    said = world.command(*words)
    assert (said.status, "kms:DescribeKey" in said.errors) == (1, True)
    world.kms.allow("DescribeKey", world.new)
    assert world.command(*words).status == 0


def test_the_context_that_kms_sees_is_the_one_of_the_condition(world):
    key_file = json.loads(world.aws.read("sealed")["2026/_KEY_FOR_a.csv.json"])
    (form,) = key_file["data_keys"][0]["wrapped_keys"]
    answer = boto3.client("kms").decrypt(
        CiphertextBlob=base64.b64decode(form["wrapped_key"]), EncryptionContext=CONTEXT
    )
    assert answer["KeyId"] == world.old


@pytest.mark.parametrize("role", ROLES)
def test_every_action_on_a_key_is_bound_to_the_dataset(role):
    statements = POLICIES[role]["Statement"]
    assert all(statement["Effect"] == "Allow" for statement in statements)
    for statement in statements:
        of_kms = any(action.startswith("kms:") for action in listed(statement["Action"]))
        assert statement.get("Condition") == (CONDITION if of_kms else None)
        assert "*" not in listed(statement["Resource"])


def test_the_keys_policy_says_the_same_as_those_of_the_roles():
    said = {role: set() for role in ROLES}
    for statement in POLICIES["key"]["Statement"]:
        assert (statement["Effect"], statement["Condition"]) == ("Allow", CONDITION)
        for principal in listed(statement["Principal"]["AWS"]):
            said[principal.rpartition("-")[2]] |= set(listed(statement["Action"]))
    wanted = {role: {one.action for one in grants(POLICIES[role], "kms:")} for role in ROLES}
    wanted["rotator"].remove("kms:ReEncryptTo")  # that is on the new key
    assert said == wanted
