"""Paths to fields: one form each, clear refusals, and changes that leave their argument as it is."""

import dataclasses
import re
from collections import OrderedDict, defaultdict
from typing import NamedTuple

import apache_beam as beam
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_envelope.errors import FormatError
from beam_envelope.transforms.paths import FieldError, Path, compile_tree, parse_path, parse_paths, tree_of

# -------------------------------------------------------------------------------------------------------- parsing


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("email", ("email",)),
        ("address.street", ("address", "street")),
        ("items[*].card", ("items", None, "card")),
        ("tags[*]", ("tags", None)),
        ("a[*][*]", ("a", None, None)),
        ("a[*].b.c[*].d", ("a", None, "b", "c", None, "d")),
        ("`a.b`", ("a.b",)),
        ("x.`a[*]`.y", ("x", "a[*]", "y")),
        ("`tick``tack`", ("tick`tack",)),
        ("`a.b`[*]", ("a.b", None)),
        ("first name", ("first name",)),
        ("größe", ("größe",)),
        ("*", ("*",)),
        ("a\nb", ("a\nb",)),
    ],
)
def test_a_path_is_its_steps_and_writes_itself(text, steps):
    path = parse_path(text)
    assert path.steps == steps
    assert str(path) == text


def test_one_field_has_one_form():
    assert str(parse_path("`email`.`a`[*]")) == "email.a[*]"
    assert parse_path("`email`") == parse_path("email")


STEPS = st.lists(st.one_of(st.none(), st.text(min_size=1)), min_size=1).filter(lambda steps: steps[0] is not None)


@given(STEPS)
def test_any_names_come_back(steps):
    assert parse_path(str(Path(tuple(steps)))).steps == tuple(steps)


@pytest.mark.parametrize(
    ("text", "character"),
    [
        ("", 1), (".", 1), (".a", 1), ("a.", 2), ("a..b", 2), ("[*]", 1), ("[*].a", 1), ("a.[*]", 2), ("a[0]", 2),
        ("a[", 2), ("a]", 2), ("a[*]b", 5), ("a[*", 2), ("`a", 1), ("``", 1), ("a`b`", 2), ("`a`b", 4), ("`a```b`", 6),
    ],
)  # fmt: skip
def test_what_is_no_path_is_refused_with_the_place(text, character):
    expected = (
        f"{text!r} is no path to a field: at character {character} there should be a name, or [*]. Paths are such"
    )
    with pytest.raises(ValueError, match="^" + re.escape(expected)):
        parse_path(text)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("email", TypeError, "fields is a list of paths: give ['email']"),
        ([], ValueError, "fields names no field; give at least one"),
        ([b"email"], TypeError, "a path to a field is a str such as 'address.street', not a bytes"),
        (["a", "b", "`a`"], ValueError, "the field a is given twice"),
        (["a[*].b", "a[*].b"], ValueError, "the field a[*].b is given twice"),
        (["a", "a.b"], ValueError, "the fields a and a.b are both given, and one contains the other"),
        (["a.b.c", "a"], ValueError, "the fields a.b.c and a are both given, and one contains the other"),
        (["a[*]", "a"], ValueError, "the fields a[*] and a are both given, and one contains the other"),
        (["a[*]", "a[*].b"], ValueError, "the fields a[*] and a[*].b are both given, and one contains the other"),
        (["a[*].x", "a.x"], ValueError, "of the fields a[*].x and a.x, only one takes a for a list"),
        (["a.x", "a[*]"], ValueError, "of the fields a.x and a[*], only one takes a for a list"),
    ],
)
def test_lists_of_paths_that_cannot_be_meant_are_refused(texts, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        parse_paths(texts)


def test_names_that_only_look_like_each_other_are_different_fields():
    assert len(parse_paths(["a.b", "`a.b`", "a.bc", "ab", "A.b"])) == 5


# -------------------------------------------------------------------------------------------------------- changing


class Person(NamedTuple):
    name: str
    age: int


@dataclasses.dataclass
class Box:
    label: str
    person: Person


def change(element, *texts, skip_missing=False):
    tree = tree_of(parse_paths(texts))
    return compile_tree(tree, lambda path: lambda value: (str(path), value), skip_missing=skip_missing)(element)


def test_only_the_named_fields_change():
    element = {"email": "e", "address": {"street": "s", "city": "c"}, "items": [{"card": 1, "n": 2}, {"card": 3}]}
    assert change(element, "email", "address.street", "items[*].card") == {
        "email": ("email", "e"),
        "address": {"street": ("address.street", "s"), "city": "c"},
        "items": [{"card": ("items[*].card", 1), "n": 2}, {"card": ("items[*].card", 3)}],
    }


def test_lists_and_tuples_change_item_by_item():
    assert change({"a": [1, 2], "b": ((3,), [])}, "a[*]", "b[*][*]") == {
        "a": [("a[*]", 1), ("a[*]", 2)],
        "b": ((("b[*][*]", 3),), []),
    }


def test_a_whole_object_or_list_is_one_value():
    assert change({"a": {"b": 1}, "c": [1]}, "a", "c") == {"a": ("a", {"b": 1}), "c": ("c", [1])}


def test_the_argument_stays_as_it_is_and_the_rest_is_shared():
    inner = {"street": "s", "geo": [1, 2]}
    element = {"address": inner, "other": [1], "items": [{"card": 1}]}
    copy = {"address": {"street": "s", "geo": [1, 2]}, "other": [1], "items": [{"card": 1}]}
    changed = change(element, "address.street", "items[*].card")
    assert element == copy
    assert element["address"] is inner
    assert changed["other"] is element["other"]
    assert changed["address"]["geo"] is inner["geo"]


def test_dicts_keep_their_class_and_order():
    changed = change(OrderedDict(b=1, a=2), "a")
    assert type(changed) is OrderedDict
    assert list(changed) == ["b", "a"]
    default = change(defaultdict(list, a=1), "a", "b", skip_missing=True)
    assert default == {"a": ("a", 1)}


@pytest.mark.parametrize("element", [Person("n", 1), beam.Row(name="n", age=1)])
def test_rows_and_named_tuples_become_rows_with_the_fields_in_order(element):
    assert change(element, "age") == beam.Row(name="n", age=("age", 1))


def test_dataclasses_become_rows_too():
    assert change(Box("l", Person("n", 1)), "person.name") == beam.Row(
        label="l", person=beam.Row(name=("person.name", "n"), age=1)
    )


def test_where_there_is_nothing_on_the_way_nothing_changes():
    element = {"address": None, "items": None, "more": [None, {"card": None}]}
    assert change(element, "address.street", "items[*].card", "more[*].card") == {
        "address": None,
        "items": None,
        "more": [None, {"card": ("more[*].card", None)}],
    }


def test_names_with_dots_are_keys():
    assert change({"a.b": 1, "a": {"b": 2}}, "`a.b`") == {"a.b": ("`a.b`", 1), "a": {"b": 2}}


@pytest.mark.parametrize(
    ("element", "path", "where", "message"),
    [
        ({"emial": "secret"}, "email", "email", "the field email: it is not there. Correct the path, or"),
        ({"a": [{}]}, "a[*].b", "a[*].b", "the field a[*].b: it is not there. Correct the path"),
        (Person("secret", 1), "email", "email", "the field email: it is not there: the row has no field of this name"),
        ({"a": "secret"}, "a.b", "a", "the field a: it is a str, which has no fields by name"),
        ({"a": ["secret"]}, "a.b", "a", "the field a: it is a list, which has no fields by name"),
        ({"a": {"b": 1}}, "a[*]", "a", "the field a: it is a dict, not a list"),
        ({"a": Person("secret", 1)}, "a[*]", "a", "the field a: it is a Person, not a list"),
        ({"a": "secret"}, "a[*]", "a", "the field a: it is a str, not a list"),
        ("secret", "a", "", "the element: it is a str, which has no fields by name"),
        (None, "a", "", "the element: it is a NoneType, which has no fields by name"),
        (Person, "a", "", "the element: it is a type, which has no fields by name"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_with_the_path_and_without_data(element, path, where, message):
    with pytest.raises(FieldError, match="^" + re.escape(message)) as caught:
        change(element, path)
    assert caught.value.path == where
    assert type(caught.value.error) is FormatError
    assert str(caught.value.error) == str(caught.value)
    assert "secret" not in str(caught.value)


def test_missing_keys_can_be_skipped_but_not_fields_of_rows():
    assert change({"a": [{}, {"b": 1}]}, "a[*].b", "c", "d.e", skip_missing=True) == {"a": [{}, {"b": ("a[*].b", 1)}]}
    with pytest.raises(FieldError, match="the row has no field of this name"):
        change(Person("n", 1), "c", skip_missing=True)
