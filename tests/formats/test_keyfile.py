"""The key file: one encoding, and nothing else is read."""

import json
import uuid
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_envelope.errors import EnvelopeError, FormatError, NotEncryptedError
from beam_envelope.formats.keyfile import (
    MAX_DATA_KEYS,
    MAX_KEY_FILE_BYTES,
    MAX_WRAPPED_BYTES,
    MAX_WRAPPED_KEYS,
    KeyFile,
    WrappedDataKey,
    is_internal,
    is_key_file,
    key_file_name,
)
from beam_envelope.formats.shard import create_shard, open_shard
from beam_envelope.keys.context import ANY_CONTEXT
from beam_envelope.keys.provider import DataKey, WrappedKey

DATA_KEY = WrappedDataKey(bytes(range(16)), (WrappedKey("aws-kms", "arn:aws:kms:us-east-1:1:key/1", b"wrapped"),))
KEY_FILE = KeyFile(
    data_keys=(DATA_KEY,),
    context={"tenant": "a", "dataset": "orders ü"},
    shard_id=uuid.UUID("12345678-1234-5678-1234-567812345678"),
    compression="zstd",
    name="part-0.csv",
    created="2024-02-29T12:34:56Z",
)
TEXT = """{
  "format": "beam-envelope key file",
  "version": 1,
  "shard_id": "12345678-1234-5678-1234-567812345678",
  "cipher": "cobblestone-256",
  "content": {
    "compression": "zstd",
    "created": "2024-02-29T12:34:56Z",
    "name": "part-0.csv"
  },
  "context": {
    "dataset": "orders ü",
    "tenant": "a"
  },
  "data_keys": [
    {
      "key_id": "000102030405060708090a0b0c0d0e0f",
      "wrapped_keys": [
        {
          "provider": "aws-kms",
          "kms_key": "arn:aws:kms:us-east-1:1:key/1",
          "wrapped_key": "d3JhcHBlZA=="
        }
      ]
    }
  ]
}
"""


def refusal(raw):
    with pytest.raises(FormatError) as caught:
        KeyFile.from_bytes(raw, "k")
    assert type(caught.value) is FormatError
    message = str(caught.value)
    start = "k is not a readable key file: "
    end = ". Restore it from a copy; without it the data cannot be opened"
    assert message.startswith(start)
    assert message.endswith(end)
    return message[len(start) : -len(end)]


def changed(**fields):
    """Return the bytes of the key file above with some fields replaced, in the canonical layout."""
    return json.dumps({**json.loads(TEXT), **fields}, indent=2, ensure_ascii=False).encode() + b"\n"


def with_wrapped(**fields):
    form = {**json.loads(TEXT)["data_keys"][0]["wrapped_keys"][0], **fields}
    return changed(data_keys=[{"key_id": "00" * 16, "wrapped_keys": [form]}])


# Names


def test_the_key_file_of_a_shard_hides_from_globs():
    assert key_file_name("part-00000-of-00004.csv") == "_KEY_FOR_part-00000-of-00004.csv.json"


def test_our_own_files_are_told_by_their_names():
    assert is_key_file("_KEY_FOR_a.json")
    assert not is_key_file("_KEY_FOR_a")
    assert not is_key_file("a.json")
    for name in ("_KEY_FOR_a.json", "_MANIFEST.json", "_TMP_1234"):
        assert is_internal(name)
    for name in ("part-0", "MANIFEST.json", "TMP_1234", "_SUCCESS"):
        assert not is_internal(name)


# The encoding


def test_a_key_file_has_exactly_these_bytes():
    assert KEY_FILE.to_bytes().decode() == TEXT


def test_a_key_file_is_read_back_as_it_was():
    assert KeyFile.from_bytes(TEXT.encode(), "k") == KEY_FILE


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
wrapped_keys = st.builds(WrappedKey, texts, texts, st.binary(max_size=40))
data_keys = st.builds(
    WrappedDataKey, st.binary(min_size=16, max_size=16), st.lists(wrapped_keys, min_size=1, max_size=3).map(tuple)
)
key_files = st.builds(
    KeyFile,
    data_keys=st.lists(data_keys, min_size=1, max_size=3).map(tuple),
    context=st.dictionaries(texts, texts, max_size=3),
    shard_id=st.uuids(),
    compression=st.sampled_from(["none", "zstd"]),
    name=texts,
    created=texts,
)


@given(key_files)
def test_any_key_file_is_read_back_as_it_was(key_file):
    assert KeyFile.from_bytes(key_file.to_bytes(), "k") == key_file


@given(key_files, key_files)
def test_two_key_files_bind_alike_only_if_all_that_must_not_change_is_equal(one, other):
    wrapped_alike = replace(one, data_keys=other.data_keys)
    assert wrapped_alike.binding() == one.binding()
    assert (wrapped_alike.binding() == other.binding()) == (wrapped_alike == other)


@pytest.mark.parametrize(
    "change",
    [
        {"shard_id": uuid.UUID(int=1)},
        {"cipher": "other"},
        {"compression": "none"},
        {"created": "2024-02-29T12:34:57Z"},
        {"name": "part-1.csv"},
        {"context": {"tenant": "a"}},
        {"name": "", "created": KEY_FILE.created + KEY_FILE.name},  # where one part ends and the next begins
    ],
    ids=str,
)
def test_what_must_not_change_is_bound(change):
    assert replace(KEY_FILE, **change).binding() != KEY_FILE.binding()


def test_the_bytes_that_bind():
    assert KEY_FILE.binding() == (
        b"beam-envelope/shard@v1\0"
        b"\0\0\0\x10" + KEY_FILE.shard_id.bytes + b"\0\0\0\x0fcobblestone-256"
        b"\0\0\0\x04zstd"
        b"\0\0\0\x142024-02-29T12:34:56Z"
        b"\0\0\0\x0apart-0.csv"
        b"\0\0\0\x02\0\0\0\x07dataset\0\0\0\x09orders \xc3\xbc\0\0\0\x06tenant\0\0\0\x01a"
    )


def test_rotation_changes_the_wrapped_forms_and_no_more():
    new = WrappedDataKey(DATA_KEY.key_id, (WrappedKey("aws-kms", "arn:new", b"new"),))
    rotated = KEY_FILE.with_wrapped_keys([new])
    assert rotated.data_keys == (new,)
    assert replace(rotated, data_keys=KEY_FILE.data_keys) == KEY_FILE


def test_a_new_key_file_has_an_id_and_a_time_of_its_own():
    one, other = (KeyFile(data_keys=(DATA_KEY,), context={}) for _ in range(2))
    assert one.shard_id != other.shard_id
    assert one.shard_id.version == 4
    assert len(one.created) == len("2024-02-29T12:34:56Z")


def test_a_key_file_holds_no_key_bytes():
    with DataKey(bytes(range(32)), DATA_KEY.wrapped_keys) as data_key:
        stored = WrappedDataKey.of(data_key)
        assert stored.key_id == data_key.key_id
        assert bytes(range(32)).hex() not in repr(stored)


# What is refused


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "it is not JSON, or was cut short"),
        (b"PK\x03\x04", "it is not JSON, or was cut short"),
        (b"\xff\xfe\x00", "it is not JSON, or was cut short"),
        (b"[" * 100_000, "it is not JSON, or was cut short"),
        (b"1" * 10_000, "it is not JSON, or was cut short"),
        (b"{}", "a field is missing or of the wrong type"),
        (b"[]", "a field is missing or of the wrong type"),
        (b"null", "a field is missing or of the wrong type"),
        (b'"beam-envelope key file"', "a field is missing or of the wrong type"),
        (b" " * (MAX_KEY_FILE_BYTES + 1), "it is larger than 1048576 bytes"),
        (changed(format="beam-envelope keyring"), "its format is not 'beam-envelope key file'"),
        (changed(version=2), "it is of a version that this release does not know; use a newer one"),
        (changed(version="1"), "it is of a version that this release does not know; use a newer one"),
        (changed(cipher="cobblestone-128"), "its cipher or compression is unknown; use a newer release"),
        (
            changed(content={"compression": "gzip", "created": "", "name": ""}),
            "its cipher or compression is unknown; use a newer release",
        ),
        (changed(content={"compression": "zstd"}), "a field is missing or of the wrong type"),
        (changed(content=None), "a field is missing or of the wrong type"),
        (changed(shard_id=1), "a field is missing or of the wrong type"),
        (changed(shard_id="1234"), "a field is missing or of the wrong type"),
        (changed(context=[]), "a field is missing or of the wrong type"),
        (changed(context={"a": 1}), "a field is missing or of the wrong type"),
        (TEXT.replace('"a"', '"\\ud800"').encode(), "a field is missing or of the wrong type"),  # half a character
        (changed(data_keys={}), "it holds 0 data keys"),
        (changed(data_keys=[]), "it holds 0 data keys"),
        (changed(data_keys="x"), "a field is missing or of the wrong type"),
        (
            changed(
                data_keys=[{"key_id": "00" * 15, "wrapped_keys": [{"provider": "", "kms_key": "", "wrapped_key": ""}]}]
            ),
            "a data key has a wrong id, no wrapped form or too many",
        ),
        (
            changed(data_keys=[{"key_id": "00" * 16, "wrapped_keys": []}]),
            "a data key has a wrong id, no wrapped form or too many",
        ),
        (changed(data_keys=[{"key_id": "zz" * 16, "wrapped_keys": []}]), "a field is missing or of the wrong type"),
        (with_wrapped(wrapped_key="d3JhcHBlZA"), "a field is missing or of the wrong type"),
        (with_wrapped(wrapped_key="d3Jhc HBlZA=="), "a field is missing or of the wrong type"),
        (with_wrapped(wrapped_key=1), "a field is missing or of the wrong type"),
        (with_wrapped(provider=None), "a field is missing or of the wrong type"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_key_file_is_refused_with_the_reason(raw, why):
    assert refusal(raw) == why


CHANGED = "it is not in the form that docs/format.md gives, so it was changed after it was written"


@pytest.mark.parametrize(
    "raw",
    [
        TEXT.encode()[:-1],
        TEXT.encode() + b"\n",
        b" " + TEXT.encode(),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("  ", " ").encode(),
        TEXT.replace("ü", "\\u00fc").encode(),
        TEXT.encode("utf-16"),
        b"\xef\xbb\xbf" + TEXT.encode(),
        TEXT.replace('"version": 1', '"version": 1.0').encode(),
        TEXT.replace('"version": 1', '"version": true').encode(),
        TEXT.replace('"version": 1,', '"version": 1,\n  "extra": 1,').encode(),
        TEXT.replace('"version": 1,', '"version": 2,\n  "version": 1,').encode(),
        TEXT.replace("0a0b0c", "0A0B0C").encode(),
        TEXT.replace("12345678-1234", "{12345678-1234").replace("567812345678", "567812345678}").encode(),
        TEXT.replace("d3JhcHBlZA==", "d3JhcHBlZB==").encode(),  # decodes to the same bytes
        changed(context={"tenant": "a", "dataset": "orders ü"}),
    ],
    ids=range(16),
)
def test_another_way_to_write_the_same_is_a_change(raw):
    assert refusal(raw) in {CHANGED, "it is not JSON, or was cut short"}


def test_numbers_and_sizes_are_bounded():
    many = tuple(WrappedKey("p", str(number), b"") for number in range(MAX_WRAPPED_KEYS + 1))
    fits = replace(KEY_FILE, data_keys=(WrappedDataKey(bytes(16), many[:-1]),))
    assert KeyFile.from_bytes(fits.to_bytes(), "k") == fits
    too_many = replace(KEY_FILE, data_keys=(WrappedDataKey(bytes(16), many),))
    assert refusal(too_many.to_bytes()) == "a data key has a wrong id, no wrapped form or too many"

    large = WrappedDataKey(bytes(16), (WrappedKey("p", "k", bytes(MAX_WRAPPED_BYTES)),))
    assert KeyFile.from_bytes(replace(KEY_FILE, data_keys=(large,)).to_bytes(), "k")
    larger = WrappedDataKey(bytes(16), (WrappedKey("p", "k", bytes(MAX_WRAPPED_BYTES + 1)),))
    assert refusal(replace(KEY_FILE, data_keys=(larger,)).to_bytes()) == "a wrapped key is larger than 6144 bytes"

    assert KeyFile.from_bytes(replace(KEY_FILE, data_keys=(DATA_KEY,) * MAX_DATA_KEYS).to_bytes(), "k")
    crowd = replace(KEY_FILE, data_keys=(DATA_KEY,) * (MAX_DATA_KEYS + 1))
    assert refusal(crowd.to_bytes()) == f"it holds {MAX_DATA_KEYS + 1} data keys"


@settings(max_examples=2000)
@given(st.binary(max_size=300))
def test_random_bytes_raise_only_our_error(raw):
    with pytest.raises(FormatError):
        KeyFile.from_bytes(raw, "k")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(st.sampled_from(sorted(json.loads(TEXT))), json_values)
def test_a_field_of_any_other_value_raises_only_our_error(field, value):
    raw = json.dumps({**json.loads(TEXT), field: value}, indent=2).encode() + b"\n"
    try:
        KeyFile.from_bytes(raw, "k")
    except FormatError:
        pass
    else:
        assert raw.decode() == json.dumps(json.loads(raw), indent=2) + "\n"  # it happens to be another good value


# Changes to a key file, seen by who opens the shard


@pytest.fixture
def shard(tmp_path, local_key):
    path = tmp_path / "part-0.csv"
    with create_shard(path, key=local_key, context={"dataset": "orders"}) as stream:
        stream.write(b"some rows\n")
    return path


def key_file_of(path):
    return path.with_name(key_file_name(path.name))


def opens(path, local_key, raw, context):
    """Open a shard with other key file bytes; True if it gives its plaintext."""
    with open_shard(path, key=local_key, context=context, key_file=raw) as stream:
        return stream.read() == b"some rows\n"


@pytest.mark.parametrize("context", [{"dataset": "orders"}, ANY_CONTEXT], ids=str)
def test_every_changed_byte_of_a_key_file_is_seen(shard, local_key, context):
    good = key_file_of(shard).read_bytes()
    assert opens(shard, local_key, good, context)
    kinds = set()
    for position in range(len(good)):
        for flip in (0x01, 0x20, 0x80):  # another digit, another case, no UTF-8
            raw = bytearray(good)
            raw[position] ^= flip
            with pytest.raises(EnvelopeError) as caught:
                opens(shard, local_key, bytes(raw), context)
            kinds.add(type(caught.value).__name__)
    expected = {"FormatError", "WrongKeyError", "TamperedError"}
    assert kinds == (expected if context is ANY_CONTEXT else expected | {"ContextMismatchError"})


def test_every_truncation_of_a_key_file_is_seen(shard, local_key):
    good = key_file_of(shard).read_bytes()
    for size in range(len(good)):
        with pytest.raises(FormatError):
            opens(shard, local_key, good[:size], ANY_CONTEXT)


def test_any_byte_inserted_or_deleted_is_seen(shard, local_key):
    good = key_file_of(shard).read_bytes()
    for position in range(len(good)):
        for raw in (good[:position] + good[position + 1 :], good[:position] + b"0" + good[position:]):
            with pytest.raises(EnvelopeError):
                opens(shard, local_key, raw, ANY_CONTEXT)


def test_swapped_key_files_of_two_shards_are_seen(shard, local_key, tmp_path):
    other = tmp_path / "part-1.csv"
    with create_shard(other, key=local_key, context={"dataset": "orders"}) as stream:
        stream.write(b"some rows\n")
    for one, two in ((shard, other), (other, shard)):
        with pytest.raises(EnvelopeError) as caught:
            opens(one, local_key, key_file_of(two).read_bytes(), {"dataset": "orders"})
        assert str(caught.value) == (
            f"{one} and its key file do not belong together (the key commitment differs): one of them was swapped or "
            "changed after it was written, or the file is no shard. Restore both from one copy"
        )


def test_a_wrapped_key_cannot_be_moved_to_the_key_file_of_another_shard(shard, local_key, tmp_path):
    other = tmp_path / "part-1.csv"
    create_shard(other, key=local_key, context={"dataset": "orders"}).close()
    theirs = KeyFile.from_bytes(key_file_of(other).read_bytes(), "k")
    ours = KeyFile.from_bytes(key_file_of(shard).read_bytes(), "k")
    mixed = replace(ours, data_keys=theirs.data_keys)
    with pytest.raises(EnvelopeError, match="the key commitment differs"):
        opens(shard, local_key, mixed.to_bytes(), ANY_CONTEXT)


def test_a_key_file_of_several_data_keys_is_of_another_format(shard, local_key):
    ours = KeyFile.from_bytes(key_file_of(shard).read_bytes(), "k")
    with pytest.raises(FormatError) as caught:
        opens(shard, local_key, replace(ours, data_keys=ours.data_keys * 2).to_bytes(), ANY_CONTEXT)
    assert str(caught.value) == (
        f"the key file of {shard} has 2 data keys; that of a shard has one. Is it another format?"
    )


def test_a_huge_key_file_is_not_read_to_its_end(shard, local_key):
    with key_file_of(shard).open("r+b") as stream:
        stream.truncate(1 << 40)  # as much as a machine has, if it was read
    with pytest.raises(FormatError, match="it is larger than 1048576 bytes"):
        open_shard(shard, key=local_key, context=ANY_CONTEXT)


def test_a_key_file_is_no_shard(shard, local_key):
    with pytest.raises(NotEncryptedError) as caught:
        open_shard(key_file_of(shard), key=local_key)
    assert str(caught.value) == (
        f"{key_file_of(shard)} is a key file or an unfinished file, not a shard. Name the shard itself"
    )


@given(
    st.dictionaries(st.text(min_size=1), st.text(min_size=1)), st.text(), st.lists(st.binary(max_size=40), min_size=1)
)
def test_the_encoding_is_that_of_json(context, name, wrapped):
    data_key = WrappedDataKey(bytes(16), tuple(WrappedKey("p", name, form) for form in wrapped))
    text = KeyFile((data_key,), context, name=name).to_bytes().decode("utf-8", "surrogatepass")
    assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"
