"""The keys of records: derived as docs/format.md says, checked against the key file, and never let out."""

import copy
import hashlib
import hmac
import pickle
import uuid
from dataclasses import replace

import pytest

from beam_envelope.errors import FormatError, TamperedError
from beam_envelope.formats.keyfile import (
    DERIVED_CIPHERS,
    DETERMINISTIC_CIPHER,
    FERNET_CIPHER,
    RAW_CELL_CIPHER,
    RECORD_CIPHER,
    SHARD_CIPHER,
    Derivation,
    KeyFile,
)
from beam_envelope.formats.record_key import new_record_key, open_record_key
from beam_envelope.keys.provider import DataKey, WrappedKey

CONTEXT = {"dataset": "orders"}
DATA_KEY = bytes(range(32))


@pytest.fixture
def data_key():
    return DataKey(DATA_KEY, [WrappedKey("local-kms", "default/1", b"wrapped")])


def expand(key, info, size):
    """HKDF-Expand with SHA-512, RFC 5869, 2.3."""
    found, block = b"", b""
    for number in range(1, -(-size // 64) + 1):
        block = hmac.new(key, block + info + bytes([number]), hashlib.sha512).digest()
        found += block
    return found[:size]


@pytest.mark.parametrize("cipher", DERIVED_CIPHERS)
def test_key_nonce_and_commitment_are_those_of_the_page(data_key, cipher):
    key, key_file = new_record_key(data_key, CONTEXT, cipher, "a name")
    parts = (key_file.shard_id.bytes, cipher.encode(), b"none", key_file.created.encode(), b"a name")
    pair = (b"dataset", b"orders")
    binding = b"beam-envelope/shard@v1\0" + b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    binding += (1).to_bytes(4, "big") + b"".join(len(part).to_bytes(4, "big") + part for part in pair)
    size = 64 if cipher == DETERMINISTIC_CIPHER else 32
    derived = expand(DATA_KEY, b"beam-envelope/record@v1\0" + key_file.derivation.salt + binding, size + 12 + 32)
    assert key_file.derivation.commitment == derived[size + 12 :]
    assert key.key_id == derived[size + 12 :][:16]
    assert key.base_nonce == int.from_bytes(derived[size : size + 12], "big")
    if cipher in {RAW_CELL_CIPHER, FERNET_CIPHER}:
        assert key.raw_key() == derived[:32]
        assert key.prefix == b""
    else:
        assert key.prefix == {RECORD_CIPHER: b"\xf8", DETERMINISTIC_CIPHER: b"\xf9"}[cipher] + key.key_id


def test_each_key_of_a_data_key_is_another(data_key):
    keys = [new_record_key(data_key, CONTEXT, RAW_CELL_CIPHER)[0] for _ in range(20)]
    assert len({key.raw_key() for key in keys}) == len({key.key_id for key in keys}) == 20
    assert len({key.base_nonce for key in keys}) == 20


@pytest.mark.parametrize("cipher", DERIVED_CIPHERS)
def test_a_key_file_leads_to_the_same_key_again(data_key, cipher):
    key, key_file = new_record_key(data_key, CONTEXT, cipher, "a name")
    again = open_record_key(data_key, KeyFile.from_bytes(key_file.to_bytes(), "it"), "it")
    assert (again.key_id, again.base_nonce, again.prefix) == (key.key_id, key.base_nonce, key.prefix)
    if cipher in {RAW_CELL_CIPHER, FERNET_CIPHER}:
        assert again.raw_key() == key.raw_key()
    elif cipher == RECORD_CIPHER:
        assert again.gcm.decrypt(bytes(12), key.gcm.encrypt(bytes(12), b"text", None), None) == b"text"
    else:
        assert again.siv.decrypt(key.siv.encrypt(b"text", None), None) == b"text"


def changes(key_file):
    """Every field that the derivation binds, changed; the other cipher makes the commitment another too."""
    salt, commitment = key_file.derivation.salt, key_file.derivation.commitment
    return {
        "shard_id": {"shard_id": uuid.uuid4()},
        "cipher": {"cipher": RAW_CELL_CIPHER},
        "compression": {"compression": "zstd"},
        "name": {"name": "x"},
        "created": {"created": "2020-01-01T00:00:00Z"},
        "context": {"context": {"dataset": "others"}},
        "salt": {"derivation": Derivation(bytes(24), commitment)},
        "commitment": {"derivation": Derivation(salt, commitment[:-1] + bytes([commitment[-1] ^ 1]))},
    }


@pytest.mark.parametrize(
    "field", ["shard_id", "cipher", "compression", "name", "created", "context", "salt", "commitment"]
)
def test_a_changed_key_file_does_not_lead_to_a_key(data_key, field):
    _, key_file = new_record_key(data_key, CONTEXT, RECORD_CIPHER)
    with pytest.raises(TamperedError, match=r"^the file was changed after it was written\. Restore it from a copy$"):
        open_record_key(data_key, replace(key_file, **changes(key_file)[field]), "the file")


def test_another_data_key_does_not_lead_to_a_key(data_key):
    _, key_file = new_record_key(data_key, CONTEXT, RECORD_CIPHER)
    with pytest.raises(TamperedError):
        open_record_key(DataKey(bytes(32)), key_file, "the file")


def test_the_key_file_of_a_shard_is_none_of_records(data_key):
    _, key_file = new_record_key(data_key, CONTEXT, RECORD_CIPHER)
    shard = replace(key_file, cipher=SHARD_CIPHER, derivation=None)
    with pytest.raises(FormatError, match="the file is of the cipher cobblestone-256, which is none of records"):
        open_record_key(data_key, shard, "the file")


@pytest.mark.parametrize("cipher", DERIVED_CIPHERS)
def test_keys_neither_travel_nor_show(data_key, cipher):
    key, _ = new_record_key(data_key, CONTEXT, cipher)
    for travel in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="a RecordKey cannot be pickled or copied"):
            travel(key)
    assert repr(key) == f"<RecordKey {key.key_id.hex()}>"
    assert not hasattr(key, "__dict__")


@pytest.mark.parametrize("cipher", [RECORD_CIPHER, DETERMINISTIC_CIPHER])
def test_the_bytes_of_keys_that_only_we_use_cannot_be_taken_out(data_key, cipher):
    key, _ = new_record_key(data_key, CONTEXT, cipher)
    with pytest.raises(ValueError, match=r"only the keys of raw cells .* and of Fernet can be taken out"):
        key.raw_key()
    assert key._key == b""
