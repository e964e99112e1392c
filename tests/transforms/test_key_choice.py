"""Templates of keys in the transforms over elements: each tenant's records, fields and cells are under its own key."""

import json
import re
import typing
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.transforms.error_handling import CollectingErrorHandler

from beam_envelope import (
    ANY_CONTEXT,
    AllowedKeys,
    DataKeyPolicy,
    DecryptColumns,
    DecryptFields,
    DecryptRecords,
    EncryptColumns,
    EncryptFields,
    EncryptRecords,
)
from beam_envelope.keys import cache, choice
from beam_envelope.keys.cache import clear_caches
from tests.transforms.test_records import error_of, keep, outcome, pipeline, run

TENANTS = ("acme", "bolt", "coil")
KEY = "aws-kms://alias/data-{tenant}"
CONTEXT = {"dataset": "orders", "tenant": "{tenant}"}
MESSAGES = {"format": "aws-encryption-sdk", "keys": None}
CANARY = "CANARY-7f3a"


class Order(typing.NamedTuple):
    """A row with a tenant."""

    tenant: str
    card: str


def of_pair(pair):
    return {"tenant": pair[0]}


def of_line(line):
    return {"tenant": line.split(":")[0]}


def identity(element):
    return element["id"]


def under(fake_kms):
    """Return by tenant the ARN of its key, and nothing else."""
    return {tenant: fake_kms._find(f"alias/data-{tenant}").arn for tenant in TENANTS}


@pytest.fixture
def tenants(fake_kms):
    for tenant in TENANTS:
        fake_kms.create_key(f"data-{tenant}")
    return fake_kms


@pytest.fixture
def settings(tenants, tmp_path):
    return {"key": KEY, "keys": str(tmp_path / "keys"), "context": CONTEXT}


def key_files(settings):
    """Return for each key file of the key store its tenant in the context and its KMS keys."""
    found = [json.loads(path.read_text()) for path in Path(settings["keys"]).glob("_KEY_FOR_*")]
    forms = [(each["context"]["tenant"], each["data_keys"][0]["wrapped_keys"]) for each in found]
    return sorted((tenant, *(form["kms_key"] for form in wrapped)) for tenant, wrapped in forms)


# ---------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("more", [{}, {"deterministic": True}, MESSAGES], ids=["compact", "deterministic", "messages"])
def test_each_record_is_under_the_key_of_its_tenant(settings, tenants, more):
    records = [(tenant, f"{tenant} {number}".encode()) for number in range(5) for tenant in TENANTS]
    settings = {**settings, **more, "keyed": True, "key_fields": of_pair}
    sealed, counts = run([EncryptRecords(**settings)], records)
    settings.pop("deterministic", None)
    assert tenants.calls["GenerateDataKey"] == counts["kms_GenerateDataKey"] == 3  # one for each key in this bundle
    if settings["keys"] is not None:
        files = key_files(settings)
        assert {each[:2] for each in files} == set(under(tenants).items())
        assert len(files) == (6 if more else 3)  # a dataset key lies there twice
    clear_caches()
    assert sorted(outcome([DecryptRecords(**settings)], sealed)) == sorted(records)
    assert tenants.calls["Decrypt"] == 3 + (3 if "deterministic" in more else 0)


@pytest.mark.parametrize("more", [{}, MESSAGES], ids=["compact", "messages"])
def test_a_record_given_to_another_tenant_is_refused_before_any_call(settings, tenants, more):
    settings = {**settings, **more, "keyed": True, "key_fields": of_pair}
    ((_, envelope),) = outcome([EncryptRecords(**settings)], [("acme", CANARY.encode())])
    clear_caches()
    said = error_of([DecryptRecords(**settings)], [("bolt", envelope)])
    assert "'tenant' is 'acme' there and 'bolt' here" in said
    said = error_of([DecryptRecords(**{**settings, "context": ANY_CONTEXT})], [("bolt", envelope)])
    assert re.search("IncorrectKey|WrongKeyError", said)
    assert "Decrypt" not in tenants.calls or tenants.calls["Decrypt"] == 1


def test_rows_choose_by_their_fields_and_several_keys_may_be_templates(settings, tenants):
    tenants.create_key("dr")
    both = {**settings, "key": [KEY, "aws-kms://alias/dr"]}
    orders = [{"tenant": tenant, "card": CANARY} for tenant in ("acme", "bolt")]
    encoded = EncryptRecords(**both, coder=dict[str, str])
    sealed = outcome([encoded], orders)
    assert [each[1:] for each in key_files(settings)] == [
        (under(tenants)[tenant], tenants._find("alias/dr").arn) for tenant in ("acme", "bolt")
    ]
    reader = DecryptRecords(**{**settings, "key": "aws-kms://alias/dr", "context": ANY_CONTEXT}, coder=dict[str, str])
    clear_caches()
    assert sorted(outcome([reader], sealed), key=str) == orders


def test_an_allow_list_opens_the_records_of_all_tenants(settings, tenants):
    sealed = outcome([EncryptRecords(**settings, key_fields=of_line)], [f"{tenant}:1" for tenant in TENANTS])
    clear_caches()
    allowed = AllowedKeys([tenants.account], aliases=["data-*"])
    reader = DecryptRecords(**{**settings, "key": allowed, "context": ANY_CONTEXT})
    assert sorted(outcome([reader], sealed)) == [f"{tenant}:1".encode() for tenant in TENANTS]
    assert tenants.calls["Decrypt"] == 3
    said = error_of([DecryptRecords(**{**settings, "key": AllowedKeys(["0" * 12]), "context": ANY_CONTEXT})], sealed)
    assert "the keys allowed here are aws-kms://*?account=000000000000" in said


def test_a_worker_keeps_one_data_key_for_each_tenant_over_its_bundles(settings, tenants):
    settings = {**settings, "policy": DataKeyPolicy("worker"), "key_fields": of_line}
    for _ in range(2):
        outcome([EncryptRecords(**settings)], ["acme:1", "bolt:1"])
    assert tenants.calls == {"GenerateDataKey": 2}
    outcome([EncryptRecords(**{**settings, "policy": None})], ["acme:1", "bolt:1"])
    assert tenants.calls == {"GenerateDataKey": 4}


def test_a_bundle_holds_so_many_keys_and_drops_the_one_used_longest_ago(settings, tenants, monkeypatch):
    monkeypatch.setattr(choice, "MAX_OPEN", 2)
    lines = [f"{tenant}:{number}" for number, tenant in enumerate(["acme", "bolt", "acme", "coil", "acme", "bolt"])]
    outcome([EncryptRecords(**settings, key_fields=of_line)], lines)
    assert tenants.calls["GenerateDataKey"] == 4  # bolt was pushed out


def test_a_process_holds_so_many_keys(settings, tenants, monkeypatch):
    monkeypatch.setattr(cache, "MAX_ENTRIES", 2)
    settings = {**settings, "policy": DataKeyPolicy("worker"), "key_fields": of_line}
    lines = [f"{tenant}:1" for tenant in TENANTS]
    outcome([EncryptRecords(**settings)], lines)
    assert len(cache._caches.shared) == 2


def test_an_envelope_does_not_say_its_tenant(settings):
    with pytest.raises(ValueError, match=r"an envelope does not say 'tenant'.*give key_fields=.*AllowedKeys"):
        DecryptRecords(**settings)


# ------------------------------------------------------------------------------------------------- fields that are bad


@pytest.mark.parametrize("value", [None, "../bolt", f"{CANARY} x", "a.b"])
@pytest.mark.parametrize("kind", ["records", "fields"])
def test_a_bad_tenant_goes_to_the_error_handler_with_its_id_and_without_its_value(settings, tenants, kind, value):
    elements = [{"tenant": value, "card": CANARY, "id": "order-7"}, {"tenant": "acme", "card": "1", "id": "order-8"}]
    if kind == "records":
        transform = EncryptRecords(**settings, coder=Elements(), record_id=identity)
    else:
        transform = EncryptFields(["card"], **settings, record_id=identity)
    done, failed = with_handler(transform, elements)
    assert len(done) == 1
    (failure,) = failed
    assert (failure.record_id, failure.error, failure.ciphertext) == ("order-7", "FormatError", None)
    assert "'tenant'" in failure.message
    assert CANARY not in failure.message
    if isinstance(value, str) and len(value) > 3:
        assert value not in failure.message
    assert tenants.calls == {"GenerateDataKey": 1}
    # Without one, the job fails.
    said = error_of([transform.with_error_handler(None)], elements[:1])
    assert "'tenant'" in said
    assert CANARY not in said.partition("Traceback")[2].rpartition("FormatError")[2]


class Elements(beam.coders.Coder):
    """Encodes what the tests give, without pickling."""

    def encode(self, value):
        return json.dumps(value).encode()

    def decode(self, encoded):
        return json.loads(encoded)

    def is_deterministic(self):
        return True


_failed = []


def keep_failed(element):
    """Keep a dead letter; a function of a module is pickled by its name, so the list is this process's own."""
    _failed.append(element)


def with_handler(transform, elements):
    """Run a transform with an error handler; return what came out, and the dead letters."""
    from tests.transforms import test_records

    test_records._kept.clear()
    _failed.clear()
    with pipeline() as p:
        with CollectingErrorHandler() as handler:
            done = p | beam.Create(elements) | transform.with_error_handler(handler)
        _ = done | beam.Map(keep)
        _ = handler.output() | "Failed" >> beam.Map(keep_failed)
    return list(test_records._kept), list(_failed)


def test_a_tenant_without_a_key_fails_the_bundle_and_names_the_key(settings, tenants):
    said = error_of([EncryptRecords(**settings, key_fields=of_line)], ["nobody:1"])
    assert "there is no KMS key alias/data-nobody" in said


# ---------------------------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize("deterministic", [(), ["card"]])
@pytest.mark.parametrize("kind", [dict, Order, beam.Row])
def test_each_element_is_under_the_key_of_its_tenant(settings, tenants, kind, deterministic):
    orders = [{"tenant": tenant, "card": CANARY} for tenant in (*TENANTS, *TENANTS)]
    elements = [each if kind is dict else kind(**each) for each in orders]
    sealed = outcome([EncryptFields(["card"], **settings, deterministic=deterministic)], elements)
    assert tenants.calls["GenerateDataKey"] == 3
    assert {each[:2] for each in key_files(settings)} == set(under(tenants).items())
    cells = {each["card"] if kind is dict else each.card for each in sealed}
    assert not any(CANARY.encode() in cell for cell in cells)
    assert len(cells) == (3 if deterministic else 6)  # equal within a tenant only
    clear_caches()
    opened = outcome([DecryptFields(["card"], **settings)], sealed)
    assert sorted(dict(each if kind is dict else each.as_dict())["tenant"] for each in opened) == sorted(2 * TENANTS)
    assert {each["card"] if kind is dict else each.card for each in opened} == {CANARY}
    assert tenants.calls["Decrypt"] == (6 if deterministic else 3)


def test_a_cell_moved_to_another_tenant_is_refused(settings, tenants):
    (sealed,) = outcome([EncryptFields(["card"], **settings)], [{"tenant": "acme", "card": CANARY}])
    said = error_of([DecryptFields(["card"], **settings)], [{**sealed, "tenant": "bolt"}])
    assert "the field card: " in said
    assert "'tenant' is 'acme' there and 'bolt' here" in said


def test_what_fills_the_template_cannot_be_encrypted(settings):
    for transform in (EncryptFields, DecryptFields):
        with pytest.raises(ValueError, match="the field 'tenant' fills the template of the key or context"):
            transform(["card", "tenant"], **settings)
    assert EncryptFields(["card", "tenant"], **settings, key_fields=of_pair)
    for transform in (EncryptColumns, DecryptColumns):
        with pytest.raises(ValueError, match="the column 'tenant' fills the template of the key or context"):
            transform(["tenant"], **settings)


def test_what_fills_nothing_is_refused(settings):
    with pytest.raises(ValueError, match="key_fields= fills templates"):
        EncryptFields(["card"], **{**settings, "key": "aws-kms://alias/x", "context": None}, key_fields=of_pair)


def test_an_allow_list_does_not_write(settings):
    for make in (
        EncryptRecords,
        lambda **more: EncryptFields(["a"], **more),
        lambda **more: EncryptColumns(["a"], **more),
    ):
        with pytest.raises(ValueError, match="is no key to write with"):
            make(**{**settings, "key": AllowedKeys(["111122223333"])})


# ---------------------------------------------------------------------------------------------------------- columns


def table():
    tenants = ["bolt", "acme", "coil", "acme", "bolt", "acme"]
    cards = [f"{CANARY} {number}" for number in range(5)]
    return pa.table({"tenant": tenants, "card": [*cards, None], "n": pa.array(range(6), pa.int32())})


@pytest.mark.parametrize("more", [{}, {"layout": "raw"}, {"deterministic": ["card"]}], ids=str)
@pytest.mark.parametrize("batch", [False, True])
def test_each_row_is_under_the_key_of_its_tenant_and_keeps_its_place(settings, tenants, more, batch):
    element = table().to_batches()[0] if batch else table()
    (sealed,) = outcome([EncryptColumns(["card"], **settings, **more)], [element])
    assert isinstance(sealed, pa.RecordBatch if batch else pa.Table)
    assert tenants.calls["GenerateDataKey"] == 3
    assert {each[:2] for each in key_files(settings)} == set(under(tenants).items())
    assert sealed.column("n").to_pylist() == list(range(6))
    assert sealed.column("tenant").to_pylist() == table().column("tenant").to_pylist()
    assert sealed.column("card").null_count == 1
    clear_caches()
    (opened,) = outcome([DecryptColumns(["card"], **settings)], [sealed])
    assert opened == element
    assert opened.schema == element.schema
    # Without the metadata of the columns, which other software drops.
    if "deterministic" not in more:
        bare = pa.table(
            [sealed.column(name) for name in sealed.schema.names],
            pa.schema([field.remove_metadata() for field in sealed.schema]),
        )
        types = {"card": pa.string()}
        (opened,) = outcome([DecryptColumns(types, **settings)], [bare])
        assert opened == table()


def test_a_table_of_one_tenant_or_of_no_rows_goes_as_it_is(settings, tenants):
    one = table().filter(pa.array([False, True, False, True, False, True]))
    sealed = outcome([EncryptColumns(["card"], **settings)], [one, table().slice(0, 0)])
    opened = outcome([DecryptColumns(["card"], **settings)], sealed)
    assert sorted(opened, key=len) == [table().slice(0, 0), one]
    assert tenants.calls["GenerateDataKey"] == 1


def test_rows_with_a_schema_choose_too(settings, tenants):
    orders = [Order(tenant, CANARY) for tenant in TENANTS]
    sealed = outcome([EncryptColumns(["card"], **settings)], orders)
    assert tenants.calls["GenerateDataKey"] == 3
    assert all(CANARY.encode() not in each.card for each in sealed)


def test_two_columns_and_numbers_fill_templates(tenants, tmp_path):
    for name in ("acme/1", "acme/2", "bolt/1"):
        tenants.create_key(name)
    settings = {
        "key": "aws-kms://alias/{tenant}/{year}",
        "keys": str(tmp_path / "keys"),
        "context": {"tenant": "{tenant}"},
    }
    rows = pa.table(
        {
            "year": [1, 2, 1, 1],
            "tenant": pa.array(["acme", "acme", "bolt", "acme"]).dictionary_encode(),
            "x": list("abcd"),
        }
    )
    (sealed,) = outcome([EncryptColumns(["x"], **settings)], [rows])
    assert tenants.calls["GenerateDataKey"] == 3
    assert {each[1] for each in key_files(settings)} == {
        tenants._find(f"alias/{name}").arn for name in ("acme/1", "acme/2", "bolt/1")
    }
    (opened,) = outcome([DecryptColumns(["x"], **settings)], [sealed])
    assert opened == rows


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (["acme", None], "does not do in row 1 of a batch: it is null"),
        (["acme", f"{CANARY} x"], "does not do in row 1 of a batch: it has other characters"),
        ([1.5, 2.5], "does not do in row 0 of a batch: it is a float"),
    ],
)
def test_a_row_whose_tenant_does_not_do_is_named_and_not_shown(settings, column, said):
    rows = pa.table({"tenant": column, "card": ["1", "2"]})
    text = error_of([EncryptColumns(["card"], **settings)], [rows])
    assert "the column 'tenant', which the template of the key or context needs, " + said in text
    assert CANARY not in text
    text = error_of([EncryptColumns(["card"], **settings)], [rows.drop_columns(["tenant"])])
    assert "needs one column 'tenant'; the table has none. Its columns are: card" in text


def test_rows_that_cannot_be_opened_are_left_out_and_the_others_keep_their_order(settings, tenants):
    (sealed,) = outcome([EncryptColumns(["card"], **settings)], [table()])
    moved = sealed.set_column(
        0, "tenant", pa.array(["bolt", "bolt", "coil", "acme", "bolt", "acme"])
    )  # row 1 is acme's
    done, failed = with_handler(DecryptColumns(["card"], **settings), [moved])
    (opened,) = done
    assert opened.column("n").to_pylist() == [0, 2, 3, 4, 5]
    assert opened.column("card").to_pylist() == [f"{CANARY} {number}" for number in (0, 2, 3, 4)] + [None]
    assert [(each.error, each.field) for each in failed] == [("ContextMismatchError", "card")]
    assert "'tenant' is 'acme' there and 'bolt' here" in failed[0].message
