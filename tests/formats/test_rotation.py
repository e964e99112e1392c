"""Rotation: which wrapped forms a data key has afterwards, which requests that takes, and what is refused."""

import pickle
from collections import Counter

import pytest

from beam_envelope import (
    AwsKms,
    FormatError,
    KeyAccessError,
    LocalKms,
    TamperedError,
    WrappedKey,
    WrongKeyError,
    create_shard,
    open_shard,
)
from beam_envelope.formats.keyfile import MAX_WRAPPED_KEYS, PARQUET_CIPHER, KeyFile, WrappedDataKey, key_file_name
from beam_envelope.formats.rotation import Rotation, Rotator
from beam_envelope.keys.cache import generate_data_key
from beam_envelope.keys.local import generate_local_key
from beam_envelope.keys.provider import kms_calls

CONTEXT = {"dataset": "flights"}


@pytest.fixture
def keys(tmp_path):
    """Four local keys, A to D."""
    made = [LocalKms(tmp_path / "keyring.json", name) for name in "ABCD"]
    for key in made:
        generate_local_key(key)
    return made


def wrapped_by(*keys, context=CONTEXT):
    """Return a new data key as a key file holds it, and its bytes."""
    with generate_data_key(keys, context) as data_key:
        return WrappedDataKey.of(data_key), bytes(data_key.material)


def forms_of(data_key):
    """Return the names of the KMS keys, without the random part of a local key's name."""
    return [form.kms_key.partition("/")[0] for form in data_key.wrapped_keys]


def rotated(rotation, *data_keys, context=CONTEXT):
    """Rotate a key file of some data keys; check that nothing else of it changes."""
    before = KeyFile(data_keys, context, cipher=PARQUET_CIPHER)
    after = Rotator(rotation).rotate(before, "k.json")
    assert after.with_wrapped_keys(data_keys) == before
    assert [data_key.key_id for data_key in after.data_keys] == [data_key.key_id for data_key in data_keys]
    return after.data_keys


def opened(data_key, key, context=CONTEXT):
    """Return the bytes that each form of a key opens to."""
    (form,) = [form for form in data_key.wrapped_keys if key.may_open(form)]
    with key.unwrap(form, context) as unwrapped:
        return bytes(unwrapped.material)


def calls_of(function):
    """Return which requests a call makes."""
    kms_calls.counts.clear()
    function()
    return dict(kms_calls.counts)


# ---------------------------------------------------------------------------------------- what comes of what


@pytest.mark.parametrize(
    ("before", "settings", "after"),
    [
        ("A", {"to": "B"}, "B"),
        ("B", {"to": "B"}, "B"),
        ("AC", {"to": "B"}, "BC"),
        ("CAD", {"to": "B"}, "BCD"),
        ("AB", {"to": "B"}, "B"),
        ("A", {"to": "A"}, "A"),
        ("A", {"add": "B"}, "AB"),
        ("AB", {"add": "B"}, "AB"),
        ("A", {"add": "BC"}, "ABC"),
        ("AC", {"add": "BC"}, "ACB"),
        ("A", {"to": "B", "add": "C"}, "BC"),
        ("B", {"to": "B", "add": "C"}, "BC"),
        ("A", {"to": "B", "add": "B"}, "B"),
        ("AB", {"remove": "B"}, "A"),
        ("A", {"remove": "B"}, "A"),
        ("ABC", {"remove": "BC"}, "A"),
        ("A", {"add": "B", "remove": "A"}, "B"),
        ("AB", {"add": "B", "remove": "A"}, "B"),
        ("B", {"add": "B", "remove": "A"}, "B"),
        ("AC", {"to": "B", "remove": "C"}, "B"),
        ("BC", {"to": "B", "remove": "C"}, "B"),
        ("AD", {"to": "B", "remove": "C"}, "BD"),
    ],
)
def test_a_rotation_leaves_these_forms_all_of_the_same_data_key_and_a_second_one_changes_nothing(
    keys, before, settings, after
):
    named = dict(zip("ABCD", keys, strict=True))
    several = {name: tuple(named[letter] for letter in letters) for name, letters in settings.items() if name != "to"}
    rotation = Rotation((keys[0],), named[settings["to"]] if "to" in settings else None, **several)
    data_key, material = wrapped_by(*(named[letter] for letter in before))
    (found,) = rotated(rotation, data_key)
    assert "".join(forms_of(found)) == after
    assert {opened(found, named[letter]) for letter in after} == {material}
    if rotation.to not in rotation.source:
        assert calls_of(lambda: rotated(rotation, found)) == {}
        assert rotated(rotation, found) == (found,)


def test_forms_that_stay_stay_as_they_are(keys):
    data_key, _ = wrapped_by(*keys[:3])
    (found,) = rotated(Rotation((keys[0],), keys[3]), data_key)
    assert found.wrapped_keys[1:] == data_key.wrapped_keys[1:]
    (found,) = rotated(Rotation((keys[0],), add=(keys[3],)), data_key)
    assert found.wrapped_keys[:3] == data_key.wrapped_keys


def test_the_same_key_wraps_anew(keys):
    data_key, material = wrapped_by(keys[0])
    (found,) = rotated(Rotation((keys[0],), keys[0]), data_key)
    assert (forms_of(found), found != data_key, opened(found, keys[0])) == (["A"], True, material)


def test_any_key_of_several_to_rotate_from_will_do(keys):
    rotation = Rotation((keys[0], keys[1]), keys[2])
    for key in keys[:2]:
        data_key, material = wrapped_by(key)
        (found,) = rotated(rotation, data_key)
        assert (forms_of(found), opened(found, keys[2])) == (["C"], material)


def test_of_a_parquet_files_data_keys_those_under_other_kms_keys_stay(keys):
    mine, material = wrapped_by(keys[0])
    theirs, _ = wrapped_by(keys[3])
    found = rotated(Rotation((keys[0],), keys[1]), theirs, mine)
    assert (found[0], forms_of(found[1]), opened(found[1], keys[1])) == (theirs, ["B"], material)


def test_a_shard_opens_under_the_new_key_and_no_more_under_the_old(keys, tmp_path):
    with create_shard(tmp_path / "a", key=keys[0], context=CONTEXT) as shard:
        shard.write(b"some bytes")
    path = tmp_path / key_file_name("a")
    old = KeyFile.from_bytes(path.read_bytes(), "k")
    path.write_bytes(Rotator(Rotation((keys[0],), keys[1])).rotate(old, "k").to_bytes())
    with open_shard(tmp_path / "a", key=keys[1], context=CONTEXT) as shard:
        assert shard.read() == b"some bytes"
    with pytest.raises(WrongKeyError):
        open_shard(tmp_path / "a", key=keys[0], context=CONTEXT)


# ------------------------------------------------------------------------------------------------- requests


def test_a_plan_tells_what_comes_of_it_and_changes_nothing(keys):
    data_key, _ = wrapped_by(keys[0], keys[2])
    rotator = Rotator(Rotation((keys[0],), keys[1]))
    key_file = KeyFile((data_key,), CONTEXT)
    kms_calls.counts.clear()
    (step,) = rotator.plan(key_file, "k.json")
    assert (dict(kms_calls.counts), step.changes) == ({}, True)
    made = rotator.make(step, CONTEXT)
    assert step.kms_keys == tuple((form.provider, form.kms_key) for form in made.wrapped_keys)
    assert not rotator.plan(key_file.with_wrapped_keys([made]), "k.json")[0].changes


def test_something_may_wait_before_each_request(keys):
    data_key, _ = wrapped_by(keys[0])
    rotator = Rotator(Rotation((keys[0],), keys[1], add=(keys[2],)))
    (step,) = rotator.plan(KeyFile((data_key,), CONTEXT), "k.json")
    waits = []
    rotator.make(step, CONTEXT, lambda: waits.append(1))
    assert len(waits) == 2


def test_aws_re_encrypts_inside_kms_and_a_key_arn_needs_no_further_permission(fake_kms):
    arns = [fake_kms.create_key(name) for name in ("old", "new")]
    data_key, material = wrapped_by(AwsKms(arns[0]))
    fake_kms.deny("Decrypt")
    before = fake_kms.calls
    (found,) = rotated(Rotation((AwsKms(arns[0]),), AwsKms(arns[1])), data_key)
    assert fake_kms.calls - before == Counter(ReEncrypt=1)
    fake_kms.allow("Decrypt")
    assert opened(found, AwsKms(arns[1])) == material


def test_an_alias_takes_one_request_for_its_name_however_many_key_files_there_are(fake_kms):
    for name in ("old", "new"):
        fake_kms.create_key(name)
    rotator = Rotator(Rotation((AwsKms("alias/old"),), AwsKms("alias/new")))
    data_keys = [wrapped_by(AwsKms("alias/old"))[0] for _ in range(3)]
    before = fake_kms.calls
    for data_key in data_keys:
        once = rotator.rotate(KeyFile((data_key,), CONTEXT), "k.json")
        assert rotator.rotate(once, "k.json") == once
    assert fake_kms.calls - before == Counter(DescribeKey=2, ReEncrypt=3)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "A"}, "nothing to do: give a key to rotate to (--to), to add (--add) or to remove (--remove)"),
        (
            {"source": "", "to": "B"},
            (
                "give the key that opens what is there (--from): its form is what others are made of, and what stays "
                "when one is removed"
            ),
        ),
        ({"source": "A", "to": "B", "remove": "B"}, "{B} is to be removed, and added as well. Give it once"),
        ({"source": "A", "add": "BC", "remove": "C"}, "{C} is to be removed, and added as well. Give it once"),
    ],
)
def test_a_rotation_that_makes_no_sense_is_refused(keys, settings, message):
    named = dict(zip("ABCD", keys, strict=True))
    several = {name: tuple(named[letter] for letter in letters) for name, letters in settings.items() if name != "to"}
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
        Rotation(to=named.get(settings.get("to")), **several)
    assert str(caught.value) == message.format_map({name: str(key) for name, key in named.items()})


def refuses(rotation, *data_keys, context=CONTEXT):
    """Rotate what must be refused; return the error's class and its message."""
    with pytest.raises((WrongKeyError, TamperedError, FormatError)) as caught:
        Rotator(rotation).rotate(KeyFile(data_keys, context, cipher=PARQUET_CIPHER), "k.json")
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize("settings", [{"to": "B"}, {"add": ("B",)}, {"remove": ("B",)}])
def test_a_key_file_under_another_key_names_both(keys, settings):
    data_key, _ = wrapped_by(keys[3])
    named = {"to": keys[1]} if "to" in settings else dict.fromkeys(settings, (keys[1],))
    assert refuses(Rotation((keys[0],), **named), data_key) == (
        WrongKeyError,
        f"k.json is wrapped by {keys[3].full_name()}, and not by {keys[0]}. Give the key that it is under",
    )


def test_the_key_to_rotate_to_has_to_come_from_somewhere(keys):
    data_key, _ = wrapped_by(keys[1])
    kind, message = refuses(Rotation((keys[0],), keys[2], add=(keys[1],)), data_key)
    assert (kind, "is wrapped by B/" in message) == (WrongKeyError, True)


def test_a_key_that_made_none_of_the_forms_is_not_asked_for_its_name(fake_kms):
    old, new = fake_kms.create_key(), fake_kms.create_key()
    data_key, _ = wrapped_by(AwsKms(old))
    elsewhere = AwsKms("alias/gone", region="eu-west-1")
    before = fake_kms.calls
    rotated(Rotation((AwsKms(old),), AwsKms(new), remove=(elsewhere,)), data_key)
    assert fake_kms.calls - before == Counter(ReEncrypt=1)


def test_what_only_the_removed_key_opens_keeps_it(keys):
    data_key, _ = wrapped_by(keys[1])
    rotation = Rotation((keys[0],), remove=(keys[1],))
    kind, message = refuses(rotation, data_key)
    assert (kind, message.partition(",")[0]) == (WrongKeyError, "k.json is wrapped by nothing but the keys to remove")
    assert calls_of(lambda: refuses(rotation, data_key)) == {}


def test_a_key_is_not_removed_on_the_word_of_a_key_file_alone(keys):
    """What stays may be no form of the data key at all: somebody who may write to the folder can put it there."""
    good, _ = wrapped_by(keys[0])
    other, _ = wrapped_by(keys[1])
    garbage = WrappedKey("local-kms", keys[1].full_name(), b"\0" * 60)
    remove = Rotation((keys[1],), remove=(keys[0],))
    kind, message = refuses(remove, WrappedDataKey(good.key_id, (*good.wrapped_keys, *other.wrapped_keys)))
    assert (kind, "is another data key, so the other form must stay" in message) == (TamperedError, True)
    assert refuses(remove, WrappedDataKey(good.key_id, (*good.wrapped_keys, garbage)))[0] is TamperedError
    kind, message = refuses(Rotation((keys[0],), remove=(keys[0],)), wrapped_by(keys[0], keys[1])[0])
    assert kind is WrongKeyError
    assert "Name with --from a key that stays: its form is tried before another goes" in message


@pytest.mark.parametrize("settings", [{"to": "B"}, {"to": "B", "add": "C"}, {"add": "B", "remove": "A"}])
def test_a_bogus_form_of_the_new_key_that_is_there_already_is_replaced(keys, settings):
    named = dict(zip("ABCD", keys, strict=True))
    several = {name: tuple(named[letter] for letter in letters) for name, letters in settings.items() if name != "to"}
    rotation = Rotation((keys[0],), named[settings["to"]] if "to" in settings else None, **several)
    good, material = wrapped_by(keys[0])
    other, _ = wrapped_by(keys[1])
    for bogus in (*other.wrapped_keys, WrappedKey("local-kms", keys[1].full_name(), b"\0" * 60)):
        (found,) = rotated(rotation, WrappedDataKey(good.key_id, (bogus, *good.wrapped_keys, bogus)))
        assert {opened(found, named[letter]) for letter in forms_of(found)} == {material}
        assert "A" not in forms_of(found)


def test_two_forms_of_the_old_key_are_refused_since_one_is_not_ours(keys):
    good, _ = wrapped_by(keys[0])
    other, _ = wrapped_by(keys[0])
    for forms in ((*good.wrapped_keys, *other.wrapped_keys), (*other.wrapped_keys, *good.wrapped_keys)):
        kind, message = refuses(Rotation((keys[0],), keys[1]), WrappedDataKey(good.key_id, forms))
        assert (kind, message.startswith("k.json has two forms of one data key by A/")) == (TamperedError, True)


def test_a_form_that_another_kms_key_made_or_a_changed_context_is_refused(fake_kms):
    arns = [fake_kms.create_key() for _ in range(3)]
    data_key, _ = wrapped_by(AwsKms(arns[2]))
    lie = WrappedDataKey(data_key.key_id, (WrappedKey("aws-kms", arns[0], data_key.wrapped_keys[0].wrapped),))
    rotation = Rotation((AwsKms(arns[0]),), AwsKms(arns[1]))
    assert refuses(rotation, lie)[0] is WrongKeyError
    data_key, _ = wrapped_by(AwsKms(arns[0]))
    assert refuses(rotation, data_key, context={"dataset": "other"})[0] is TamperedError
    assert refuses(rotation, data_key, context={})[0] is TamperedError


def test_an_answer_from_another_source_key_or_for_another_new_key_is_refused(fake_kms, monkeypatch):
    arns = [fake_kms.create_key() for _ in range(3)]
    data_key, _ = wrapped_by(AwsKms(arns[0]))
    call = AwsKms._call
    for field, kind in (("SourceKeyId", TamperedError), ("KeyId", WrongKeyError)):
        monkeypatch.setattr(AwsKms, "_call", lambda *a, field=field, **k: {**call(*a, **k), field: arns[2]})
        assert refuses(Rotation((AwsKms(arns[0]),), AwsKms(arns[1])), data_key)[0] is kind


def test_one_key_under_two_names_is_not_both_added_and_removed(fake_kms):
    old, new = fake_kms.create_key("old"), fake_kms.create_key("new")
    data_key, _ = wrapped_by(AwsKms(old), AwsKms(new))
    kind, message = refuses(Rotation((AwsKms(old),), AwsKms("alias/new"), remove=(AwsKms(new),)), data_key)
    assert (kind, message) == (
        WrongKeyError,
        f"k.json: {new} is to be removed, and added under another name. Give it once",
    )


def test_a_missing_permission_is_named(fake_kms):
    old, new = fake_kms.create_key(), fake_kms.create_key()
    data_key, _ = wrapped_by(AwsKms(old))
    for operation, key in (("ReEncryptFrom", old), ("ReEncryptTo", new)):
        fake_kms.deny(operation, key)
        with pytest.raises(KeyAccessError, match="needs kms:ReEncryptFrom on the old key and kms:ReEncryptTo on the"):
            rotated(Rotation((AwsKms(old),), AwsKms(new)), data_key)
        fake_kms.allow(operation, key)
    both, _ = wrapped_by(AwsKms(old), AwsKms(new))
    fake_kms.deny("Decrypt")
    with pytest.raises(KeyAccessError, match="needs kms:Decrypt on it"):
        rotated(Rotation((AwsKms(old),), remove=(AwsKms(new),)), both)


def test_no_more_forms_than_a_key_file_holds(tmp_path):
    keys = [LocalKms(tmp_path / "k.json", f"k{number}") for number in range(MAX_WRAPPED_KEYS + 1)]
    for key in keys:
        generate_local_key(key)
    data_key, _ = wrapped_by(*keys[:-1])
    assert refuses(Rotation((keys[0],), add=(keys[-1],)), data_key) == (
        FormatError,
        f"k.json would hold {MAX_WRAPPED_KEYS + 1} forms of a data key; {MAX_WRAPPED_KEYS} are allowed",
    )


def test_a_rotation_travels_and_is_equal_to_its_copy(keys):
    rotation = Rotation((keys[0],), keys[1], (keys[2],), (keys[3],))
    assert pickle.loads(pickle.dumps(rotation)) == rotation
    assert {rotation: 1}[pickle.loads(pickle.dumps(rotation))] == 1
