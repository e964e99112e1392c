"""LocalKms and its keyring file."""

import base64
import json
import os
import pickle
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from beam_envelope.errors import FormatError, KeyAccessError, TamperedError, WrongKeyError
from beam_envelope.keys.local import LocalKms, generate_local_key

CONTEXT = {"dataset": "orders"}


@pytest.fixture
def wrapped(local_key):
    return local_key.generate_data_key(CONTEXT).wrapped_keys[0]


def message(error, call, *arguments):
    with pytest.raises(error) as caught:
        call(*arguments)
    assert type(caught.value) is error
    return str(caught.value)


def opened(key, form, context=None):
    with key.unwrap(form, CONTEXT if context is None else context) as data_key:
        return bytes(data_key.material)


def write_keyring(path, document, mode=0o600):
    path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    path.chmod(mode)
    return LocalKms(path)


# Data keys


def test_a_data_key_comes_back_from_its_wrapped_key(local_key):
    data_key = local_key.generate_data_key(CONTEXT)
    (form,) = data_key.wrapped_keys
    assert form.provider == "local-kms"
    assert local_key.may_open(form)
    assert opened(local_key, form) == data_key.material
    assert bytes(data_key.material) not in form.wrapped


def test_a_wrapped_key_is_nonce_ciphertext_and_tag_of_aes_gcm(local_key):
    data_key = local_key.generate_data_key(CONTEXT)
    (form,) = data_key.wrapped_keys
    (entry,) = json.loads(Path(local_key.path).read_bytes())["keys"]
    name = f"default/{entry['id']}".encode()
    aad = len(name).to_bytes(4, "big") + name + b"\0\0\0\1\0\0\0\7dataset\0\0\0\6orders"
    material = AESGCM(base64.b64decode(entry["key"])).decrypt(form.wrapped[:12], form.wrapped[12:], aad)
    assert material == data_key.material
    assert len(form.wrapped) == 12 + 32 + 16


def test_every_wrapped_form_has_its_own_nonce(local_key):
    data_key = local_key.generate_data_key(CONTEXT)
    nonces = {local_key.wrap(data_key, CONTEXT).wrapped[:12] for _ in range(50)}
    assert len(nonces) == 50


def test_another_context_or_a_changed_byte_does_not_open(local_key, wrapped):
    said = (
        f"the key {wrapped.kms_key} does not open the wrapped data key: the wrapped key or its encryption context was "
        "changed after it was written. Restore the key file from a copy"
    )
    for context in ({}, {"dataset": "other"}, {"datasetorders": "x"}, {**CONTEXT, "more": "x"}):
        assert message(TamperedError, local_key.unwrap, wrapped, context) == said
    for position in range(len(wrapped.wrapped)):
        changed = bytearray(wrapped.wrapped)
        changed[position] ^= 0x80
        assert message(TamperedError, local_key.unwrap, replace(wrapped, wrapped=bytes(changed)), CONTEXT) == said
    for size in range(len(wrapped.wrapped)):
        assert (
            message(TamperedError, local_key.unwrap, replace(wrapped, wrapped=wrapped.wrapped[:size]), CONTEXT) == said
        )


def test_an_authentic_blob_of_another_size_is_no_data_key(local_key, wrapped):
    (entry,) = json.loads(Path(local_key.path).read_bytes())["keys"]
    name = wrapped.kms_key.encode()
    aad = len(name).to_bytes(4, "big") + name + bytes(4)
    sealed = AESGCM(base64.b64decode(entry["key"])).encrypt(bytes(12), b"20 bytes of anything", aad)
    assert "does not open" in message(TamperedError, local_key.unwrap, replace(wrapped, wrapped=bytes(12) + sealed), {})


def test_rewrapping_moves_a_data_key_to_another_key_of_the_keyring(local_key, wrapped):
    new = LocalKms(local_key.path, "new")
    generate_local_key(new)
    form = local_key.rewrap(wrapped, CONTEXT, new)
    assert opened(new, form) == opened(local_key, wrapped)
    assert form.kms_key.startswith("new/")
    assert message(WrongKeyError, local_key.unwrap, form, CONTEXT) == (
        f"the data key was wrapped by local-kms key {form.kms_key}; {local_key} is {wrapped.kms_key}. "
        "Give the keyring and name that it was written with"
    )
    assert not local_key.may_open(form)


def test_a_key_of_the_same_name_in_another_keyring_is_another_key(local_key, wrapped, tmp_path):
    other = LocalKms(tmp_path / "other.json")
    generate_local_key(other)
    assert not other.may_open(wrapped)
    assert "Give the keyring and name" in message(WrongKeyError, other.unwrap, wrapped, CONTEXT)


def test_a_wrapped_key_of_another_provider_is_not_tried(local_key, wrapped):
    foreign = replace(wrapped, provider="aws-kms")
    assert not local_key.may_open(foreign)
    assert "wrapped by aws-kms key" in message(WrongKeyError, local_key.unwrap, foreign, CONTEXT)


def test_a_missing_keyring_may_open_what_its_name_wrapped_so_that_the_error_says_what_is_missing(wrapped, tmp_path):
    gone = LocalKms(tmp_path / "gone.json")
    assert gone.may_open(wrapped)
    assert not LocalKms(tmp_path / "gone.json", "other").may_open(wrapped)
    assert "there is no keyring" in message(KeyAccessError, gone.unwrap, wrapped, CONTEXT)


# The provider


def test_a_key_travels_to_workers_with_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key = LocalKms("keyring.json")
    generate_local_key(key)
    assert key.path == str(tmp_path / "keyring.json")
    form = key.generate_data_key(CONTEXT).wrapped_keys[0]
    monkeypatch.chdir("/")
    twin = pickle.loads(pickle.dumps(key))
    assert (twin, hash(twin)) == (key, hash(key))
    assert opened(twin, form) == opened(key, form)
    (entry,) = json.loads(Path(key.path).read_bytes())["keys"]
    assert base64.b64decode(entry["key"]) not in pickle.dumps(key)


def test_nothing_shows_the_key(local_key, wrapped):
    (entry,) = json.loads(Path(local_key.path).read_bytes())["keys"]
    shown = repr(local_key) + str(local_key) + repr(wrapped) + wrapped.kms_key
    assert entry["key"] not in shown
    assert wrapped.kms_key == f"default/{entry['id']}"


# The keyring file


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o666, 0o644])
def test_a_keyring_that_others_can_reach_is_refused(local_key, wrapped, mode):
    Path(local_key.path).chmod(mode)
    said = f"the keyring {local_key.path} can be read by others (mode {mode:04o}). Run: chmod 600 '{local_key.path}'"
    assert message(KeyAccessError, local_key.generate_data_key, CONTEXT) == said
    assert message(KeyAccessError, local_key.unwrap, wrapped, CONTEXT) == said
    assert message(KeyAccessError, generate_local_key, LocalKms(local_key.path, "more")) == said
    Path(local_key.path).chmod(0o400)
    assert opened(local_key, wrapped)


def test_a_new_keyring_is_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        generate_local_key(LocalKms(tmp_path / "keyring.json"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "keyring.json").stat().st_mode) == 0o600


def test_a_missing_keyring(tmp_path):
    path = tmp_path / "none.json"
    assert message(KeyAccessError, LocalKms(path).generate_data_key, CONTEXT) == (
        f"there is no keyring at {path}. Make one: beam-envelope keygen --key 'local-kms://{path}'"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_keyring_of_somebody_else(local_key):
    Path(local_key.path).chmod(0)
    assert "may not be read by this user" in message(KeyAccessError, local_key.generate_data_key, CONTEXT)


def test_what_is_no_file_is_no_keyring(tmp_path):
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "file" / "keyring.json", "Not a directory")):
        (tmp_path / "file").touch()
        assert message(KeyAccessError, LocalKms(path).generate_data_key, CONTEXT) == (
            f"the keyring {path} cannot be read ({why}). Name another, or make one: beam-envelope keygen"
        )


def test_a_name_that_the_keyring_lacks(local_key):
    key = LocalKms(local_key.path, "pii")
    assert message(KeyAccessError, key.generate_data_key, CONTEXT) == (
        f"the keyring {key.path} has no key named 'pii'. Make one: beam-envelope keygen --key "
        f"'local-kms://{key.path}?name=pii', or name one that it has"
    )


KEY = {"name": "default", "id": "1", "key": base64.b64encode(bytes(32)).decode(), "created": "2024-01-01T00:00:00Z"}
KEYRING = {"format": "beam-envelope keyring", "version": 1, "keys": [KEY]}


def test_the_smallest_keyring_that_is_one(tmp_path):
    write_keyring(tmp_path / "keyring.json", KEYRING).generate_data_key(CONTEXT)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"not JSON",
        b"\xff\xfe",
        b"[" * 100_000,
        b" " * (1 << 20) + b"{}",
        [],
        "keyring",
        None,
        {},
        {**KEYRING, "format": "other"},
        {**KEYRING, "version": 2},
        {**KEYRING, "keys": None},
        {**KEYRING, "keys": ["default"]},
        {**KEYRING, "keys": [{**KEY, "key": "short"}]},
        {**KEYRING, "keys": [{**KEY, "key": "not base64!"}]},
        {**KEYRING, "keys": [{**KEY, "key": base64.b64encode(bytes(16)).decode()}]},
        {**KEYRING, "keys": [{**KEY, "key": 3}]},
        {**KEYRING, "keys": [{**KEY, "name": 3}]},
        {**KEYRING, "keys": [{"name": "default", "id": "1"}]},
        {**KEYRING, "keys": [KEY, {**KEY, "name": "bad", "key": "bad"}]},
    ],
    ids=lambda document: str(document)[:50],
)
def test_a_file_of_another_kind_is_refused_without_showing_it(tmp_path, document):
    key = write_keyring(tmp_path / "keyring.json", document)
    said = f"{key.path} is not a keyring of version 1. Make one: beam-envelope keygen --key local-kms://NEW_PATH"
    with pytest.raises(FormatError) as caught:
        key.generate_data_key(CONTEXT)
    assert str(caught.value) == said
    assert caught.value.__context__ is None  # nothing that would show a part of the file
    before = Path(key.path).read_bytes()
    assert message(FormatError, generate_local_key, LocalKms(key.path, "new")) == said
    assert Path(key.path).read_bytes() == before


# Making keys


def test_a_keyring_grows_and_keeps_what_it_has(local_key, wrapped):
    material = opened(local_key, wrapped)
    full_name = generate_local_key(LocalKms(local_key.path, "pii"))
    assert full_name.startswith("pii/")
    names = [entry["name"] for entry in json.loads(Path(local_key.path).read_bytes())["keys"]]
    assert names == ["default", "pii"]
    assert opened(local_key, wrapped) == material
    assert LocalKms(local_key.path, "pii").generate_data_key({}).wrapped_keys[0].kms_key == full_name
    assert [path.name for path in Path(local_key.path).parent.iterdir()] == ["keyring.json"]


def test_a_key_is_never_replaced(local_key):
    before = Path(local_key.path).read_bytes()
    assert message(KeyAccessError, generate_local_key, local_key) == (
        f"the keyring {local_key.path} already has a key named 'default'; replacing it would make all that it wrapped "
        f"unreadable. Name another: beam-envelope keygen --key 'local-kms://{local_key.path}?name=NEW'"
    )
    assert Path(local_key.path).read_bytes() == before


def test_a_keyring_that_cannot_be_written_stays_as_it_is(local_key, monkeypatch):
    before = Path(local_key.path).read_bytes()
    monkeypatch.setattr("beam_envelope.keys.local.os.fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        generate_local_key(LocalKms(local_key.path, "new"))
    assert Path(local_key.path).read_bytes() == before
    assert [path.name for path in Path(local_key.path).parent.iterdir()] == ["keyring.json"]


def test_racing_processes_lose_no_key(tmp_path):
    path = tmp_path / "keyring.json"
    program = (
        "import sys; from beam_envelope.keys.local import LocalKms, generate_local_key\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for i in range(20): generate_local_key(LocalKms(sys.argv[1], sys.argv[2] + str(i)))\n"
        "try: generate_local_key(LocalKms(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", program, path, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in "ab"
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = sorted(racer.communicate()[0] for racer in racers)
    assert [racer.returncode for racer in racers] == [0, 0]
    names = [entry["name"] for entry in json.loads(path.read_bytes())["keys"]]
    assert sorted(names) == sorted(["default", *(f"{letter}{i}" for letter in "ab" for i in range(20))])
    assert said == ["", "KeyAccessError\n"]  # one of them made the default key, the other was told so
