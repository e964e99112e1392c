"""Allow-lists: the key file chooses among the keys that the caller allows, and never beyond them."""

import pickle
from dataclasses import replace

import pytest

from beam_envelope import AllowedKeys, create_shard, open_shard
from beam_envelope.errors import FormatError, KeyAccessError, TamperedError, WrongKeyError
from beam_envelope.keys import allowed
from beam_envelope.keys.allowed import Allowed, AllowedLocalKeys, AllowedVaultKeys
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.keys.provider import DataKey, WrappedKey
from beam_envelope.keys.uri import open_key, open_keys
from beam_envelope.keys.vault import Vault
from beam_envelope.testing import FakeKms

ACCOUNT, OTHER = "111122223333", "444455556666"
ID = "1234abcd-12ab-34cd-56ef-1234567890ab"
MRK = "mrk-1234abcd12ab34cd56ef1234567890ab"
CONTEXT = {"dataset": "orders"}
REST = "alias=data-*&alias=x/y&multi_region=true&partition=aws-cn&profile=p&endpoint_url=http://localhost:1/x"


def wrapped(arn, provider="aws-kms"):
    return WrappedKey(provider, arn, b"blob")


def arn(region="eu-west-1", account=ACCOUNT, key=f"key/{ID}", partition="aws"):
    return f"arn:{partition}:kms:{region}:{account}:{key}"


@pytest.mark.parametrize(
    ("uri", "key"),
    [
        (f"aws-kms://*?account={ACCOUNT}", AllowedKeys([ACCOUNT])),
        (
            f"aws-kms://*?account={ACCOUNT}&account={OTHER}&region=eu-west-1&region=us-east-1&{REST}",
            AllowedKeys(
                [ACCOUNT, OTHER],
                ["eu-west-1", "us-east-1"],
                ["data-*", "alias/x/y"],
                multi_region=True,
                partition="aws-cn",
                profile="p",
                endpoint_url="http://localhost:1/x",
            ),
        ),
        ("hcvault://transit/keys/data-*", AllowedVaultKeys("data-*", Vault("data-x"))),
        (
            "hcvault://a/b/keys/*?address=https://v:8200&namespace=n",
            AllowedVaultKeys("*", Vault("x", "a/b", "https://v:8200", "n")),
        ),
        ("local-kms:///keys/*.json", AllowedLocalKeys("/keys/*.json")),
    ],
)
def test_a_uri_names_an_allow_list_which_names_the_uri(uri, key):
    assert open_key(uri) == key
    assert str(key) == uri
    assert pickle.loads(pickle.dumps(key)) == key
    assert hash(key) == hash(open_key(uri))


@pytest.mark.parametrize(
    "uri",
    [
        "aws-kms://*",
        "aws-kms://*?region=eu-west-1",
        "aws-kms://*?account=1",
        "aws-kms://*?account=",
        "aws-kms://*?account=*",
        f"aws-kms://*?account={ACCOUNT}&region=",
        f"aws-kms://*?account={ACCOUNT}&region=*",
        f"aws-kms://*?account={ACCOUNT}&alias=",
        f"aws-kms://*?account={ACCOUNT}&alias=a.b",
        f"aws-kms://*?account={ACCOUNT}&regio=eu-west-1",
        f"aws-kms://*?account={ACCOUNT}&multi_region=yes&region=eu-west-1",
        f"aws-kms://*?account={ACCOUNT}&multi_region=true",
        f"aws-kms://*?account={ACCOUNT}&profile=a&profile=b",
        f"aws-kms://*?account={ACCOUNT}&partition=",
        "aws-kms://alias/data-*",
        f"aws-kms://*x?account={ACCOUNT}",
        "hcvault://transit*/keys/x",
        "hcvault://*",
        "local-kms://a*/b",
    ],
)
def test_an_allow_list_of_another_form_is_refused(uri):
    with pytest.raises(FormatError):
        open_key(uri)


@pytest.mark.parametrize("settings", [{"accounts": []}, {"accounts": [ACCOUNT], "multi_region": True}])
def test_a_list_that_allows_too_much_is_refused(settings):
    with pytest.raises(ValueError, match=r"accounts are AWS account ids|multi_region needs regions"):
        AllowedKeys(**settings)
    with pytest.raises(TypeError, match="accounts is a list of str"):
        AllowedKeys(ACCOUNT)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        (arn(), arn()),
        (arn("us-east-1"), None),
        (arn(account=OTHER), None),
        (arn(partition="aws-cn"), None),
        (arn(key="alias/data"), None),
        (arn(key=f"key/{MRK}"), arn(key=f"key/{MRK}")),
        (arn("us-east-1", key=f"key/{MRK}"), None),
        (arn(key="key/../x"), None),
        (arn() + "\n", None),
        (arn(account="\u0661" * 12), None),
        ("", None),
    ],
)
def test_account_region_and_partition_of_the_arn_are_compared(name, asked):
    key = AllowedKeys([ACCOUNT], ["eu-west-1"])
    found = key.key_of(wrapped(name))
    assert found == (None if asked is None else AwsKms(asked))
    assert key.may_open(wrapped(name)) == (asked is not None)
    assert not key.may_open(wrapped(name, "local-kms"))


def test_a_multi_region_key_is_asked_for_in_an_allowed_region():
    key = AllowedKeys([ACCOUNT], ["eu-west-1", "eu-north-1"], multi_region=True, profile="p")
    theirs = arn("us-east-1", key=f"key/{MRK}")
    assert key.key_of(wrapped(theirs)) == AwsKms(arn("eu-west-1", key=f"key/{MRK}"), profile="p")
    near = arn("eu-north-1", key=f"key/{MRK}")
    assert key.key_of(wrapped(near)) == AwsKms(near, profile="p")
    assert key.key_of(wrapped(arn("us-east-1"))) is None  # not a multi-Region key
    assert key.key_of(wrapped(arn("us-east-1", OTHER, f"key/{MRK}"))) is None
    assert key.key_of(wrapped(arn("us-east-1", key=f"key/{MRK}", partition="aws-cn"))) is None


def test_without_regions_any_is_allowed():
    assert AllowedKeys([ACCOUNT]).key_of(wrapped(arn("us-east-1"))) == AwsKms(arn("us-east-1"))


def seal(path, key):
    with create_shard(path, key=key, context=CONTEXT) as shard:
        shard.write(b"data")
    clear_caches()
    return path


def read(path, key):
    with open_shard(path, key=key, context=CONTEXT) as shard:
        return shard.read()


def test_a_shard_of_an_allowed_key_opens_and_decrypt_names_that_key(tmp_path, fake_kms):
    ours = fake_kms.create_key("data-acme")
    shard = seal(tmp_path / "a", "aws-kms://alias/data-acme")
    assert read(shard, AllowedKeys([fake_kms.account], [fake_kms.region])) == b"data"
    assert fake_kms.calls == {"GenerateDataKey": 1, "Decrypt": 1}
    clear_caches()
    fake_kms.deny("Decrypt", ours)
    with pytest.raises(KeyAccessError, match=f"not allowed to use KMS key {ours}: the caller needs kms:Decrypt"):
        read(shard, AllowedKeys([fake_kms.account]))


def test_a_key_that_is_not_allowed_is_told_before_any_call(tmp_path, fake_kms):
    ours = fake_kms.create_key("data-acme")
    shard = seal(tmp_path / "a", "aws-kms://alias/data-acme")
    before = fake_kms.calls
    with pytest.raises(WrongKeyError) as caught:
        read(shard, AllowedKeys([OTHER], ["us-east-1"]))
    assert str(caught.value) == (
        f"{shard} is encrypted under {ours}; the keys allowed here are aws-kms://*?account={OTHER}&region=us-east-1. "
        "Give one that it is under"
    )
    assert fake_kms.calls == before
    for wrong in (AllowedKeys([fake_kms.account], ["eu-west-1"]), "hcvault://transit/keys/*", "local-kms://k/*"):
        with pytest.raises(WrongKeyError):
            read(shard, wrong)
    assert fake_kms.calls == before


def test_a_key_file_that_names_an_allowed_key_does_not_widen_the_list(fake_kms):
    """Whoever writes to the storage puts an allowed name on what another key wrapped."""
    ours, theirs = fake_kms.create_key("ours"), fake_kms.create_key("theirs")
    with AwsKms("alias/theirs").generate_data_key(CONTEXT) as data_key:
        (form,) = data_key.wrapped_keys
    assert form.kms_key == theirs
    key = AllowedKeys([fake_kms.account], aliases=["ours"])
    with pytest.raises(WrongKeyError, match="did not wrap this data key"):
        key.unwrap(replace(form, kms_key=ours), CONTEXT)
    with pytest.raises(
        WrongKeyError, match=f"the data key was wrapped by {theirs}, which is not among the keys allowed"
    ):
        key.unwrap(form, CONTEXT)


def test_an_answer_of_another_key_is_refused(fake_kms, monkeypatch):
    ours = fake_kms.create_key("ours")
    with AwsKms("alias/ours").generate_data_key(CONTEXT) as data_key:
        (form,) = data_key.wrapped_keys
    other = arn("us-east-1")
    call = AwsKms._call
    monkeypatch.setattr(AwsKms, "_call", lambda self, *name, **of: {**call(self, *name, **of), "KeyId": other})
    with pytest.raises(TamperedError, match=f"the key file names {ours}, but KMS decrypted its data key with {other}"):
        AllowedKeys([fake_kms.account]).unwrap(form, CONTEXT)


def test_aliases_are_asked_for_before_any_decrypt_and_remembered(tmp_path, fake_kms, monkeypatch):
    ours = fake_kms.create_key("zzz")
    fake_kms._aliases[f"{ours.partition('key/')[0]}alias/data-acme"] = ours  # a second name
    shard = seal(tmp_path / "a", "aws-kms://alias/data-acme")
    key = AllowedKeys([fake_kms.account], aliases=["data-*"])
    assert read(shard, key) == read(shard, key) == b"data"
    second = seal(tmp_path / "b", "aws-kms://alias/data-acme")
    assert read(second, key) == b"data"
    # Two pages of aliases; once more after the caches were cleared.
    assert fake_kms.calls == {"GenerateDataKey": 2, "Decrypt": 2, "ListAliases": 4}
    third = tmp_path / "c"
    with create_shard(third, key="aws-kms://alias/zzz", context=CONTEXT):
        pass
    assert read(third, key) == b""
    assert fake_kms.calls["ListAliases"] == 4  # that of this KMS key is known
    now = allowed.time.monotonic()
    monkeypatch.setattr(allowed.time, "monotonic", lambda: now + 61)
    monkeypatch.setattr(allowed, "ALIASES_TTL_S", 1e9)
    with create_shard(tmp_path / "d", key="aws-kms://alias/zzz", context=CONTEXT):
        pass
    assert read(tmp_path / "d", key) == b""
    assert fake_kms.calls["ListAliases"] == 6


def test_a_key_without_such_an_alias_is_not_asked_to_decrypt(tmp_path, fake_kms):
    ours = fake_kms.create_key("secret")
    shard = seal(tmp_path / "a", "aws-kms://alias/secret")
    with pytest.raises(WrongKeyError) as caught:
        read(shard, AllowedKeys([fake_kms.account], aliases=["data-*"]))
    assert f"{shard} cannot be opened: the data key was wrapped by {ours}, which is not among the keys" in str(
        caught.value
    )
    assert f"aws-kms://*?account={fake_kms.account}&alias=data-*" in str(caught.value)
    assert "Decrypt" not in fake_kms.calls


def test_an_alias_that_points_elsewhere_now_opens_nothing_of_its_old_key(tmp_path, fake_kms):
    fake_kms.create_key("data-acme")
    shard = seal(tmp_path / "a", "aws-kms://alias/data-acme")
    fake_kms.create_key("data-acme")
    with pytest.raises(WrongKeyError, match="which is not among the keys allowed here"):
        read(shard, AllowedKeys([fake_kms.account], aliases=["data-*"]))


def test_a_reader_that_may_not_list_aliases_is_told(tmp_path, fake_kms):
    fake_kms.create_key("data-acme")
    shard = seal(tmp_path / "a", "aws-kms://alias/data-acme")
    fake_kms.deny("ListAliases")
    with pytest.raises(KeyAccessError, match=r"the caller needs kms:ListAliases \(for all resources"):
        read(shard, AllowedKeys([fake_kms.account], aliases=["data-*"]))
    assert "Decrypt" not in fake_kms.calls


@pytest.fixture
def replicated(fake_kms):
    """The ARN of a multi-Region key in us-east-1, and the KMS of eu-west-1 where its replica is."""
    primary = fake_kms.create_key(multi_region=True)
    with FakeKms(region="eu-west-1") as there:
        fake_kms.replicate_key(primary, there)
        yield primary, there


def test_a_replica_opens_what_the_primary_key_wrapped(tmp_path, fake_kms, replicated):
    primary, there = replicated
    shard = seal(tmp_path / "a", f"aws-kms://{primary}")
    near = AllowedKeys([ACCOUNT], ["eu-west-1"], endpoint_url=there.endpoint_url)
    with pytest.raises(WrongKeyError, match="the keys allowed here are"):
        read(shard, near)
    fake_kms.disable_key(primary)
    assert read(shard, replace(near, multi_region=True)) == b"data"
    assert (fake_kms.calls, there.calls) == ({"GenerateDataKey": 1}, {"Decrypt": 1})
    with pytest.raises(KeyAccessError, match="is disabled or pending deletion"):
        read(shard, AllowedKeys([ACCOUNT], ["us-east-1"], multi_region=True))


def test_what_a_replica_opened_still_says_what_wrapped_it(replicated):
    primary, there = replicated
    key = AllowedKeys([ACCOUNT], ["eu-west-1"], multi_region=True, endpoint_url=there.endpoint_url)
    with AwsKms(primary).generate_data_key(CONTEXT) as made, key.unwrap(made.wrapped_keys[0], CONTEXT) as opened:
        assert opened.key_id == made.key_id
        assert opened.wrapped_keys == made.wrapped_keys


def test_the_replica_of_another_key_opens_nothing(fake_kms, replicated):
    _, there = replicated
    other = fake_kms.create_key(multi_region=True)
    with AwsKms(other).generate_data_key(CONTEXT) as made:
        (form,) = made.wrapped_keys
    key = AllowedKeys([ACCOUNT], ["eu-west-1"], multi_region=True, endpoint_url=there.endpoint_url)
    with pytest.raises(KeyAccessError, match="there is no KMS key arn:aws:kms:eu-west-1:"):
        key.unwrap(form, CONTEXT)


def test_keyrings_of_a_folder_open_what_their_keys_wrapped(tmp_path):
    inside, outside = LocalKms(tmp_path / "keys" / "a.json", "x"), LocalKms(tmp_path / "other" / "a.json", "x")
    generate_local_key(inside)
    generate_local_key(LocalKms(tmp_path / "keys" / "b.json", "x"))
    generate_local_key(outside)
    (tmp_path / "keys" / "0.json").write_bytes(b"no keyring")
    (tmp_path / "keys" / "1.json").mkdir()
    pattern = f"local-kms://{tmp_path}/keys/*.json"
    assert read(seal(tmp_path / "1", inside), pattern) == b"data"
    with pytest.raises(WrongKeyError, match="the keys allowed here are local-kms:///"):
        read(seal(tmp_path / "2", outside), pattern)


def test_vault_keys_are_allowed_by_mount_and_name():
    key = open_key("hcvault://a/b/keys/data-*?address=https://v:8200")
    assert key.key_of(wrapped("hcvault://a/b/keys/data-1", "hcvault")) == Vault("data-1", "a/b", "https://v:8200")
    for name in ("a/b/keys/other", "b/keys/data-1", "a/b/keys/data-1/x", "a/b/keys/data-../../x", "a/b/keys/xdata-1"):
        assert not key.may_open(wrapped(f"hcvault://{name}", "hcvault"))
    for name in ("a/b/keys/data-1", "data-1"):
        assert not key.may_open(wrapped(name, "hcvault"))
    assert not key.may_open(wrapped("hcvault://a/b/keys/data-1", "aws-kms"))


def test_special_characters_of_a_vault_glob_are_only_stars():
    key = open_key("hcvault://transit/keys/a.b*")
    assert key.may_open(wrapped("hcvault://transit/keys/a.b1", "hcvault"))
    assert not key.may_open(wrapped("hcvault://transit/keys/axb1", "hcvault"))


@pytest.mark.parametrize("uri", [f"aws-kms://*?account={ACCOUNT}", "hcvault://transit/keys/*", "local-kms://keys/*"])
def test_an_allow_list_writes_nothing(uri, tmp_path):
    key = open_key(uri)
    assert isinstance(key, Allowed)
    with pytest.raises(ValueError, match="is no key to write with"):
        key.generate_data_key({})
    with pytest.raises(ValueError, match="is no key to write with"):
        key.wrap(DataKey(bytes(32)), {})
    with pytest.raises(ValueError, match="is no key to write with"):
        open_keys([AwsKms("alias/x"), key], lists=False)
    with pytest.raises(ValueError, match="is no key to write with"):
        create_shard(tmp_path / "a", key=uri)
    assert not (tmp_path / "a").exists()


def test_rewrapping_names_the_allowed_key(fake_kms):
    fake_kms.create_key("data-acme")
    fake_kms.create_key("new")
    with AwsKms("alias/data-acme").generate_data_key(CONTEXT) as data_key:
        (form,) = data_key.wrapped_keys
    made = AllowedKeys([fake_kms.account]).rewrap(form, CONTEXT, AwsKms("alias/new"))
    assert fake_kms.calls == {"GenerateDataKey": 1, "ReEncrypt": 1}
    assert made.kms_key == AwsKms("alias/new").full_name()
    with pytest.raises(WrongKeyError, match="is not among the keys allowed"):
        AllowedKeys([OTHER]).rewrap(form, CONTEXT, AwsKms("alias/new"))
