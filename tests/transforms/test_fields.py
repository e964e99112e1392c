"""EncryptFields and DecryptFields over dicts: what goes in comes out, moved cells are seen, failures say where."""

import base64
import datetime as dt
import itertools
import pickle
import re
from decimal import Decimal
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.display import DisplayData
from apache_beam.transforms.error_handling import CollectingErrorHandler
from apache_beam.utils.timestamp import Duration, Timestamp

from beam_envelope import (
    ANY_CONTEXT,
    AlreadyEncryptedError,
    DataKeyPolicy,
    DecryptFields,
    EncryptFields,
    FormatError,
    LocalKms,
    NotEncryptedError,
    TamperedError,
    jobs,
)
from beam_envelope.formats.keyfile import key_file_name
from beam_envelope.keys.local import generate_local_key
from beam_envelope.transforms.elements import FailedRecord

CONTEXT = {"dataset": "people", "tenant": "a"}
ADA = {
    "id": 1,
    "email": "ada@example.org",
    "address": {"street": "1 Main St", "city": "London"},
    "items": [{"card": "4111", "n": 1}, {"card": "4222", "n": 2}],
    "tags": ["x", "y"],
    "born": dt.date(1815, 12, 10),
}
PATHS = ["email", "address.street", "items[*].card", "tags[*]", "born"]

_kept = {}


def keep(element, name):
    """Keep an element; a function of a module is pickled by its name, so the dict is this process's own."""
    _kept.setdefault(name, []).append(element)


def run(transform, elements, *, catch=False):
    """Run a transform on elements in this process; return the outputs, and the failures and counts on request."""
    _kept.clear()
    pipeline = jobs.make_pipeline(PipelineOptions([]), 1, 0)
    # Pickled, so that Beam has no coder that would refuse what is tested here.
    source = pipeline | beam.Create([pickle.dumps(element) for element in elements]) | "Load" >> beam.Map(pickle.loads)
    if catch:
        with CollectingErrorHandler() as handler:
            _ = source | transform.with_error_handler(handler) | "Keep" >> beam.Map(keep, "done")
        _ = handler.output() | "KeepFailed" >> beam.Map(keep, "failed")
    else:
        _ = source | transform | "Keep" >> beam.Map(keep, "done")
    result = pipeline.run()
    result.wait_until_finish()
    if catch:
        return _kept.get("done", []), _kept.get("failed", []), jobs.counters(result)
    return _kept.get("done", [])


def fails(transform, elements):
    """Run a transform that must fail; return the error's class and its message, without what the runner adds."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  # the caller compares both
        run(transform, elements)
    message = str(caught.value).partition(" [while running")[0]
    if isinstance(caught.value, RuntimeError):
        name, _, message = message.partition(": ")
        return name, message
    return type(caught.value).__name__, message


@pytest.fixture
def encrypt(tmp_path, local_key):
    """Make EncryptFields with a key, key store and context."""

    def make(fields, **settings):
        return EncryptFields(fields, **{"key": local_key, "keys": tmp_path / "keys", "context": CONTEXT, **settings})

    return make


@pytest.fixture
def decrypt(tmp_path, local_key):
    """Make DecryptFields with the same."""

    def make(fields, **settings):
        return DecryptFields(fields, **{"key": local_key, "keys": tmp_path / "keys", "context": CONTEXT, **settings})

    return make


# ---------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("encoding", ["binary", "base64"])
@pytest.mark.parametrize("deterministic", [(), ["email", "items[*].card"]])
def test_elements_come_back_and_only_the_fields_are_encrypted(encrypt, decrypt, encoding, deterministic):
    (sealed,) = run(encrypt(PATHS, encoding=encoding, deterministic=deterministic), [ADA])
    kind = bytes if encoding == "binary" else str
    assert sealed["id"] == 1
    assert sealed["address"]["city"] == "London"
    assert [item["n"] for item in sealed["items"]] == [1, 2]
    cells = [sealed["email"], sealed["address"]["street"], sealed["born"], *sealed["tags"]]
    cells += [item["card"] for item in sealed["items"]]
    assert {type(cell) for cell in cells} == {kind}
    assert len(set(cells)) == len(cells) == 7
    assert "ada@" not in str(sealed)
    assert run(decrypt(PATHS), [sealed]) == [ADA]


def test_base64_is_that_of_the_cells(encrypt, decrypt):
    (sealed,) = run(encrypt(["email"], encoding="base64"), [ADA])
    cell = base64.b64decode(sealed["email"], validate=True)
    assert len(cell) == 45 + len(b"u\0ada@example.org")
    assert run(decrypt(["email"]), [{"email": cell}]) == [{"email": "ada@example.org"}]


@pytest.mark.parametrize(
    "value",
    [
        True, 0, -(2**70), -0.0, "", "日本", b"", b"\xf8" * 60, Decimal("1.10"), (1, [2]), {"b": 1, "a": None}, [],
        dt.datetime(2024, 10, 27, 2, 30, tzinfo=dt.timezone.utc), "+PgA" * 20, "+notbase64",
        Timestamp(micros=1_700_000_000_123_456), Duration(micros=-5),
    ],
    ids=repr,
)  # fmt: skip
def test_values_come_back_with_their_types(encrypt, decrypt, value):
    (sealed,) = run(encrypt(["x"]), [{"x": value}])
    assert type(sealed["x"]) is bytes
    (opened,) = run(decrypt(["x"]), [sealed])
    assert type(opened["x"]) is type(value)
    assert repr(opened["x"]) == repr(value)


def test_null_stays_null_and_what_is_in_a_list_is_encrypted_one_by_one(encrypt, decrypt):
    elements = [{"a": None, "b": {"c": None}, "d": None, "e": [None, 1]}, {"a": 1, "b": None, "d": [], "e": None}]
    paths = ["a", "b.c", "d[*]", "e[*]"]
    sealed = run(encrypt(paths), elements)
    assert sealed[0] == {**elements[0], "e": [None, sealed[0]["e"][1]]}
    assert sealed[1] == {**elements[1], "a": sealed[1]["a"]}
    assert run(decrypt(paths), sealed) == elements


def test_elements_are_not_changed_in_place(encrypt, tmp_path):
    dofn = started(encrypt(PATHS))
    element = pickle.loads(pickle.dumps(ADA))
    dofn.process(element)
    assert element == ADA


def started(transform, *, bounded=True):
    """Return the DoFn of a transform in the middle of a bundle."""
    seen = []
    transform.apply = lambda label, dofn, *_: seen.append(dofn)
    transform.expand(beam.pvalue.PCollection(None, element_type=beam.typehints.Any, is_bounded=bounded))
    (dofn,) = seen
    dofn.start_bundle()
    return dofn


def test_an_empty_input_makes_no_key_and_no_call(encrypt, tmp_path, fake_kms):
    assert run(encrypt(["a"], key=f"aws-kms://{fake_kms.create_key('etl')}"), []) == []
    assert not (tmp_path / "keys").exists()
    assert fake_kms.calls["GenerateDataKey"] == 0


# ----------------------------------------------------------------------------------------------------- calls, counts


def test_the_kms_is_called_once_for_a_bundle_however_many_fields(encrypt, decrypt, fake_kms, tmp_path):
    key = f"aws-kms://{fake_kms.create_key('etl')}"
    sealed = run(encrypt(PATHS, key=key), [ADA] * 50)
    assert fake_kms.calls == {"GenerateDataKey": 1}
    assert len(list((tmp_path / "keys").iterdir())) == 1
    assert run(decrypt(PATHS, key=key), sealed) == [ADA] * 50
    assert fake_kms.calls == {"GenerateDataKey": 1, "Decrypt": 1}


def test_deterministic_fields_cost_one_key_more_for_the_whole_dataset(encrypt, fake_kms, tmp_path):
    key = f"aws-kms://{fake_kms.create_key('etl')}"
    for _ in range(2):
        run(encrypt(["email", "id"], key=key, deterministic=["email", "id"]), [ADA] * 5)
    assert fake_kms.calls["GenerateDataKey"] == 1
    run(encrypt(["email", "id"], key=key, deterministic=["email"]), [ADA] * 5)
    assert fake_kms.calls["GenerateDataKey"] == 2


def test_what_was_done_is_counted(encrypt, decrypt):
    sealed, _, counts = run(encrypt(["email", "tags[*]"]), [ADA, ADA, {"email": 1}], catch=True)
    assert counts["records_encrypted"] == 2
    assert counts["records_failed"] == 1
    assert counts["cells_encrypted"] == 7  # of the element that failed, one was encrypted
    plaintext = 2 * (len("u.ada@example.org") + 2 * len("u.x")) + len("l.") + 8
    assert counts["bytes_plaintext"] == plaintext
    assert counts["bytes_ciphertext"] == plaintext + 7 * 45
    _, _, counts = run(decrypt(["email", "tags[*]"]), sealed, catch=True)
    assert {name: counts[name] for name in ("records_decrypted", "cells_decrypted")} == {
        "records_decrypted": 2,
        "cells_decrypted": 6,
    }
    assert "records_failed" not in counts


@pytest.mark.parametrize(("bounded", "calls"), [(True, 3), (False, 1)])
def test_bundles_of_unbounded_input_share_a_data_key(encrypt, fake_kms, bounded, calls):
    dofn = started(encrypt(["a"], key=f"aws-kms://{fake_kms.create_key('etl')}"), bounded=bounded)
    for number in range(3):
        dofn.process({"a": number})
        dofn.finish_bundle()
        dofn.start_bundle()
    assert fake_kms.calls == {"GenerateDataKey": calls}


# ------------------------------------------------------------------------------------------------------ determinism


def test_equal_values_are_equal_ciphertexts_only_in_deterministic_fields(encrypt):
    one, two = run(encrypt(["a", "b"], deterministic=["a"]), [{"a": "v", "b": "v"}, {"a": "v", "b": "v"}])
    assert one["a"] == two["a"] != one["b"] != two["b"]
    (later,) = run(encrypt(["a", "b"], deterministic=["a"]), [{"a": "v", "b": "v"}])
    assert later["a"] == one["a"]


def test_a_field_is_a_scope_of_its_own_unless_fields_share_one(encrypt):
    (own,) = run(encrypt(["a", "b"], deterministic=["a", "b"]), [{"a": "v", "b": "v"}])
    (shared,) = run(encrypt(["a", "b"], deterministic={"a": "s", "b": "s"}), [{"a": "v", "b": "v"}])
    assert own["a"] != own["b"]
    assert shared["a"] == shared["b"] != own["a"]


def test_two_datasets_join_on_an_encrypted_field_with_a_shared_scope_without_opening_it(encrypt, decrypt):
    scope = {"customer": "customer-id"}
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        orders = pipeline | "Orders" >> beam.Create([{"buyer": {"id": "c1"}, "n": 1}, {"buyer": {"id": "c2"}, "n": 2}])
        people = pipeline | "People" >> beam.Create([{"customer": "c2", "name": "Ada"}])
        orders = orders | "EncryptOrders" >> encrypt(["buyer.id"], deterministic={"buyer.id": "customer-id"})
        people = people | "EncryptPeople" >> encrypt(["customer", "name"], deterministic=scope)
        keyed = {
            "orders": orders | "ByBuyer" >> beam.Map(lambda order: (order["buyer"]["id"], order["n"])),
            "people": people | "ByCustomer" >> beam.WithKeys(lambda person: person["customer"]),
        }
        joined = (
            keyed
            | beam.CoGroupByKey()
            | beam.FlatMap(lambda pair: itertools.product(pair[1]["people"], pair[1]["orders"]))
        )
        opened = (
            joined
            | beam.Map(lambda pair: {**pair[0], "n": pair[1]})
            | decrypt(["customer", "name"], deterministic=scope)
        )
        assert_that(opened, equal_to([{"customer": "c2", "name": "Ada", "n": 2}]))


def test_fields_with_a_scope_open_only_with_it(encrypt, decrypt):
    sealed = run(encrypt(["a"], deterministic={"a": "s"}), [{"a": "v"}])
    assert fails(decrypt(["a"]), sealed)[0] == "TamperedError"
    assert run(decrypt(["a"], deterministic={"a": "s"}), sealed) == [{"a": "v"}]
    randomised = run(encrypt(["a"]), [{"a": "v"}])
    assert run(decrypt(["a"], deterministic={"a": "s"}), randomised) == [{"a": "v"}]


# ---------------------------------------------------------------------------------------------- moved and changed


@pytest.mark.parametrize("deterministic", [(), ["a", "b", "l[*].a"]])
def test_cells_that_changed_places_are_seen(encrypt, decrypt, deterministic):
    paths = ["a", "b", "l[*].a"]
    (sealed,) = run(encrypt(paths, deterministic=deterministic), [{"a": 1, "b": 2, "l": [{"a": 3}]}])
    for moved in (
        {**sealed, "a": sealed["b"]},
        {**sealed, "b": sealed["a"]},
        {**sealed, "a": sealed["l"][0]["a"]},
        {**sealed, "l": [{"a": sealed["a"]}]},
    ):
        name, message = fails(decrypt(paths), [moved])
        assert name == "TamperedError"
        assert message.startswith("the field ")
        assert "comes from another place: another field or column" in message


@pytest.mark.parametrize("position", [17, 30, -1])
def test_a_changed_cell_is_seen(encrypt, decrypt, position):
    (sealed,) = run(encrypt(["a"]), [{"a": "some text"}])
    changed = bytearray(sealed["a"])
    changed[position] ^= 1
    name, message = fails(decrypt(["a"]), [{"a": bytes(changed)}])
    assert (name, message.partition(":")[0]) == ("TamperedError", "the field a")


def test_cells_of_another_dataset_are_seen(encrypt, decrypt, tmp_path):
    sealed = run(encrypt(["a"], context={"dataset": "orders"}), [{"a": 1}])
    assert fails(decrypt(["a"]), sealed)[0] == "ContextMismatchError"
    assert run(decrypt(["a"], context=ANY_CONTEXT), sealed) == [{"a": 1}]
    sealed = run(encrypt(["a"], keys=tmp_path / "other"), [{"a": 1}])
    name, message = fails(decrypt(["a"]), sealed)
    assert name == "KeyFileMissingError"
    assert message.startswith("the field a: there is no key file ")


def test_cells_under_another_kms_key_are_refused(encrypt, decrypt, tmp_path):
    other = LocalKms(tmp_path / "other" / "keyring.json")
    generate_local_key(other)
    sealed = run(encrypt(["a"]), [{"a": 1}])
    assert fails(decrypt(["a"], key=other), sealed)[0] == "WrongKeyError"


def test_plaintext_is_not_taken_for_a_cell_nor_shown(encrypt, decrypt):
    for value in ("secret", b"secret", "+secret", 4111, ["secret"], "c2VjcmV0"):
        name, message = fails(decrypt(["address.street"]), [{"address": {"street": value}}])
        assert name == "NotEncryptedError"
        assert message.startswith("the field address.street: ")
        assert "secret" not in message
        assert "4111" not in message


def test_base64_has_one_form(encrypt, decrypt):
    (sealed,) = run(encrypt(["a"], encoding="base64"), [{"a": 1}])
    for changed in (sealed["a"] + "\n", sealed["a"][:8] + " " + sealed["a"][8:], sealed["a"].replace("+", "-")):
        assert fails(decrypt(["a"]), [{"a": changed}])[0] == "NotEncryptedError"


@pytest.mark.parametrize("encoding", ["binary", "base64"])
@pytest.mark.parametrize("deterministic", [(), ["a"]])
def test_what_is_encrypted_already_is_refused(encrypt, encoding, deterministic):
    transform = encrypt(["a"], encoding=encoding, deterministic=deterministic)
    name, message = fails(transform, run(transform, [{"a": "secret"}]))
    assert name == "AlreadyEncryptedError"
    assert message.startswith("the field a: this record is an envelope already")


# ---------------------------------------------------------------------------------------------------- missing fields


def test_a_missing_field_is_an_error_or_can_be_skipped(encrypt, decrypt):
    name, message = fails(encrypt(["emial"]), [{"email": "secret"}])
    assert name == "FormatError"
    expected = "the field emial: it is not there. Correct the path, or set missing='skip' if not every element has it"
    assert message == expected
    assert fails(decrypt(["emial"]), [{"email": "x"}]) == ("FormatError", expected)
    elements = [{"b": 1}, {"a": 1, "b": 2}]
    sealed = run(encrypt(["a"], missing="skip"), elements)
    assert sealed[0] == {"b": 1}
    assert type(sealed[1]["a"]) is bytes
    assert run(decrypt(["a"], missing="skip"), sealed) == elements


# ------------------------------------------------------------------------------------------------------ dead letters


def test_elements_that_cannot_be_encrypted_go_to_the_handler_without_data(encrypt):
    bad = [{"id": 7, "email": {"secret"}}, {"id": 8, "email": bytearray(b"secret")}, {"id": 9}, "secret"]
    transform = encrypt(["email"], record_id=lambda element: element["id"] if type(element) is dict else "?")
    done, failed, counts = run(transform, [ADA, *bad], catch=True)
    assert len(done) == 1
    assert counts["records_failed"] == 4
    assert all(type(failure) is FailedRecord and failure.ciphertext is None for failure in failed)
    assert [(failure.record_id, failure.error, failure.field) for failure in failed] == [
        ("7", "FormatError", "email"),
        ("8", "FormatError", "email"),
        ("9", "FormatError", "email"),
        ("?", "FormatError", ""),
    ]
    assert "secret" not in str(failed)
    assert re.match(r"the field email: a value of the class builtins\.set cannot be encrypted", failed[0].message)


def test_elements_that_cannot_be_decrypted_go_to_the_handler_with_the_cell(encrypt, decrypt):
    one, two = run(encrypt(["a", "l[*]"]), [{"a": 1, "l": ["x"]}, {"a": 2, "l": ["y", "z"]}])
    wrong = {**one, "l": [one["l"][0], two["a"]]}
    plain = [{**two, "a": value} for value in ("secret", b"secret")]
    text = {**two, "a": base64.b64encode(two["l"][0]).decode()}
    done, failed, _ = run(decrypt(["a", "l[*]"]), [one, wrong, *plain, text, two], catch=True)
    assert done == [{"a": 1, "l": ["x"]}, {"a": 2, "l": ["y", "z"]}]
    assert [failure[1:2] + failure[3:] for failure in failed] == [
        ("TamperedError", "l[*]", two["a"]),
        ("NotEncryptedError", "a", None),
        ("NotEncryptedError", "a", None),  # what was there may be plaintext
        ("TamperedError", "a", two["l"][0]),
    ]
    assert len({failure.record_id for failure in failed}) == 4
    assert "secret" not in str(failed)


def test_errors_of_the_kms_fail_the_bundle_with_a_handler_too(encrypt, decrypt, fake_kms):
    key_id = fake_kms.create_key("etl")
    key = f"aws-kms://{key_id}"
    sealed = run(encrypt(["a"], key=key), [{"a": 1}])
    fake_kms.disable_key(key_id)
    from beam_envelope.keys.cache import clear_caches

    clear_caches()
    for transform, elements in ((encrypt(["a"], key=key), [{"a": 1}]), (decrypt(["a"], key=key), sealed)):
        with pytest.raises(Exception, match=r"KeyAccessError|[Dd]isabled"):
            run(transform, elements, catch=True)


def test_a_handler_gets_what_concerns_other_keys_as_dead_letters(encrypt, decrypt, tmp_path):
    sealed = run(encrypt(["a"], keys=tmp_path / "other"), [{"a": 1}])
    _, (failure,), _ = run(decrypt(["a"]), sealed, catch=True)
    assert (failure.error, failure.field, failure.ciphertext) == ("KeyFileMissingError", "a", sealed[0]["a"])


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"fields": "email"}, TypeError, "fields is a list of paths: give ['email']"),
        ({"fields": ["a", "a.b"]}, ValueError, "the fields a and a.b are both given"),
        ({"encoding": "hex"}, ValueError, "encoding is 'binary' or 'base64', not 'hex'"),
        ({"missing": "ignore"}, ValueError, "missing is 'error' or 'skip', not 'ignore'"),
        ({"deterministic": "a"}, TypeError, "deterministic is a list of fields, or a mapping of fields to"),
        ({"deterministic": ["b"]}, ValueError, "deterministic names b, which is not among the fields: a"),
        ({"deterministic": {"a": ""}}, ValueError, "the scope of a is a name, such as 'customer-id', not ''"),
        ({"deterministic": {"a": 5}}, ValueError, "the scope of a is a name"),
        ({"key": []}, ValueError, "no key was given"),
        ({"keys": ""}, ValueError, "keys= is one folder"),
    ],
)  # fmt: skip
def test_arguments_are_checked_before_anything_runs(encrypt, settings, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        encrypt(**{"fields": ["a"], **settings})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"fields": "email"}, TypeError, "fields is a list of paths"),
        ({"fields": {}}, ValueError, "fields names no field"),
        ({"fields": {"a": "text"}}, ValueError, "the type of a is a Python type, or one of boolean, bytes, integer"),
        ({"missing": None}, ValueError, "missing is"),
        ({"element_type": dict}, TypeError, "element_type is a NamedTuple class or a dataclass with a schema"),
        ({"element_type": "People"}, TypeError, "element_type is a NamedTuple class"),
    ],
)
def test_arguments_of_decryption_are_checked_too(decrypt, settings, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        decrypt(**{"fields": ["a"], **settings})


def test_display_data_shows_the_settings_and_no_values_of_the_context(encrypt, decrypt, local_key, tmp_path):
    shown = {item.key: item.value for item in DisplayData.create_from(encrypt(["a.b"], deterministic=["a.b"])).items}
    assert shown == {
        "fields": "a.b",
        "deterministic": "a.b",
        "key": str(local_key),
        "keys": str(tmp_path / "keys"),
        "context": "dataset, tenant",
        "encoding": "binary",
        "missing": "error",
    }
    shown = {item.key: item.value for item in DisplayData.create_from(decrypt(["a"], context=ANY_CONTEXT)).items}
    assert shown["context"] == "any"


def test_elements_without_fields_are_refused_when_the_pipeline_is_built(encrypt):
    pipeline = beam.Pipeline(runner="FnApiRunner")
    with pytest.raises(ValueError, match=r"^the elements are of the type str, which has no fields; use EncryptRecords"):
        _ = pipeline | beam.Create(["a"]) | encrypt(["a"])


def test_a_policy_limits_what_one_data_key_encrypts(encrypt, tmp_path):
    run(encrypt(["a"], policy=DataKeyPolicy(max_records=2)), [{"a": number} for number in range(6)])
    assert len(list((tmp_path / "keys").iterdir())) == 3


def test_the_dataset_key_has_the_name_that_was_asked_for(encrypt, tmp_path):
    run(encrypt(["a"], deterministic=["a"], dataset_key="people"), [{"a": 1}])
    assert (tmp_path / "keys" / key_file_name("people")).exists()


def test_errors_are_raised_as_they_are_and_carry_nothing_along(encrypt, decrypt):
    for transform, element, error in (
        (encrypt(["a"]), {"a": "secret\ud800"}, FormatError),
        (encrypt(["a"]), {"b": "secret"}, FormatError),
        (decrypt(["a"]), {"a": "secret"}, NotEncryptedError),
        (decrypt(["a"]), {"a": "\udcffsecret"}, NotEncryptedError),
    ):
        with pytest.raises(error) as caught:
            started(transform).process(element)
        chain = [caught.value, caught.value.__context__, caught.value.__cause__]
        assert chain[1:] == [None, None]
        assert "secret" not in str(chain)


def test_errors_of_moved_and_doubled_cells_carry_nothing_along(encrypt, decrypt):
    sealing = started(encrypt(["a", "b"]))
    (sealed,) = sealing.process({"a": "secret", "b": 1})
    with pytest.raises(AlreadyEncryptedError) as caught:
        sealing.process(sealed)
    assert caught.value.__context__ is None
    with pytest.raises(TamperedError) as caught:
        started(decrypt(["a", "b"])).process({**sealed, "b": sealed["a"]})
    assert caught.value.__context__ is None


def test_the_example_of_the_guide_runs_as_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parents[2] / "docs" / "fields.md").read_text()
    example = re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1]
    exec(example.replace("beam.Pipeline()", 'beam.Pipeline(runner="FnApiRunner")'), {})  # noqa: S102  # our own page
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    assert sum(re.search(r"'email': b.\\xf8", line) is not None for line in printed) == 2
    assert sum("ada@example.org" in line and "'4111'" in line for line in printed) == 1
