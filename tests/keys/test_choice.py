"""Which key holds for an element or a path."""

import dataclasses
import pickle
from typing import NamedTuple

import apache_beam as beam
import pytest

from beam_envelope import ANY_CONTEXT
from beam_envelope.errors import FormatError
from beam_envelope.keys import cache, choice
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.cache import DataKeyPolicy, DataKeySource, clear_caches
from beam_envelope.keys.choice import ChosenSources, ElementFields, KeyChoice, Opened, PathFields
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.keys.provider import kms_calls

SECRET = "CANARY 4111"


class Order(NamedTuple):
    """An order."""

    tenant: str
    card: str


class Card(NamedTuple):
    """What has no tenant."""

    card: str


@dataclasses.dataclass
class Order2:
    """An order that is no tuple."""

    tenant: str


def test_keys_and_context_are_filled_together():
    chosen = KeyChoice.to_write(
        ["aws-kms://alias/data-{tenant}", "aws-kms://alias/dr"],
        {"tenant": "{tenant}", "of": "{year}/{tenant}", "a": "{}"},
    )
    assert chosen.names == ("tenant", "year")
    filled = chosen.filled(("acme", "2026"))
    assert filled.keys == (AwsKms("alias/data-acme"), AwsKms("alias/dr"))
    assert filled.pairs == {"tenant": "acme", "of": "2026/acme", "a": "{}"}
    assert filled.names == ()
    assert pickle.loads(pickle.dumps(chosen)) == chosen


def test_what_has_no_gaps_stays_as_it_is(local_key):
    chosen = KeyChoice.to_read(local_key, ANY_CONTEXT)
    assert chosen.names == ()
    assert chosen.filled(()) is chosen
    assert chosen.pairs is ANY_CONTEXT


def test_a_context_that_becomes_too_large_is_refused():
    chosen = KeyChoice.to_write("aws-kms://alias/x", {"a": "{t}" * 2000})
    with pytest.raises(ValueError, match="KMS allows 8192"):
        chosen.filled(("x" * 64,))


@pytest.mark.parametrize(
    "element",
    [{"tenant": "acme", "card": SECRET}, Order("acme", SECRET), Order2("acme"), beam.Row(tenant="acme", card=SECRET)],
)
def test_fields_of_dicts_rows_named_tuples_and_dataclasses_fill_templates(element):
    assert ElementFields(["tenant"])(element) == ("acme",)


def test_a_function_gives_the_fields_of_other_elements():
    assert ElementFields(["a", "b"], lambda line: dict(zip("ba", line.split(), strict=True)))("1 2") == ("2", "1")


@pytest.mark.parametrize(
    ("element", "said"),
    [
        ({"card": SECRET}, "it is not there"),
        ({"tenant": None, "card": SECRET}, "it is null"),
        ({"tenant": SECRET}, "it has other characters"),
        (SECRET, "it is not there"),
        ((SECRET, "tenant"), "it is not there"),
        (SECRET.encode(), "it is not there"),
        (beam.Row(card=SECRET), "it is not there"),
        (Card(SECRET), "it is not there"),
        (Order("../" + SECRET, ""), "it has other characters"),
    ],
)
def test_a_field_that_does_not_do_is_named_with_its_element_and_not_shown(element, said):
    with pytest.raises(FormatError) as caught:
        ElementFields(["tenant"], record_id=lambda _: "order-7")(element)
    assert "the field 'tenant'" in str(caught.value)
    assert "the element order-7: " + said in str(caught.value)
    assert "CANARY" not in str(caught.value)
    assert caught.value.__context__ is None or "CANARY" not in repr(caught.value.__context__)
    with pytest.raises(FormatError, match=f"an element of type {type(element).__name__} .record_id= would say which"):
        ElementFields(["tenant"])(element)


def fail(element):
    raise ValueError(element)


@pytest.mark.parametrize(("function", "said"), [(fail, "ValueError"), (len, "it returned a int, not a dict")])
def test_a_function_that_fails_is_told_without_the_element(function, said):
    with pytest.raises(FormatError) as caught:
        ElementFields(["tenant"], function, fail)(SECRET)
    assert f"key_fields= gave nothing for an element of type str ({said})" in str(caught.value)
    assert "CANARY" not in str(caught.value)
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


def test_what_fills_nothing_is_refused():
    with pytest.raises(ValueError, match="key_fields= fills templates, and neither key= nor context= is one"):
        ElementFields([], lambda _: {})
    with pytest.raises(ValueError, match="path_fields= fills templates, and neither key= nor context= is one"):
        PathFields([], "{tenant}/*")
    with pytest.raises(TypeError, match="key_fields is a function"):
        ElementFields(["a"], {"a": "b"})


@pytest.mark.parametrize(
    ("names", "pattern", "path", "values"),
    [
        (["tenant"], None, "s3://raw/tenant=acme/2026/a.csv", ("acme",)),
        (["year", "tenant"], None, "/raw/tenant=acme/year=2026/a.csv", ("2026", "acme")),
        (["tenant"], None, "tenant=acme/tenant=b.csv", ("acme",)),
        (["tenant"], "{tenant}/*.csv", "s3://raw/x/acme/a.csv", ("acme",)),
        (["tenant"], "{tenant}/*.csv", "acme/a.csv", ("acme",)),
        (["tenant"], "{tenant}.csv", "/raw/acme.eu.csv", ("acme.eu",)),
        (["tenant"], "of-{tenant}/20??/*", "/raw/of-acme/2026/a", ("acme",)),
        (["a", "b"], "{b}/x/{a}/*", "/raw/1/x/2/c", ("2", "1")),
        (["tenant"], "s3://raw/{tenant}/**", "s3://raw/acme/b/c/d.csv", ("acme",)),
        (["tenant"], "s3://raw/{tenant}/**/*.csv", "s3://raw/acme/d.csv", ("acme",)),
        (["tenant"], "/raw/{tenant}/*", "/raw/acme/d.csv", ("acme",)),
    ],
)
def test_paths_fill_templates(names, pattern, path, values):
    fields = PathFields(names, pattern)
    assert fields(path) == values
    assert pickle.loads(pickle.dumps(fields))(path) == values


@pytest.mark.parametrize(
    ("pattern", "path", "said"),
    [
        (None, "/raw/acme/a.csv", "has no folder tenant=..."),
        (None, "/raw/tenant=acme", "has no folder tenant=..."),
        (None, "/raw/tenant=acme/tenant=other/a", "has 2 folders tenant=..."),
        (None, "/raw/tenant=acme/tenant=acme/a", "has 2 folders tenant=..."),
        (None, "/raw/xtenant=acme/a", "has no folder tenant=..."),
        (None, "/raw/tenant=a%2Fb/a", "it has other characters"),
        (None, "/raw/tenant=../a", "it has other characters"),
        (None, "/raw/tenant=/a", "it is empty"),
        (None, f"/raw/tenant={'x' * 65}/a", "it has 65 characters"),
        ("{tenant}/*.csv", "/raw/acme/a.txt", "is not of the form '{tenant}/*.csv'"),
        ("{tenant}/*.csv", "/raw/a b/a.csv", "is not of the form"),
        ("{tenant}/*.csv", "/raw/../a.csv", "is not of the form"),
        ("{tenant}/*.csv", "a.csv", "is not of the form"),
        ("{tenant}/*.csv", f"/{'x' * 65}/a.csv", "it has 65 characters"),
        ("s3://raw/{tenant}/*", "s3://other/s3://raw/acme/a", "is not of the form"),
        ("/raw/{tenant}/*", "x/raw/acme/a", "is not of the form"),
        ("a.b/{tenant}/*", "axb/acme/c", "is not of the form"),
    ],
)
def test_a_path_that_does_not_say_is_named(pattern, path, said):
    with pytest.raises(FormatError) as caught:
        PathFields(["tenant"], pattern)(path)
    assert path in str(caught.value)
    assert said in str(caught.value)
    assert "tenant" in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "*.csv",
        "{other}/*",
        "{tenant}/{other}/*",
        "{tenant}/{tenant}/*",
        "{tenant}-*.csv",
        "{tenant}{x}/a",
        "*{tenant}/a",
        "{tenant}/**",
        "/raw/**/{tenant}/*",
        "{tenant}/{/a",
        "{ten ant}/a",
        "",
    ],
)
def test_a_pattern_that_is_not_clear_is_refused(pattern):
    with pytest.raises(ValueError, match="path_fields"):
        PathFields(["tenant"], pattern)


def test_what_is_open_is_bounded_and_the_least_recently_used_goes_first(monkeypatch):
    monkeypatch.setattr(choice, "MAX_OPEN", 2)
    closed = []
    opened = Opened(list, closed.append)
    first = opened(("a",))
    opened(("b",))
    assert opened(("a",)) is first
    opened(("c",))
    assert closed == [["b"]]
    opened.close()
    opened.close()
    assert sorted(closed) == [["a"], ["b"], ["c"]]


@pytest.fixture
def keyrings(tmp_path):
    """A template of keyrings, of which there are three."""
    for tenant in "abc":
        generate_local_key(LocalKms(tmp_path / f"{tenant}.json"))
    return f"local-kms://{tmp_path}/{{tenant}}.json"


def test_each_choice_has_one_data_key_in_a_bundle(keyrings):
    sources = ChosenSources(KeyChoice.to_write(keyrings, {"tenant": "{tenant}"}), DataKeyPolicy())
    ids = []
    for tenant in "abab":
        source, context = sources.of((tenant,))
        assert context == {"tenant": tenant}
        with source.take() as data_key:
            ids.append(data_key.key_id)
    assert ids[:2] == ids[2:]
    assert ids[0] != ids[1]
    assert kms_calls.counts == {"GenerateDataKey": 2}


def test_pushing_a_choice_out_erases_its_key(keyrings, monkeypatch):
    monkeypatch.setattr(choice, "MAX_OPEN", 1)
    sources = ChosenSources(KeyChoice.to_write(keyrings, None), DataKeyPolicy())
    source, _ = sources.of(("a",))
    source.take().close()
    current = source._current
    sources.of(("b",))
    assert current.closed
    last, _ = sources.of(("b",))
    last.take().close()
    current = last._current
    sources.close()
    assert current.closed


def test_the_process_has_one_data_key_for_each_choice_and_bounds_them(keyrings, monkeypatch):
    monkeypatch.setattr(cache, "MAX_ENTRIES", 2)
    chosen, policy = KeyChoice.to_write(keyrings, None), DataKeyPolicy("worker")
    first, _ = ChosenSources(chosen, policy).of(("a",))
    first.take().close()
    current = first._current
    ended = ChosenSources(chosen, policy)
    assert ended.of(("a",))[0] is first
    ended.close()
    assert not current.closed  # the process's
    for tenant in "bac":
        ChosenSources(chosen, policy).of((tenant,))[0].take().close()
    assert not current.closed  # b was used longer ago
    assert kms_calls.counts == {"GenerateDataKey": 3}
    ChosenSources(chosen, policy).of(("b",))
    assert current.closed
    with first.take() as again:  # who holds it still gets a new one
        assert again.material
    clear_caches()


def test_pushing_out_does_not_wait_for_who_waits_for_the_caches(keyrings, monkeypatch):
    """`close` takes the lock of what it closes, whose holder may be about to ask the caches: so not under theirs."""
    monkeypatch.setattr(cache, "MAX_ENTRIES", 1)
    seen = []

    class Holder:
        def close(self):
            seen.append(cache._caches.lock.locked())

    cache.shared("one", Holder)
    cache.shared("two", Holder)
    clear_caches()
    assert seen == [False, False]
    assert isinstance(cache.shared("three", lambda: DataKeySource([], {}, DataKeyPolicy())), DataKeySource)
