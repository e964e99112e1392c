"""Keys named by URI."""

import pytest

from beam_envelope.errors import FormatError
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.local import LocalKms
from beam_envelope.keys.uri import open_key, open_keys
from beam_envelope.keys.vault import Vault

ARN = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"


@pytest.mark.parametrize(
    ("uri", "key"),
    [
        ("aws-kms://alias/etl", AwsKms("alias/etl")),
        ("aws-kms://alias/etl?region=eu-west-1", AwsKms("alias/etl", region="eu-west-1")),
        (f"aws-kms://{ARN}", AwsKms(ARN, region="eu-west-1")),
        (f"aws-kms://{ARN}?profile=prod", AwsKms(ARN, profile="prod")),
        (
            "aws-kms://1234?region=us-east-1&endpoint_url=http://localhost:1/x",
            AwsKms("1234", region="us-east-1", endpoint_url="http://localhost:1/x"),
        ),
        ("local-kms:///etc/keys/keyring.json", LocalKms("/etc/keys/keyring.json")),
        ("local-kms:///etc/keyring.json?name=pii", LocalKms("/etc/keyring.json", name="pii")),
        ("hcvault://transit/keys/etl", Vault("etl")),
        ("hcvault://a/b/transit/keys/my-key.2", Vault("my-key.2", "a/b/transit")),
        ("hcvault://keys/keys/keys", Vault("keys", "keys")),
        (
            "hcvault://transit/keys/etl?address=https://v:8200&namespace=a/b&role=1&ca_cert=/a&client_cert=/b&verify=true",
            Vault(
                "etl",
                address="https://v:8200",
                namespace="a/b",
                role="1",
                ca_cert="/a",
                client_cert="/b",
                verify=True,
            ),
        ),
        ("hcvault://etl/keys/etl?client_key=/c", Vault("etl", "etl", client_key="/c")),
        ("hcvault://transit/keys/etl?verify=false", Vault("etl", verify=False)),
    ],
)
def test_a_uri_names_a_provider_which_names_the_uri(uri, key):
    assert open_key(uri) == key
    assert str(key) == uri
    assert open_key(str(key)) == key


def test_a_setting_with_odd_characters_survives_the_uri():
    key = AwsKms("alias/etl", profile="a b&c=d?e", endpoint_url="https://vpce-1.kms.eu-west-1.vpce.amazonaws.com:443/")
    assert open_key(str(key)) == key


def test_a_provider_is_returned_as_it_is(local_key):
    assert open_key(local_key) is local_key


@pytest.mark.parametrize(
    "uri", ["alias/etl", ARN, "", "://", "gcp-kms://projects/p", "AWS-KMS://alias/etl", "aws-kms:alias/etl"]
)
def test_an_unknown_scheme_is_named_with_those_that_are_known(uri):
    with pytest.raises(FormatError) as caught:
        open_key(uri)
    assert str(caught.value) == (
        f"the key {uri!r} does not start with a scheme that is known: aws-kms://, local-kms://, hcvault:// "
        "(for example aws-kms://alias/etl)"
    )


@pytest.mark.parametrize(
    "uri", ["aws-kms://", "aws-kms://?region=x", "aws-kms://alias/etl?zone=a", "aws-kms://a?key_id=b"]
)
def test_a_wrong_aws_uri_is_shown_the_form(uri):
    with pytest.raises(FormatError) as caught:
        open_key(uri)
    form = "aws-kms://KEY_ID[?region=...&profile=...&endpoint_url=...&role_arn=...]"
    assert str(caught.value) == f"{uri!r} is not of the form {form}"


@pytest.mark.parametrize("uri", ["local-kms://", "local-kms://a?b=c", "local-kms://a?name=", "local-kms://?name=a"])
def test_a_wrong_local_uri_is_shown_the_form(uri):
    with pytest.raises(FormatError) as caught:
        open_key(uri)
    assert str(caught.value) == f"{uri!r} is not of the form local-kms://PATH or local-kms://PATH?name=NAME"


VAULT_FORM = "hcvault://MOUNT/keys/NAME[?address=...&namespace=...&role=...&ca_cert=...&client_cert=...&client_key=...&verify=...]"


@pytest.mark.parametrize(
    ("path", "query", "named"),
    [
        ("", "", ""),
        ("transit/etl", "", ""),
        ("keys/etl", "", ""),
        ("/keys/etl", "", ""),
        ("transit/keys/etl", "?token=hvs.secret", " with 'token'"),
        ("transit/keys/etl", "?address=https://v&secret_id=secret", " with 'address', 'secret_id'"),
        ("transit/keys/etl", "?verify=secret", " with 'verify'"),
    ],
)
def test_a_wrong_vault_uri_is_shown_the_form_and_no_value_that_may_be_a_token(path, query, named):
    with pytest.raises(FormatError) as caught:
        open_key(f"hcvault://{path}{query}")
    assert str(caught.value) == (
        f"'hcvault://{path}'{named} is not of the form {VAULT_FORM}, where verify is true or false. Tokens and secret "
        "ids have no place in it; they belong into the environment (VAULT_TOKEN)"
    )


def test_a_vault_key_without_a_name_has_characters_that_none_has():
    with pytest.raises(FormatError, match=r"^the mount 'transit', the key name '' or the namespace None has"):
        open_key("hcvault://transit/keys/")


def test_an_arn_of_something_else_is_no_key():
    with pytest.raises(
        FormatError, match=r"is not the ARN of a KMS key; one looks like arn:aws:kms:REGION:ACCOUNT:key/ID$"
    ):
        open_key("aws-kms://arn:aws:s3:::bucket")


def test_what_is_no_key_at_all_is_a_type_error():
    with pytest.raises(TypeError, match=r"a key is a URI or a key provider such as AwsKms\('alias/etl'\), not a int"):
        open_key(3)


def test_one_key_or_several_in_order_each_once(local_key):
    assert open_keys(str(local_key)) == (local_key,)
    assert open_keys(local_key) == (local_key,)
    both = open_keys(["aws-kms://alias/b", local_key, "aws-kms://alias/a", str(local_key)])
    assert both == (AwsKms("alias/b"), local_key, AwsKms("alias/a"))
    with pytest.raises(ValueError, match="no key was given"):
        open_keys([])
