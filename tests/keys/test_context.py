"""The encryption context: its rules, its comparison, its bytes."""

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_envelope.errors import ContextMismatchError
from beam_envelope.keys.context import ANY_CONTEXT, AnyContext, checked_context, encode_context, match_context

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
contexts = st.dictionaries(texts.filter(lambda key: not key.startswith("aws:")), texts, max_size=4)


def test_any_context_stays_the_one_object_on_a_worker():
    assert pickle.loads(pickle.dumps(ANY_CONTEXT)) is ANY_CONTEXT
    assert copy.deepcopy(ANY_CONTEXT) is ANY_CONTEXT
    assert AnyContext() is ANY_CONTEXT
    assert repr(ANY_CONTEXT) == "ANY_CONTEXT"


def test_a_checked_context_is_a_sorted_copy():
    given_context = {"b": "2", "a": "1"}
    checked = checked_context(given_context)
    assert list(checked.items()) == [("a", "1"), ("b", "2")]
    checked["c"] = "3"
    assert given_context == {"b": "2", "a": "1"}
    assert checked_context(None) == {}


@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        ({"a": 1}, TypeError, "an encryption context maps strings to strings; 'a' maps to a int"),
        ({b"a": "1"}, TypeError, "an encryption context maps strings to strings; b'a' maps to a str"),
        ({"a": ""}, ValueError, "the encryption context has an empty key or value at 'a'; KMS refuses those"),
        ({"": "1"}, ValueError, "the encryption context has an empty key or value at ''; KMS refuses those"),
        (
            {"aws:s3:arn": "1"},
            ValueError,
            "the encryption context key 'aws:s3:arn' starts with 'aws:', which AWS reserves; choose another",
        ),
        (
            {"a": "x" * 8184},
            ValueError,
            "the encryption context takes about 8193 bytes; KMS allows 8192. Shorten it",
        ),
    ],
)
def test_what_kms_would_refuse_is_refused_before_a_job_starts(context, error, message):
    with pytest.raises(error) as caught:
        checked_context(context)
    assert str(caught.value) == message


def test_a_context_is_measured_in_bytes_not_characters():
    assert checked_context({"a": "x" * 8183})
    with pytest.raises(ValueError, match="takes about 8199 bytes"):
        checked_context({"a": "ü" * 4095})


def test_a_context_matches_only_pair_for_pair():
    assert match_context({"b": "2", "a": "1"}, {"a": "1", "b": "2"}, "x") == {"a": "1", "b": "2"}
    assert match_context(None, {}, "x") == {}
    assert match_context(ANY_CONTEXT, {"a": "1"}, "x") == {"a": "1"}
    for expected in (None, {}, {"a": "1"}, {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "other"}):
        with pytest.raises(ContextMismatchError):
            match_context(expected, {"a": "1", "b": "2"}, "x")


def test_a_mismatch_says_what_differs_and_what_to_do():
    with pytest.raises(ContextMismatchError) as caught:
        match_context({"tenant": "b", "mine": "1"}, {"tenant": "a", "theirs": "2"}, "out/part-0")
    assert str(caught.value) == (
        "out/part-0 was written with another encryption context: 'tenant' is 'a' there and 'b' here; 'theirs' is "
        "missing here; 'mine' is not there. Give the context that it was written with (key files show it), or "
        "ANY_CONTEXT (--any-context) to accept any"
    )


def test_the_bytes_of_a_context_are_a_count_and_framed_pairs_in_order():
    encoded = encode_context({"b": "ü", "a": "xyz"})
    assert encoded == (
        b"\x00\x00\x00\x02"  # two pairs
        b"\x00\x00\x00\x01a\x00\x00\x00\x03xyz"
        b"\x00\x00\x00\x01b\x00\x00\x00\x02\xc3\xbc"
    )
    assert encode_context({}) == bytes(4)


def test_pairs_are_sorted_by_utf8_bytes_as_any_language_can():
    high, higher = "\uffff", "\U00010000"  # in UTF-16, as Java sorts, the second comes first
    assert encode_context({higher: "2", high: "1"}).index(high.encode()) == 8


@given(contexts, contexts)
def test_two_contexts_have_the_same_bytes_only_if_they_are_equal(one, other):
    assert (encode_context(one) == encode_context(other)) == (one == other)


def test_pairs_cannot_be_read_in_two_ways():
    assert (
        len({encode_context(context) for context in ({"a": "bc"}, {"ab": "c"}, {"a": "b", "c": ""}, {"abc": ""})}) == 4
    )
