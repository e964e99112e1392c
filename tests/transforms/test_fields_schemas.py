"""EncryptFields and DecryptFields over schema'd elements: a schema goes in, a schema comes out, and its coder works."""
# ruff: noqa: UP045  # of `str | None`, Beam's schemas make Any

import dataclasses
import re
import typing
from collections.abc import Sequence
from typing import NamedTuple

import apache_beam as beam
import pytest
from apache_beam import coders
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.typehints import typehints
from apache_beam.typehints.row_type import RowTypeConstraint
from apache_beam.typehints.schemas import schema_from_element_type
from apache_beam.utils.timestamp import Timestamp

from beam_envelope import DecryptFields, EncryptFields, jobs


class Address(NamedTuple):
    street: str
    city: str


class Item(NamedTuple):
    card: typing.Optional[str]  # as Beam's own pages have it
    n: int


class Person(NamedTuple):
    id: int
    email: typing.Optional[str]
    home: Address
    items: Sequence[Item]
    tags: Sequence[str]
    other: typing.Optional[Address]
    at: Timestamp


@dataclasses.dataclass
class Box:
    label: str
    weight: float


coders.registry.register_coder(Person, coders.RowCoder)

ADA = Person(
    1,
    "ada@example.org",
    Address("1 Main St", "London"),
    [Item("4111", 1), Item(None, 2)],
    ["x", "y"],
    None,
    Timestamp(micros=5),
)
BOB = ADA._replace(id=2, email=None, other=Address("2 Main St", "Paris"), tags=[], items=[])
PATHS = ["email", "home.street", "items[*].card", "tags[*]", "other.city", "at"]
TYPES = {
    "email": str | None,
    "home.street": str,
    "items[*].card": typing.Optional[str],
    "tags[*]": str,
    "other.city": str,
    "at": Timestamp,
}


@pytest.fixture
def settings(tmp_path, local_key):
    """A key and a key store."""
    return {"key": local_key, "keys": str(tmp_path / "keys")}


def fields_of(kind):
    return dict(RowTypeConstraint.from_user_type(kind)._fields if isinstance(kind, type) else kind._fields)


def plain(value):
    """Return a row or named tuple, and what is in it, as dicts and lists."""
    if hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in value._asdict().items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def types_after(transform, kind):
    """Return the type of the elements that come out of a transform."""
    pipeline = beam.Pipeline(runner="FnApiRunner")
    return (pipeline | beam.Create([]).with_output_types(kind) | transform).element_type


def schema_text(kind):
    """Return the schema that other SDKs see, without its random ids."""
    return re.sub(r'\s*id: ".*"', "", str(schema_from_element_type(kind)))


# ------------------------------------------------------------------------------------------------------- the schema


def test_encrypted_fields_become_nullable_bytes_and_all_others_stay(settings):
    fields = fields_of(types_after(EncryptFields(PATHS, **settings), Person))
    assert list(fields) == list(Person._fields)
    assert fields["id"] is int
    assert fields["email"] == fields["at"] == typing.Optional[bytes]
    assert fields_of(fields["home"]) == {"street": typing.Optional[bytes], "city": str}
    assert fields["tags"] == Sequence[bytes | None]
    (item,) = typing.get_args(fields["items"])
    assert fields_of(item) == {"card": typing.Optional[bytes], "n": int}
    other, nothing = typing.get_args(fields["other"])
    assert fields_of(other) == {"street": str, "city": typing.Optional[bytes]}
    assert nothing is type(None)


def test_base64_makes_them_nullable_texts(settings):
    fields = fields_of(types_after(EncryptFields(["email"], encoding="base64", **settings), Person))
    assert fields["email"] == typing.Optional[str]


def test_other_sdks_see_bytes(settings):
    kind = types_after(EncryptFields(["id", "tags"], **settings), Person)
    schema = schema_from_element_type(kind)
    found = {field.name: field.type for field in schema.fields}
    for name in ("id", "tags"):
        assert found[name].nullable
        assert found[name].WhichOneof("type_info") == "atomic_type"
        assert found[name].atomic_type == 9  # BYTES of beam:schema.proto


@pytest.mark.parametrize("email", [typing.Optional[str], str | None])  # Beam would make Any of the second
def test_types_given_for_decryption_make_the_schema_exact_again(settings, email):
    sealed = types_after(EncryptFields(PATHS, **settings), Person)
    opened = types_after(DecryptFields({**TYPES, "email": email}, **settings), sealed)
    assert schema_text(opened) == schema_text(Person)
    assert schema_text(sealed) != schema_text(Person)


def test_without_types_any_comes_out(settings):
    sealed = types_after(EncryptFields(["email", "home.street"], **settings), Person)
    fields = fields_of(types_after(DecryptFields(["email", "home.street"], **settings), sealed))
    assert fields["email"] == typing.Any
    assert fields_of(fields["home"])["street"] == typing.Any
    assert fields["id"] is int


def test_names_of_types_do_for_yaml(settings):
    names = {"id": "integer", "email": "string", "at": "bytes", "tags": "boolean", "other": "number"}
    fields = fields_of(types_after(DecryptFields(names, **settings), Person))
    expected = {"id": int, "email": str, "at": bytes, "tags": bool, "other": float}
    assert {name: fields[name] for name in names} == {name: typing.Optional[kind] for name, kind in expected.items()}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (typehints.Any, typing.Any),
        (dict, dict[str, typing.Any]),
        (dict[str, str], dict[str, typing.Any]),
        (typing.Dict[str, int], dict[str, typing.Any]),  # noqa: UP006  # as older programs have it
        (object, typing.Any),
    ],
)
def test_dicts_stay_dicts_and_what_is_unknown_stays_unknown(settings, kind, expected):
    found = types_after(EncryptFields(["a"], **settings), kind)
    assert found == typehints.normalize(expected)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("emial", "the elements have no field emial: there is id, email, home, items, tags, other, at"),
        ("home.zip", "the elements have no field home.zip: there is street, city"),
        ("other.zip", "the elements have no field other.zip: there is street, city"),
        ("items[*].zip", "the elements have no field items[*].zip: there is card, n"),
        ("items.card", "the field items is a list: write items[*] for what is in it"),
        ("email[*]", "the field email is no list of the type str: leave out the [*] after it"),
        ("id.x", "the field id is of the type int, whose parts have no schema: encrypt it whole"),
        ("home", "the field home is a row, which has no form as one value: name the fields in it"),
        ("other", "the field other is a row, which has no form as one value: name the fields in it"),
        ("items", "the field items is a row, which has no form as one value: name the fields in it"),
        ("items[*]", "the field items[*] is a row, which has no form as one value: name the fields in it"),
    ],
)
@pytest.mark.parametrize("missing", ["error", "skip"])
def test_fields_that_the_schema_does_not_have_are_refused_when_the_pipeline_is_built(settings, path, message, missing):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        types_after(EncryptFields([path], missing=missing, **settings), Person)


def test_so_they_are_for_decryption(settings):
    with pytest.raises(ValueError, match=r"^the elements have no field emial: there is id"):
        types_after(DecryptFields(["emial"], **settings), Person)


def test_parts_of_a_map_are_refused_since_a_map_has_one_type(settings):
    kind = RowTypeConstraint.from_fields([("map", typing.Mapping[str, str])])  # Beam's own
    with pytest.raises(ValueError, match=r"^the field map is of the type Mapping\[str, str\], whose parts have no sch"):
        types_after(EncryptFields(["map.a"], **settings), kind)
    fields = fields_of(types_after(EncryptFields(["map"], **settings), kind))
    assert fields["map"] == typing.Optional[bytes]


def test_an_element_type_must_have_the_fields_of_the_elements(settings):
    with pytest.raises(ValueError, match=r"^Address has the fields street, city, and the elements have card, n$"):
        types_after(DecryptFields(["card"], element_type=Address, **settings), Item)


# ------------------------------------------------------------------------------------------------------ the elements

RUNNERS = {
    "in memory": [],
    "worker processes": ["--direct_running_mode=multi_processing", "--direct_num_workers=2"],
}


def check_sealed(element):
    """Fail unless the fields are encrypted; runs on the workers, after a shuffle."""
    cells = [element.home.street, element.at, *element.tags, *(item.card for item in element.items)]
    cells += [] if element.other is None else [element.other.city]
    if not all(cell is None or type(cell) is bytes for cell in cells) or element.home.city != "London":
        raise TypeError
    return element


@pytest.mark.parametrize("options", RUNNERS.values(), ids=RUNNERS)
def test_elements_cross_shuffles_on_both_sides_and_come_back_as_named_tuples(settings, options):
    pipeline = jobs.make_pipeline(PipelineOptions(options), 2 if options else 1, 0)
    sealed = pipeline | beam.Create([ADA, BOB]).with_output_types(Person) | EncryptFields(PATHS, **settings)
    shuffled = sealed | "First" >> beam.Reshuffle()
    kind = shuffled.element_type
    checked = shuffled | "Check" >> beam.Map(check_sealed).with_output_types(kind)
    opened = checked | DecryptFields(PATHS, element_type=Person, **settings)
    assert opened.element_type is Person
    # Behind another shuffle, worker processes have a class of Beam's making in place of Person: that is Beam's way.
    again = opened | beam.Map(is_person).with_output_types(Person) | "Second" >> beam.Reshuffle()
    assert_that(again | beam.Map(plain), equal_to([plain(ADA), plain(BOB)]))
    pipeline.run().wait_until_finish()


def is_person(element):
    """Fail unless the element is the named tuple, inside too; runs on the workers."""
    if (type(element), type(element.home), {type(item) for item in element.items} - {Item}) != (Person, Address, set()):
        raise TypeError
    return element


@pytest.mark.parametrize("fields", [PATHS, TYPES], ids=["without types", "with types"])
def test_rows_come_back_through_a_shuffle(settings, fields):
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        sealed = pipeline | beam.Create([ADA, BOB]).with_output_types(Person) | EncryptFields(PATHS, **settings)
        opened = sealed | "First" >> beam.Reshuffle() | DecryptFields(fields, **settings) | "Second" >> beam.Reshuffle()
        assert_that(opened | beam.Map(plain), equal_to([plain(ADA), plain(BOB)]))


@pytest.mark.parametrize("encoding", ["binary", "base64"])
def test_the_coder_of_the_output_type_takes_the_elements(settings, encoding):
    transform = EncryptFields(PATHS, encoding=encoding, **settings)
    coder = coders.registry.get_coder(types_after(transform, Person))
    assert type(coder) is coders.RowCoder
    dofn = started(transform, Person)
    for person in (ADA, BOB):
        (element,) = dofn.process(person)
        assert type(element) is beam.Row
        assert plain(coder.decode(coder.encode(element))) == plain(element)


def started(transform, kind):
    """Return the DoFn of a transform in the middle of a bundle."""
    seen = []
    applied = transform.apply
    transform.apply = lambda label, dofn, *_: seen.append(dofn)
    transform.expand(beam.pvalue.PCollection(None, element_type=kind, is_bounded=True))
    transform.apply = applied
    (dofn,) = seen
    dofn.start_bundle()
    return dofn


def test_named_tuples_are_made_of_rows_also_inside_and_without_a_shuffle(settings):
    (sealed,) = started(EncryptFields(PATHS, **settings), Person).process(BOB)
    (opened,) = started(DecryptFields(PATHS, element_type=Person, **settings), typehints.Any).process(sealed)
    assert opened == BOB
    assert type(opened) is Person
    assert type(opened.home) is type(opened.other) is Address
    (sealed,) = started(EncryptFields(PATHS, **settings), Person).process(ADA)
    (opened,) = started(DecryptFields(PATHS, element_type=Person, **settings), typehints.Any).process(sealed)
    assert opened == ADA
    assert {type(item) for item in opened.items} == {Item}


def test_dicts_can_become_named_tuples_or_dataclasses(settings):
    for kind, element in ((Address, {"street": "s", "city": "c"}), (Box, {"label": "l", "weight": 1.5})):
        (first, *_) = element
        (sealed,) = started(EncryptFields([first], **settings), typehints.Any).process(element)
        (opened,) = started(DecryptFields([first], element_type=kind, **settings), typehints.Any).process(sealed)
        assert type(opened) is kind
        assert opened == kind(**element)


def test_elements_with_other_fields_than_the_element_type_are_errors(settings):
    (sealed,) = started(EncryptFields(["street"], **settings), typehints.Any).process({"street": "s", "zip": "secret"})
    with pytest.raises(Exception, match=r"the field city: the element and Address do not have the same fields"):
        started(DecryptFields(["street"], element_type=Address, **settings), typehints.Any).process(sealed)


def test_dataclasses_become_rows_with_a_schema(settings):
    assert fields_of(types_after(EncryptFields(["label"], **settings), Box)) == {
        "label": typing.Optional[bytes],
        "weight": float,
    }
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        boxes = pipeline | beam.Create([Box("l", 1.5)]) | EncryptFields(["label"], **settings) | beam.Reshuffle()
        opened = boxes | DecryptFields({"label": str}, **settings)
        assert_that(opened | beam.Map(plain), equal_to([{"label": "l", "weight": 1.5}]))


def test_with_an_error_handler_the_schema_is_the_same(settings):
    from apache_beam.transforms.error_handling import CollectingErrorHandler

    pipeline = beam.Pipeline(runner="FnApiRunner")
    people = pipeline | beam.Create([]).with_output_types(Person)
    with CollectingErrorHandler() as handler:
        sealed = people | EncryptFields(PATHS, **settings).with_error_handler(handler)
    _ = handler.output() | beam.Map(print)
    assert sealed.element_type == types_after(EncryptFields(PATHS, **settings), Person)


# -------------------------------------------------------------------------------------------------------- Beam YAML

YAML = """
pipeline:
  type: chain
  transforms:
    - type: Create
      config:
        elements:
          - {{id: 1, email: ada@x, home: {{street: 1 Main St, city: London}}}}
          - {{id: 2, email: bob@x, home: {{street: 2 Main St, city: Paris}}}}
    - type: EncryptFields
      config: {{fields: [email, home.street], deterministic: [email], encoding: base64, context: {{a: b}}, {settings}}}
    - type: MapToFields
      config:
        language: python
        append: true
        fields: {{sealed: email, length: "len(home.street)"}}
    - type: DecryptFields
      config: {{fields: {{email: string, home.street: string}}, context: {{a: b}}, {settings}}}
    - type: MapToFields
      config:
        language: python
        fields: {{loud: "email.upper()", street: home.street, begin: "sealed[0]", length: length}}
    - type: AssertEqual
      config:
        elements:
          - {{loud: ADA@X, street: 1 Main St, begin: "+", length: 76}}
          - {{loud: BOB@X, street: 2 Main St, begin: "+", length: 76}}
providers:
  - type: python
    config: {{}}
    transforms:
      EncryptFields: beam_envelope.EncryptFields
      DecryptFields: beam_envelope.DecryptFields
"""


def test_beam_yaml_knows_them_as_a_python_provider(settings):
    yaml_transform = pytest.importorskip(
        "apache_beam.yaml.yaml_transform", reason="apache-beam[yaml] is not installed", exc_type=ImportError
    )
    spec = YAML.format(settings=f"key: 'local-kms://{settings['key'].path}', keys: '{settings['keys']}'")
    with beam.Pipeline(runner="FnApiRunner", options=PipelineOptions(pickle_library="cloudpickle")) as pipeline:
        yaml_transform.expand_pipeline(pipeline, spec)
