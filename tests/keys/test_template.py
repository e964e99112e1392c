"""Templates: what may be one, and what may fill it."""

import enum
import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_envelope.errors import FormatError
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.local import LocalKms
from beam_envelope.keys.provider import DataKey, WrappedKey
from beam_envelope.keys.template import KeyTemplate, checked_value, fill, gaps
from beam_envelope.keys.uri import fill_key, key_gaps, open_key, open_keys
from beam_envelope.keys.vault import Vault


class Tenant(str, enum.Enum):
    """A text that shows itself as another one."""

    ACME = "acme"


@pytest.mark.parametrize(
    ("uri", "values", "key"),
    [
        ("aws-kms://alias/data-{tenant}", {"tenant": "acme"}, AwsKms("alias/data-acme")),
        ("aws-kms://alias/{a}/{b}?region=eu-west-1", {"a": "1", "b": "2"}, AwsKms("alias/1/2", region="eu-west-1")),
        (
            "aws-kms://arn:aws:kms:eu-west-1:111122223333:alias/data-{tenant}",
            {"tenant": "acme"},
            AwsKms("arn:aws:kms:eu-west-1:111122223333:alias/data-acme"),
        ),
        ("hcvault://transit/keys/{tenant}", {"tenant": "acme"}, Vault("acme")),
        ("hcvault://{team}/keys/data-{tenant}", {"team": "t", "tenant": "acme"}, Vault("data-acme", "t")),
        ("local-kms:///keys/{tenant}.json", {"tenant": "acme"}, LocalKms("/keys/acme.json")),
        ("local-kms:///keyring.json?name={tenant}", {"tenant": "acme"}, LocalKms("/keyring.json", "acme")),
    ],
)
def test_a_template_becomes_the_key_of_its_values(uri, values, key):
    template = open_key(uri)
    assert isinstance(template, KeyTemplate)
    assert key_gaps([template]) == tuple(values)
    assert fill_key(template, values) == key
    assert str(template) == uri
    assert open_key(template) is template
    assert pickle.loads(pickle.dumps(template)) == template


def test_a_key_without_gaps_stays_as_it_is(local_key):
    assert fill_key(local_key, {}) is local_key
    assert key_gaps([local_key, AwsKms("alias/{odd}")]) == ()


def test_the_path_of_a_keyring_is_fixed_where_the_pipeline_is_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    template = open_key("local-kms://keys/{tenant}.json?name={tenant}")
    monkeypatch.chdir("/")
    assert fill_key(template, {"tenant": "acme"}) == LocalKms(tmp_path / "keys" / "acme.json", "acme")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("aws-kms://{key}", "data may fill the name of an alias only"),
        ("aws-kms://key/{id}", "data may fill the name of an alias only"),
        ("aws-kms://arn:aws:kms:eu-west-1:{account}:alias/data", "data may fill the name of an alias only"),
        ("aws-kms://arn:aws:kms:{region}:111122223333:alias/{tenant}", "data may fill the name of an alias only"),
        ("aws-kms://arn:aws:kms:eu-west-1:111122223333:key/{id}", "data may fill the name of an alias only"),
        ("aws-kms://alias/a-{tenant}?region={region}", "data may fill no setting"),
        ("hcvault://transit/keys/{tenant}?address=https://{host}", "data may fill no setting"),
        ("aws-kms://alias/{a}-{b}", "between two gaps there is '-'"),
        ("aws-kms://alias/{a}{b}", "between two gaps there is ''"),
        ("aws-kms://alias/{a}/x/{b}.{c}", "between two gaps there is '.'"),
        ("aws-kms://alias/{}", "it has braces that are no {name}"),
        ("aws-kms://alias/{a b}", "it has braces that are no {name}"),
        ("aws-kms://alias/{a.b}", "it has braces that are no {name}"),
        ("aws-kms://alias/{{a}}", "it has braces that are no {name}"),
        ("aws-kms://alias/a}", "it has braces that are no {name}"),
        ("gcp-kms://{tenant}", "does not start with a scheme that is known"),
        ("hcvault://{tenant}", "is not of the form"),
        ("local-kms://k.json?nam={tenant}", "is not of the form"),
        ("aws-kms://alias/{tenant}?regio=x", "is not of the form"),
    ],
)
def test_a_template_of_another_form_is_refused(uri, said):
    with pytest.raises(FormatError) as caught:
        open_key(uri)
    assert said in str(caught.value)


def test_two_elements_with_different_values_never_mean_one_key():
    # With a dash between the gaps, ("a-b", "c") and ("a", "b-c") would.
    template = open_key("aws-kms://alias/{a}/{b}")
    assert fill_key(template, {"a": "a-b", "b": "c"}) != fill_key(template, {"a": "a", "b": "b-c"})


@pytest.mark.parametrize(
    "value", ["acme", "a", "A-1_b", "a.b.c", "-", "0" * 64, "de305d54-75b4-431b-adb2-eb6b9e546014"]
)
def test_a_plain_value_fills_a_gap(value):
    assert checked_value(value) == value


def test_what_is_checked_is_what_is_used():
    assert checked_value(42) == "42"
    assert str(Tenant.ACME) != "acme"
    assert type(checked_value(Tenant.ACME)) is str
    assert checked_value(Tenant.ACME) == "acme"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "it is empty"),
        (None, "it is null"),
        (True, "it is a bool"),
        (1.5, "it is a float"),
        (b"acme", "it is a bytes"),
        (["acme"], "it is a list"),
        pytest.param(10**5000, "it is a int", id="a huge int"),
        ("x" * 65, "it has 65 characters"),
        *(
            (value, "it has other characters")
            for value in (
                *(
                    "a/b",
                    "/a",
                    "..",
                    ".",
                    "a..b",
                    ".a",
                    "a.",
                    "../other",
                    "a\\b",
                    "a b",
                    "a\n",
                    "\na",
                    "a\x00",
                    "{tenant}",
                ),
                *(
                    "a{",
                    "}",
                    "a?region=x",
                    "a#b",
                    "a%2Fb",
                    "a:b",
                    "*",
                    "a*",
                    "ä",
                    "\uff41",
                    "a\u200b",
                    "\u0661",
                    "a&b=c",
                    "a@b",
                ),
            )
        ),
    ],
)
def test_a_hostile_value_fills_no_gap_and_is_not_shown(value, said):
    with pytest.raises(ValueError, match="it ") as caught:
        checked_value(value)
    assert said in str(caught.value)
    assert caught.value.__cause__ is None
    if isinstance(value, str) and len(value) > 3:
        assert value not in str(caught.value)


@given(st.text())
def test_whatever_fills_a_path_stays_in_its_folder(value):
    try:
        text = checked_value(value)
    except ValueError:
        return
    key = fill_key(KeyTemplate("local-kms:///keys/{tenant}.json"), {"tenant": text})
    assert os.path.dirname(key.path) == "/keys"
    assert key == LocalKms(f"/keys/{value}.json")
    assert fill_key(KeyTemplate("aws-kms://alias/data-{t}?region=r"), {"t": text}) == AwsKms(f"alias/data-{value}", "r")
    assert fill_key(KeyTemplate("hcvault://{t}/keys/x"), {"t": text}).mount == value


@pytest.mark.parametrize(
    ("uri", "values"),
    [
        ("aws-kms://alias/{a}", {"a": "x.y"}),
        ("aws-kms://arn:aws:kms:eu-west-1:111122223333:alias/{a}", {"a": "x.y"}),
        ("aws-kms://alias/{a}/{b}", {"a": "aws", "b": "s3"}),
        (f"aws-kms://alias/{'long' * 50}{{a}}", {"a": "SECRET" * 10}),
        ("hcvault://transit/keys/{a}", {"a": "-SECRET"}),
    ],
)
def test_what_no_key_can_be_called_is_refused_without_the_value(uri, values):
    with pytest.raises(FormatError) as caught:
        fill_key(open_key(uri), values)
    assert f"with this value of 'a'{', ' + repr('b') if 'b' in values else ''}, " in str(caught.value)
    assert not any(len(value) > 3 and value in str(caught.value) for value in values.values())
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_a_value_that_looks_like_a_gap_is_not_filled():
    assert fill("{a}/{b}", {"a": "{b}", "b": "1"}) == "{b}/1"
    assert gaps("{a}/{b}{a}{c d}{}") == ("a", "b")


@pytest.mark.parametrize(
    "use",
    [
        lambda key: key.generate_data_key({}),
        lambda key: key.wrap(DataKey(bytes(32)), {}),
        lambda key: key.unwrap(WrappedKey("aws-kms", "x", b""), {}),
        lambda key: key.rewrap(WrappedKey("aws-kms", "x", b""), {}, key),
        lambda key: key.may_open(WrappedKey("aws-kms", "x", b"")),
    ],
)
def test_a_template_is_no_key(use):
    with pytest.raises(TypeError, match=r"the key aws-kms://alias/\{tenant\} is a template, and was not filled"):
        use(open_key("aws-kms://alias/{tenant}"))


def test_what_fills_no_template_refuses_it():
    with pytest.raises(ValueError, match=r"the key aws-kms://alias/\{t\} is a template, and nothing fills it here"):
        open_keys(["aws-kms://alias/etl", "aws-kms://alias/{t}"])
    assert len(open_keys(["aws-kms://alias/etl", "aws-kms://alias/{t}"], templates=True)) == 2
