"""In what state KMS keys are: asked of moto, of a KMS that denies, and of keyrings; names come from hostile hands."""

import http.server
import os
import threading
from datetime import datetime, timedelta, timezone

import boto3
import pytest

from beam_envelope import AwsKms, LocalKms, Vault
from beam_envelope.keys.ask import ask_states, shown_name
from beam_envelope.keys.local import generate_local_key
from beam_envelope.keys.provider import WrappedKey
from beam_envelope.keys.state import KeyState

NOWHERE = "arn:aws:kms:us-east-1:123456789012:key/00000000-0000-0000-0000-000000000000"


def states_of(*names, keys=()):
    return {name: found.state for name, found in ask_states(names, keys).items()}


def test_aws_tells_each_state_and_when_a_key_goes(moto_server):
    kms = boto3.client("kms")
    enabled, disabled, going = (kms.create_key()["KeyMetadata"]["Arn"] for _ in range(3))
    kms.disable_key(KeyId=disabled.rpartition("/")[2])
    due = kms.schedule_key_deletion(KeyId=going.rpartition("/")[2], PendingWindowInDays=8)["DeletionDate"]
    found = ask_states([enabled, disabled, going, NOWHERE])
    assert found[enabled] == KeyState("enabled")
    assert found[disabled] == KeyState("disabled")
    assert found[going] == KeyState("pending deletion", "", due.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))
    assert timedelta(7) < due - datetime.now(timezone.utc) < timedelta(9)
    assert found[NOWHERE].state == "not found"
    assert "there is no KMS key" in found[NOWHERE].detail


def test_only_describe_key_is_asked_once_for_each_key(fake_kms):
    arns = [fake_kms.create_key() for _ in range(3)]
    assert states_of(*arns, *arns) == dict.fromkeys(arns, "enabled")
    assert fake_kms.calls == {"DescribeKey": 3}


def test_a_key_that_may_not_be_asked_is_told_with_the_permission(fake_kms):
    arn, other = fake_kms.create_key(), fake_kms.create_key()
    fake_kms.deny("DescribeKey", arn)
    found = ask_states([arn, other])
    assert found[arn] == KeyState(
        "not permitted", "the caller needs kms:DescribeKey on it. AWS says AccessDeniedException"
    )
    assert found[other].state == "enabled"


def test_what_the_network_refuses_is_a_state_too(fake_kms, monkeypatch):
    arn = fake_kms.create_key()
    fake_kms.__exit__()
    monkeypatch.setattr("beam_envelope.keys.aws.Config", lambda **settings: _hasty(settings))
    assert ask_states([arn])[arn].state == "unknown"


def _hasty(settings):
    from botocore.config import Config

    return Config(**{**settings, "retries": {"total_max_attempts": 1}, "connect_timeout": 1})


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("PendingReplicaDeletion", KeyState("pending deletion", "AWS says PendingReplicaDeletion")),
        ("PendingImport", KeyState("unavailable", "AWS says PendingImport")),
        ("Updating", KeyState("enabled", "AWS says Updating")),
        ("Disabled", KeyState("disabled")),
    ],
)
def test_states_that_are_rare_are_told_in_the_words_of_aws(fake_kms, said, expected):
    arn = fake_kms.create_key("etl")
    fake_kms._find("alias/etl").state = said
    assert AwsKms(arn).state() == expected


def test_a_key_of_the_callers_says_how_aws_is_reached_and_no_other_region_is_sent_there(fake_kms, monkeypatch):
    arn = fake_kms.create_key("etl")
    endpoint = fake_kms.endpoint_url
    monkeypatch.delenv("AWS_ENDPOINT_URL_KMS")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    keys = [
        AwsKms("alias/x", region="eu-west-1", endpoint_url="http://127.0.0.1:1"),
        AwsKms("alias/y", endpoint_url=endpoint),
    ]
    assert states_of(arn, "parquet-footer:alias/etl", keys=keys[::-1]) == {
        arn: "enabled",
        "parquet-footer:alias/etl": "enabled",
    }
    assert states_of(arn, keys=keys) == {arn: "enabled"}


def test_a_name_in_a_footer_is_asked_if_it_can_be_one_of_aws(fake_kms):
    arn = fake_kms.create_key("etl")
    names = ["alias/etl", arn.rpartition("/")[2], "alias/gone", "k1", "https://kms.example/key"]
    assert list(states_of(*(f"parquet-footer:{name}" for name in names)).values()) == [
        "enabled",
        "enabled",
        "not found",
        "unknown",
        "unknown",
    ]
    assert fake_kms.calls == {"DescribeKey": 3}


def test_a_keyring_has_the_key_or_not_and_without_one_nobody_knows(tmp_path, local_key):
    (full_name,) = (wrapped.kms_key for wrapped in local_key.generate_data_key({}).wrapped_keys)
    other = LocalKms(tmp_path / "other.json")
    generate_local_key(other)
    name = f"local-kms:{full_name}"
    assert states_of(name, keys=[local_key]) == states_of(name, keys=[other, local_key]) == {name: "enabled"}
    assert ask_states([name], [other])[name].detail == f"the keyring {other.path} has no key {full_name}"
    assert states_of(name, keys=[other]) == {name: "not found"}
    assert "give --key local-kms://" in ask_states([name])[name].detail
    os.chmod(local_key.path, 0o644)
    assert states_of(name, keys=[other, local_key]) == {name: "unknown"}
    assert (local_key.state().state, other.state().state) == ("unknown", "enabled")
    assert LocalKms(other.path, "none").state().state == "not found"


class _Listener:
    def __enter__(self):
        heard = self.heard = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                heard.append((self.path, dict(self.headers)))
                self.send_response(404)
                self.end_headers()

            do_POST = do_GET  # noqa: N815  # the name is http.server's

            def log_message(self, *_):
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def test_a_key_file_cannot_send_a_token_to_a_server_of_its_own(monkeypatch):
    monkeypatch.setenv("VAULT_TOKEN", "s.0123456789")
    with _Listener() as evil, _Listener() as good:
        monkeypatch.setenv("VAULT_ADDR", good.address)
        names = [
            f"hcvault://transit/keys/etl?address={evil.address}",
            f"hcvault://transit/keys/etl#?address={evil.address}",
            f"hcvault://{evil.address}/transit/keys/etl",
            f"aws-kms://alias/etl?endpoint_url={evil.address}",
            "arn:aws:kms:us-east-1.evil.example/:123456789012:key/1",
            "local-kms://etc/passwd",
            "../keyring",
            "",
        ]
        assert set(states_of(*names, keys=[]).values()) == {"unknown"}
        assert (evil.heard, good.heard) == ([], [])
        assert states_of("hcvault://transit/keys/etl") == {"hcvault://transit/keys/etl": "not found"}
        assert [path for path, _ in good.heard] == ["/v1/transit/keys/etl"]
        assert states_of("hcvault://a/b/keys/etl", keys=[Vault("other", address=evil.address)]) == {
            "hcvault://a/b/keys/etl": "not found"
        }
        assert [path for path, _ in evil.heard] == ["/v1/a/b/keys/etl"]


def test_keys_are_shown_so_that_their_kms_is_told():
    assert shown_name(WrappedKey("aws-kms", NOWHERE, b"")) == NOWHERE
    assert shown_name(WrappedKey("hcvault", "hcvault://transit/keys/etl", b"")) == "hcvault://transit/keys/etl"
    assert shown_name(WrappedKey("local-kms", "default/1", b"")) == "local-kms:default/1"


def test_a_provider_of_somebody_elses_has_no_state_to_tell(local_key):
    class Mine(LocalKms):
        provider = "mine"
        state = LocalKms.__mro__[1].state

    assert Mine(local_key.path).state() == KeyState("unknown", "mine keys cannot be asked")
