"""The manifest: one encoding, and a MAC in each section over all that must not change."""

import copy
import hashlib
import hmac
import json
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_envelope import LocalKms
from beam_envelope.errors import EnvelopeError, FormatError, ManifestError
from beam_envelope.formats import manifest as module
from beam_envelope.formats.keyfile import MAX_WRAPPED_BYTES, MAX_WRAPPED_KEYS, WrappedDataKey
from beam_envelope.formats.manifest import Manifest, ManifestEntry, ManifestSection
from beam_envelope.keys.provider import DataKey, WrappedKey
from tests.memory import peak_of
from tests.vectors import make_manifest

VECTORS = json.loads(make_manifest.TARGET.read_bytes())
MANIFESTS = {vector["name"]: vector for vector in VECTORS["manifests"]}
REFUSALS = {vector["name"]: vector for vector in VECTORS["refusals"]}
PAGE = Path(__file__).parents[2] / "docs" / "format.md"

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
FORM = WrappedKey("aws-kms", "arn:aws:kms:us-east-1:1:key/1", b"wrapped")
CONTEXT = {"tenant": "a", "dataset": "orders ü"}
SHARDS = {
    "part-0": ManifestEntry("0" * 31 + "1", 1000, 900, 10),
    "sub/ü": ManifestEntry("f" * 32, 0),
    "part-1": None,
    "part-2": ManifestEntry("0" * 31 + "2", 2**63 - 1, 0, 0),
}


def made(*sections, key=KEY):
    """Return a manifest of sections (context, shards), each under the same data key."""
    manifest = Manifest()
    for context, shards in sections:
        with DataKey(key, (FORM,)) as data_key:
            manifest = manifest.with_section(data_key, context, shards)
    return manifest


MANIFEST = made((CONTEXT, SHARDS), ({}, {"part-1": ManifestEntry("a" * 32, 5)}))
RAW = MANIFEST.to_bytes()


def verify(manifest, key=KEY):
    """Check all sections under one data key."""
    for number, section in enumerate(manifest.sections):
        with DataKey(key) as data_key:
            section.verify(data_key, f"section {number}")


def refusal(raw):
    """Return why bytes are no manifest."""
    with pytest.raises(FormatError) as caught:
        Manifest.from_bytes(raw, "m")
    message = str(caught.value)
    start, end = "m is not a readable manifest: ", ". Restore it from a copy, or read with manifest='ignore'"
    assert message.startswith(start)
    assert message.endswith(end)
    return message[len(start) : -len(end)]


def edited(change):
    """Return the bytes of the manifest above after a change to its document, otherwise in the one encoding."""
    document = json.loads(RAW)
    change(document)
    return written(document)


def written(document):
    """Return a document as docs/format.md, 11.2, says, whatever is in it: a writer that shares no code with ours."""

    def text(value):
        return json.dumps(value, ensure_ascii=False)

    def member(section, name):
        if name != "shards" or not section[name]:
            return f"      {text(name)}: {text(section[name])}"
        lines = ",\n".join(f"        {text(path)}: {text(shard)}" for path, shard in section[name].items())
        return f'      "shards": {{\n{lines}\n      }}'

    sections = [
        "    {\n" + ",\n".join(member(section, name) for name in section) + "\n    }"
        for section in document["sections"]
    ]
    head = [f"  {text(name)}: {text(value)}" for name, value in document.items() if name != "sections"]
    listed = "[\n" + ",\n".join(sections) + "\n  ]" if sections else "[]"
    return ("{\n" + ",\n".join([*head, f'  "sections": {listed}']) + "\n}\n").encode()


# ------------------------------------------------------------------------------------------------ the encoding


def test_what_is_written_is_read():
    assert Manifest.from_bytes(RAW, "m") == MANIFEST
    assert Manifest.from_bytes(Manifest().to_bytes(), "m") == Manifest()
    assert Manifest().to_bytes() == written({"format": "beam-envelope manifest", "version": 1, "sections": []})
    empty = made(({}, {}))
    assert Manifest.from_bytes(empty.to_bytes(), "m") == empty


def test_the_text_is_that_of_another_writer_and_has_a_line_for_each_shard():
    assert written(json.loads(RAW)) == RAW
    lines = RAW.decode().splitlines()
    assert '        "part-1": null,' in lines
    assert (
        f'        "part-0": {{"shard_id": "{"0" * 31}1", "stored_bytes": 1000, "plaintext_bytes": 900, "records": 10}},'
        in lines
    )


def test_paths_and_contexts_are_sorted_by_their_bytes():
    names = ["b", "a", "ü", "\U0001f600", "\uffff", "B", "a/b", "a0", '"', "\n", "\\"]
    entry = ManifestEntry("1" * 32, 1)
    raw = made((dict.fromkeys(names, "x"), dict.fromkeys(names, entry))).to_bytes()
    section = json.loads(raw)["sections"][0]
    for field in ("context", "shards"):
        assert list(section[field]) == sorted(names, key=str.encode)
    assert Manifest.from_bytes(raw, "m").to_bytes() == raw


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
            lambda path: path[0] != "/" and ".." not in path.split("/")
        ),
        st.none()
        | st.builds(
            ManifestEntry,
            st.uuids().map(lambda made: made.hex),
            st.integers(0, 2**63 - 1),
            st.none() | st.integers(0, 2**63 - 1),
            st.none() | st.integers(0, 2**63 - 1),
        ),
    ),
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]))
    ),
)
def test_any_shards_and_context_come_back_and_verify(shards, context):
    manifest = made((context, shards), (context, {}))
    again = Manifest.from_bytes(manifest.to_bytes(), "m")
    assert again == manifest
    assert written(json.loads(manifest.to_bytes())) == manifest.to_bytes()
    verify(again)


def test_every_changed_byte_is_refused_or_does_not_verify():
    """But for the bytes of wrapped forms, which may be rewritten."""
    free = [RAW.index(b'"provider"'), RAW.index(b'"mac"')]
    second = RAW.index(b'"provider"', free[1]), RAW.index(b'"mac"', free[1] + 1)
    for position, byte in enumerate(RAW):
        rewritable = free[0] <= position < free[1] or second[0] <= position < second[1]
        for flip in (0x01, 0x20, 0x80):
            raw = RAW[:position] + bytes([byte ^ flip]) + RAW[position + 1 :]
            try:
                manifest = Manifest.from_bytes(raw, "m")
                verify(manifest)
            except (FormatError, ManifestError):
                continue
            assert rewritable, (position, RAW[position - 20 : position + 1])
            assert [replace(section, data_key=None) for section in manifest.sections] == [
                replace(section, data_key=None) for section in MANIFEST.sections
            ]


def test_every_truncation_and_extension_is_refused():
    for size in range(len(RAW)):
        assert refusal(RAW[:size])
    for more in (b"\n", b" ", b"\x00", b"{}", RAW):
        assert refusal(RAW + more)


@settings(max_examples=50)
@given(st.binary() | st.lists(st.none() | st.integers() | st.text()).map(lambda made: json.dumps(made).encode()))
def test_random_bytes_raise_only_our_error(raw):
    with pytest.raises(FormatError):
        Manifest.from_bytes(raw, "m")


def fields(document, path=()):
    """Yield the paths of all members of a document."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for name, value in list(items):
        yield (*path, name)
        if isinstance(value, dict | list):
            yield from fields(value, (*path, name))


FIELDS = list(fields(json.loads(RAW)))
NAMED = [path for path in FIELDS if isinstance(path[-1], str) and path[-1] not in (*SHARDS, *CONTEXT)]


@pytest.mark.parametrize("path", NAMED, ids=lambda path: ".".join(map(str, path)))
def test_a_field_that_is_missing_of_another_type_or_doubled_is_refused(path):
    def at(document):
        for name in path[:-1]:
            document = document[name]
        return document

    def removed(document):
        del at(document)[path[-1]]

    if path != ("sections",):
        assert refusal(edited(removed))
    values = [0, -1, 1.5, True, "", "x", [], {}, [[]], {"x": {}}, 2**63, 10**400]
    if path[-1] not in {"plaintext_bytes", "records", "part-1"}:
        values.append(None)
    for value in values:
        document = json.loads(RAW)
        holder = at(document)
        if value == holder[path[-1]] and type(value) is type(holder[path[-1]]):
            continue
        holder[path[-1]] = value
        raw = written(document) if isinstance(document["sections"], list) and all_sections(document) else None
        raw = raw or (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode()
        if path[-1] in {"provider", "kms_key", "wrapped_key"} and isinstance(value, str):
            continue  # may be rewritten
        if path == ("sections",) and value == []:
            continue  # an older state, of before the first job
        with pytest.raises((FormatError, ManifestError)):
            verify(Manifest.from_bytes(raw, "m"))


def all_sections(document):
    return all(
        isinstance(section, dict) and isinstance(section.get("shards"), dict) for section in document["sections"]
    )


@pytest.mark.parametrize(
    "path", [path[:-1] for path in NAMED if path[-1] in {"format", "section_id", "key_id", "provider", "shard_id"}]
)
def test_a_field_that_nobody_knows_or_in_another_place_is_refused(path):
    def at(document):
        for name in path:
            document = document[name]
        return document

    def more(document):
        at(document)["x"] = 1

    def turned(document):
        items = list(at(document).items())
        at(document).clear()
        at(document).update([items[1], items[0], *items[2:]])

    assert refusal(edited(more))
    assert refusal(edited(turned))


@pytest.mark.parametrize("path", ["", "/", "/a", "..", "../a", "a/..", "a/../b", "\ud800"])
def test_a_path_that_leaves_the_folder_is_refused(path):
    document = json.loads(RAW)
    shards = document["sections"][1]["shards"]
    shards["~" if path == "\ud800" else path] = shards.pop("part-1")
    raw = written(document)
    if path == "\ud800":
        assert raw.count(b'"~"') == 1
        raw = raw.replace(b'"~"', b'"\\ud800"')
    assert refusal(raw) == "a field is missing or of the wrong type"


@pytest.mark.parametrize("path", ["..a", "a..", "a..b/c", "...", "a b", "*", "[", "_KEY", " "])
def test_other_strange_paths_are_taken(path):
    manifest = made(({}, {path: ManifestEntry("1" * 32, 1)}))
    assert Manifest.from_bytes(manifest.to_bytes(), "m") == manifest


@pytest.mark.parametrize("name", ["stored_bytes", "plaintext_bytes", "records"])
@pytest.mark.parametrize("number", [-1, 2**63, 10**30, 1.0, 0.5, True, "1", [1]])
def test_numbers_are_bounded_integers(name, number):
    def change(document):
        document["sections"][0]["shards"]["part-0"][name] = number

    assert refusal(edited(change)) == "a field is missing or of the wrong type"


def test_a_number_of_many_digits_is_refused():
    raw = RAW.replace(b'"stored_bytes": 1000', b'"stored_bytes": 1' + b"0" * 100_000)
    assert refusal(raw)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"version": 1', b'"version": 2'),
        (b'"version": 1', b'"version": 0'),
        (b'"version": 1', b'"version": "1"'),
    ],
)
def test_another_version_is_refused(old, new):
    assert refusal(RAW.replace(old, new)) == "it is of a version that this release does not know; use a newer one"


def test_another_format_is_refused():
    assert refusal(RAW.replace(b"beam-envelope manifest", b"beam-envelope key file")) == (
        "its format is not 'beam-envelope manifest'"
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"version": 1', b'"version": 1.0'),
        (b'"version": 1', b'"version": true'),
        (b'"version": 1,\n', b'"version": 2,\n  "version": 1,\n'),
        (b'        "part-1": null,\n', b'        "part-1": null,\n        "part-1": null,\n'),
        (b'"records": 10', b'"records": 9, "records": 10'),
        (b"\n", b"\r\n"),
        (b'"part-0"', b'"part-\\u0030"'),
        (b"0" * 31 + b"1", b"0" * 31 + b"1 "),
        (b'"' + b"f" * 32, b'"' + b"F" * 32),
        (b'"' + b"f" * 32, b'"{ffffffff-ffff-ffff-ffff-ffffffffffff}'),
    ],
)
def test_another_encoding_of_the_same_is_refused(old, new):
    assert old in RAW
    assert refusal(RAW.replace(old, new)) in {
        "it is not in the form that docs/format.md gives, so it was changed after it was written",
        "a field is missing or of the wrong type",
    }


@pytest.mark.parametrize(("field", "size"), [("mac", 0), ("mac", 31), ("mac", 33), ("earlier", 0), ("earlier", 16)])
def test_macs_and_digests_have_32_bytes(field, size):
    def change(document):
        document["sections"][1][field] = "00" * size

    assert refusal(edited(change)) == "a field is missing or of the wrong type"


def test_wrapped_forms_are_bounded():
    def forms(*sizes):
        def change(document):
            forms = [{"provider": "p", "kms_key": "k", "wrapped_key": "AAAA" * (size // 3)} for size in sizes]
            document["sections"][0]["data_key"]["wrapped_keys"] = forms

        return edited(change)

    assert Manifest.from_bytes(forms(*[3] * MAX_WRAPPED_KEYS), "m")
    assert Manifest.from_bytes(forms(MAX_WRAPPED_BYTES), "m")
    assert "no wrapped form or too many" in message_of(forms())
    assert "no wrapped form or too many" in message_of(forms(*[3] * (MAX_WRAPPED_KEYS + 1)))
    assert f"larger than {MAX_WRAPPED_BYTES} bytes" in message_of(forms(MAX_WRAPPED_BYTES + 3))


def message_of(raw):
    with pytest.raises(FormatError) as caught:
        Manifest.from_bytes(raw, "m")
    return str(caught.value)


def test_a_huge_file_is_refused_before_it_is_parsed(monkeypatch):
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", 100)
    monkeypatch.setattr(module.json, "loads", lambda _: pytest.fail("it was parsed"))
    assert refusal(b" " * 101) == "it is larger than 100 bytes"


def test_deep_nesting_is_refused():
    assert refusal(b"[" * 100_000) == "it is not JSON, or was cut short"


# ------------------------------------------------------------------------------------------------------ the MAC


def test_the_right_data_key_verifies_and_another_does_not():
    verify(MANIFEST)
    with pytest.raises(ManifestError, match=r"^section 0 was changed after it was written, or forged\. Restore it"):
        verify(MANIFEST, OTHER_KEY)


SECTION = MANIFEST.sections[0]
ENTRY = SECTION.shards["part-0"]


def with_entry(name, entry):
    return replace(SECTION, shards={**SECTION.shards, name: entry})


CHANGES = {
    "section_id": replace(SECTION, section_id=uuid.UUID(int=SECTION.section_id.int ^ 1)),
    "no context": replace(SECTION, context={}),
    "another context": replace(SECTION, context={**CONTEXT, "tenant": "b"}),
    "less context": replace(SECTION, context={"tenant": "a"}),
    "more context": replace(SECTION, context={**CONTEXT, "x": "y"}),
    "key_id": replace(SECTION, data_key=WrappedDataKey(bytes(16), SECTION.data_key.wrapped_keys)),
    "earlier": replace(SECTION, earlier=bytes(32)),
    "mac": replace(SECTION, mac=SECTION.mac[:-1] + bytes([SECTION.mac[-1] ^ 1])),
    "no mac": replace(SECTION, mac=b""),
    "half a mac": replace(SECTION, mac=SECTION.mac[:16]),
    "shard_id": with_entry("part-0", ENTRY._replace(shard_id="0" * 31 + "2")),
    "stored_bytes": with_entry("part-0", ENTRY._replace(stored_bytes=1001)),
    "plaintext_bytes": with_entry("part-0", ENTRY._replace(plaintext_bytes=901)),
    "records": with_entry("part-0", ENTRY._replace(records=11)),
    "plaintext_bytes unknown": with_entry("part-0", ENTRY._replace(plaintext_bytes=None)),
    "records unknown": with_entry("part-0", ENTRY._replace(records=None)),
    "0 for unknown": with_entry("sub/ü", SHARDS["sub/ü"]._replace(plaintext_bytes=0)),
    "numbers exchanged": with_entry("part-0", ENTRY._replace(plaintext_bytes=10, records=900)),
    "removed": with_entry("part-0", None),
    "not removed": with_entry("part-1", ENTRY),
    "one more": with_entry("part-3", ENTRY),
    "one more removed": with_entry("part-3", None),
    "one less": replace(SECTION, shards={path: entry for path, entry in SHARDS.items() if path != "part-0"}),
    "one removed less": replace(SECTION, shards={path: entry for path, entry in SHARDS.items() if path != "part-1"}),
    "none": replace(SECTION, shards={}),
    "another name": replace(SECTION, shards={f"{path}x": entry for path, entry in SHARDS.items()}),
    "two exchanged": replace(SECTION, shards={**SHARDS, "part-0": SHARDS["part-2"], "part-2": SHARDS["part-0"]}),
}


@pytest.mark.parametrize("section", CHANGES.values(), ids=CHANGES)
def test_all_that_must_not_change_is_in_the_mac(section):
    with DataKey(KEY) as data_key:
        SECTION.verify(data_key, "it")
        with pytest.raises(ManifestError, match=r"^it was changed after it was written, or forged\."):
            section.verify(data_key, "it")


def test_parts_cannot_run_into_each_other():
    """What two shards say is never what one shard of another name says, and so with the context."""
    entry = ManifestEntry("41" * 16, 0x4141414141414141, 0x4141414141414141, 0x4141414141414141)
    with DataKey(KEY) as data_key:

        def mac(context, shards):
            section = ManifestSection(WrappedDataKey(bytes(16), (FORM,)), context, shards, bytes(32), uuid.UUID(int=0))
            return section.signed(data_key).mac

        contexts = ({}, {"a": "bc"}, {"ab": "c"}, {"a": "b", "c": "d"}, {"a": "bcd"})
        listed = (
            {},
            {"a": entry},
            {"ab": entry},
            {"a": None, "b": None},
            {"a": None},
            {"a" + "\x00\x00\x00\x01b": None},
        )
        macs = [mac(context, shards) for context in contexts for shards in listed]
    assert len(set(macs)) == len(macs)


def test_the_order_in_which_shards_were_given_does_not_matter():
    turned = replace(SECTION, shards=dict(reversed(SECTION.shards.items())))
    with DataKey(KEY) as data_key:
        turned.verify(data_key, "it")
    assert Manifest((turned, *MANIFEST.sections[1:])).to_bytes() == RAW


def test_a_data_key_and_a_section_id_are_new_for_each_section():
    assert len({section.section_id for section in made(*[({}, {})] * 10).sections}) == 10


def test_the_mac_is_compared_in_constant_time(monkeypatch):
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda *pair: compared.append(pair) or real(*pair))
    verify(MANIFEST)
    assert [ours for ours, _ in compared] == [section.mac for section in MANIFEST.sections]


def test_wrapped_forms_may_be_rewritten():
    forms = [WrappedDataKey(data_key.key_id, (WrappedKey("x", "y", b"z"),)) for data_key in MANIFEST.data_keys]
    rewritten = MANIFEST.with_wrapped_keys(forms)
    assert rewritten.data_keys == tuple(forms)
    assert rewritten.contexts == MANIFEST.contexts
    assert rewritten.digest() == MANIFEST.digest()
    again = Manifest.from_bytes(rewritten.to_bytes(), "m")
    assert again == rewritten
    verify(again)


def test_each_section_has_a_form_when_they_are_rewritten():
    with pytest.raises(ValueError, match=r"zip\(\)"):
        MANIFEST.with_wrapped_keys(MANIFEST.data_keys[:1])


# ----------------------------------------------------------------------------------------- sections and their order

THREE = made(
    ({}, {"a": ManifestEntry("1" * 32, 1), "b": ManifestEntry("2" * 32, 1)}),
    ({"x": "y"}, {"a": ManifestEntry("3" * 32, 1)}),
    ({}, {"b": None, "c": ManifestEntry("4" * 32, 1)}),
)
A, B, C = THREE.sections
STRANGER = made(({}, {"a": ManifestEntry("1" * 32, 1)}), ({}, {"q": ManifestEntry("5" * 32, 1)})).sections


@pytest.mark.parametrize(
    "sections",
    [
        (B, C),
        (A, C),
        (C,),
        (B,),
        (B, A, C),
        (A, C, B),
        (C, B, A),
        (A, A, B, C),
        (A, B, B, C),
        (A, B, C, C),
        (A, B, C, A),
        (STRANGER[0], B, C),
        (A, STRANGER[1], C),
        (A, B, C, *STRANGER),
        (*STRANGER, *THREE.sections),
    ],
)
def test_sections_that_are_missing_doubled_moved_or_of_another_manifest_are_refused(sections):
    with pytest.raises(ManifestError) as caught:
        Manifest.from_bytes(Manifest(sections).to_bytes(), "m")
    assert str(caught.value) == "m has lost a section, or got one from elsewhere. Restore it from a copy"


def test_a_section_whose_place_was_changed_with_it_does_not_verify():
    """Who takes one out and mends `earlier` of the next changes what its MAC is over."""
    moved = Manifest((A, replace(C, earlier=Manifest((A,)).digest())))
    assert Manifest.from_bytes(moved.to_bytes(), "m") == moved
    with pytest.raises(ManifestError, match="section 1 was changed"):
        verify(moved)


def test_the_last_section_is_the_one_that_nothing_else_tells_of():
    """docs/manifest.md says so: an older state of the manifest is as authentic as the newest."""
    older = Manifest.from_bytes(Manifest((A, B)).to_bytes(), "m")
    verify(older)


def test_the_last_section_that_names_a_path_counts():
    assert THREE.latest() == {
        "a": (1, ManifestEntry("3" * 32, 1)),
        "b": (2, None),
        "c": (2, ManifestEntry("4" * 32, 1)),
    }


def test_the_digest_is_over_the_macs():
    assert Manifest().digest() == hashlib.sha256(b"").digest()
    assert THREE.digest() == hashlib.sha256(A.mac + B.mac + C.mac).digest()
    assert [section.earlier for section in THREE.sections] == [
        hashlib.sha256(macs).digest() for macs in (b"", A.mac, A.mac + B.mac)
    ]


def test_no_data_key_is_shown():
    with DataKey(KEY, (FORM,)) as data_key:
        manifest = Manifest().with_section(data_key, {}, {})
        for shown in (repr(manifest), manifest.to_bytes().decode()):
            assert KEY.hex() not in shown


# -------------------------------------------------------------------------------- the vectors, and another program


def expand(key, info, size):
    """HKDF-Expand with SHA-512 (RFC 5869, 2.3)."""
    block = output = b""
    while len(output) < size:
        block = hmac.new(key, block + info + bytes([len(output) // 64 + 1]), "sha512").digest()
        output += block
    return output[:size]


def framed(part):
    return len(part).to_bytes(4, "big") + part


def mac_of(section, data_key):
    """Return the MAC of a section as docs/format.md, 11.3, has it, from the parsed JSON."""
    pairs = sorted((name.encode(), value.encode()) for name, value in section["context"].items())
    context = len(pairs).to_bytes(4, "big") + b"".join(framed(name) + framed(value) for name, value in pairs)
    bound = b"beam-envelope/manifest@v1\x00" + bytes.fromhex(section["section_id"].replace("-", "")) + context
    parts = [framed(bound), bytes.fromhex(section["data_key"]["key_id"]), bytes.fromhex(section["earlier"])]
    parts.append(len(section["shards"]).to_bytes(8, "big"))
    for path, shard in sorted((path.encode(), shard) for path, shard in section["shards"].items()):
        parts.append(framed(path))
        if shard is None:
            parts.append(b"\x00")
            continue
        parts.append(b"\x01" + bytes.fromhex(shard["shard_id"]))
        numbers = (shard[name] for name in ("stored_bytes", "plaintext_bytes", "records"))
        parts.extend(b"\xff" * 8 if number is None else number.to_bytes(8, "big") for number in numbers)
    return hmac.new(expand(data_key, bound, 32), b"".join(parts), "sha256").hexdigest()


@pytest.mark.parametrize("vector", MANIFESTS.values(), ids=MANIFESTS)
def test_another_program_computes_the_same_macs(vector):
    sections = json.loads(vector["manifest"])["sections"]
    earlier = hashlib.sha256()
    for section, material in zip(sections, vector["data_keys"], strict=True):
        data_key = bytes.fromhex(material)
        assert section["mac"] == mac_of(section, data_key)
        assert section["earlier"] == earlier.hexdigest()
        assert section["data_key"]["key_id"] == expand(data_key, b"beam-envelope/key-id@v1\x00", 16).hex()
        earlier.update(bytes.fromhex(section["mac"]))


@pytest.mark.parametrize("vector", MANIFESTS.values(), ids=MANIFESTS)
def test_we_read_write_and_verify_every_vector(vector, tmp_path):
    manifest = Manifest.from_bytes(vector["manifest"].encode(), "the vector")
    assert manifest.to_bytes() == vector["manifest"].encode() == written(json.loads(vector["manifest"]))
    for section, ring, material in zip(manifest.sections, vector["opened_by"], vector["data_keys"], strict=True):
        kms = keyring(tmp_path, ring)
        (form,) = filter(kms.may_open, section.data_key.wrapped_keys)
        with kms.unwrap(form, section.context) as data_key:
            assert data_key.material.hex() == material
            section.verify(data_key, "the vector")


def keyring(folder, name):
    path = folder / f"{name}.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(VECTORS["keyrings"][name]))
    return LocalKms(path)


def test_the_rotated_vector_differs_in_wrapped_forms_only():
    def without_forms(vector):
        document = copy.deepcopy(json.loads(vector["manifest"]))
        forms = [section["data_key"].pop("wrapped_keys") for section in document["sections"]]
        return document, forms

    (before, old), (after, new) = (without_forms(MANIFESTS[name]) for name in ("appended", "rotated"))
    assert before == after
    assert [a == b for a, b in zip(old, new, strict=True)] == [False, True, False]


@pytest.mark.parametrize("vector", REFUSALS.values(), ids=REFUSALS)
def test_we_refuse_a_changed_vector_with_the_error_that_the_page_names(vector):
    of = MANIFESTS[vector["of"]]
    assert vector["manifest"] != of["manifest"]

    def read():
        manifest = Manifest.from_bytes(vector["manifest"].encode(), "m")
        for section, material in zip(manifest.sections, of["data_keys"], strict=False):
            with DataKey(bytes.fromhex(material)) as data_key:
                section.verify(data_key, "m")

    with pytest.raises(EnvelopeError) as caught:
        read()
    assert type(caught.value).__name__ == vector["error"]


def test_the_page_shows_the_vector_that_it_names():
    blocks = [block.partition("\n")[2] for block in PAGE.read_text(encoding="utf-8").split("```")[1::2]]
    assert MANIFESTS["appended"]["manifest"] in blocks


def test_many_shards_take_little_memory():
    shards = {f"part-{number:05}.csv": ManifestEntry(uuid.uuid4().hex, 2000 + number, 1000) for number in range(20_000)}
    manifest = made(({}, shards))
    raw, peak = peak_of(manifest.to_bytes)
    assert peak < 1.7 * len(raw)
    read, peak = peak_of(lambda: Manifest.from_bytes(raw, "m"))
    assert peak < 4.5 * len(raw)
    assert read.entries() == shards
