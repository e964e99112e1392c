"""The stored vectors of records, and a reader that shares no code with the package, agree with it."""

import base64
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from beam_envelope import LocalKms, create_records
from beam_envelope.formats.dataset_key import DeterministicEncryptor
from beam_envelope.formats.keyfile import DETERMINISTIC_CIPHER, FERNET_CIPHER, RAW_CELL_CIPHER, KeyFile, key_file_name
from beam_envelope.formats.keystore import LocalKeyStore
from beam_envelope.formats.record import RecordDecryptor, record_place
from beam_envelope.keys.provider import DataKey
from tests.vectors import make_records

ROOT = Path(__file__).parents[2]
READER = ROOT / "docs" / "examples" / "read_record.py"
VECTORS = json.loads(make_records.TARGET.read_bytes())
KEYS = {entry["cipher"]: entry for entry in VECTORS["keys"]}
ENVELOPES = VECTORS["envelopes"]
CONTEXT = {"dataset": "vectors", "tenant": "a"}


@pytest.fixture
def laid_out(tmp_path):
    """A key store with the vectors' key files, and a keyring that opens them."""
    store = LocalKeyStore(tmp_path / "keys")
    for entry in VECTORS["keys"]:
        store.put(entry["key_id"], entry["key_file"].encode())
    path = tmp_path / "keyring.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(VECTORS["keyring"]))
    return store, LocalKms(str(path))


@pytest.fixture(scope="module")
def reader():
    spec = importlib.util.spec_from_file_location("read_record", READER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ids(vector):
    return f"{vector['cipher']}-{len(vector['plaintext']) // 2}-{vector['number']}-{vector['place'][:4]}"


@pytest.mark.parametrize("vector", ENVELOPES, ids=ids)
def test_every_envelope_opens(laid_out, vector):
    store, key = laid_out
    decryptor = RecordDecryptor([key], store, CONTEXT)
    envelope, place = (bytes.fromhex(vector[name]) for name in ("envelope", "place"))
    assert decryptor.decrypt(envelope, place).hex() == vector["plaintext"]


@pytest.mark.parametrize("vector", [vector for vector in ENVELOPES if vector["place"].startswith("00")], ids=ids)
def test_the_independent_reader_opens_every_record(laid_out, reader, vector):
    store, _ = laid_out
    aad = bytes.fromhex(vector["place"])[1:]
    found = reader.decrypt(bytes.fromhex(vector["envelope"]), Path(store.place), VECTORS["keyring"], aad)
    assert found.hex() == vector["plaintext"]


@pytest.mark.parametrize("cipher", KEYS)
def test_the_steps_on_the_way_are_those_of_the_vectors(cipher, reader):
    entry = KEYS[cipher]
    key_file = KeyFile.from_bytes(entry["key_file"].encode(), cipher)
    assert key_file.binding().hex() == entry["binding"]
    info = b"beam-envelope/record@v1\0" + bytes.fromhex(entry["salt"] + entry["binding"])
    derived = reader.expand(bytes.fromhex(entry["data_key"]), info, len(entry["derived"]) // 2)
    assert derived.hex() == entry["derived"]
    assert derived[-32:][:16].hex() == entry["key_id"]
    assert key_file.derivation.commitment == derived[-32:]
    with DataKey(bytes.fromhex(entry["data_key"])) as data_key:
        assert key_file.data_keys[0].key_id == data_key.key_id


def test_nonces_are_the_base_nonce_and_the_number():
    derived = bytes.fromhex(KEYS["record-aes-256-gcm"]["derived"])
    for vector in ENVELOPES:
        if vector["cipher"] == "record-aes-256-gcm":
            envelope, place = bytes.fromhex(vector["envelope"]), bytes.fromhex(vector["place"])
            nonce = (int.from_bytes(derived[32:44], "big") ^ vector["number"]).to_bytes(12, "big")
            sealed = AESGCM(derived[:32]).encrypt(nonce, bytes.fromhex(vector["plaintext"]), envelope[:17] + place)
            assert envelope == b"\xf8" + derived[44:60] + nonce + sealed


def test_the_keys_of_other_software_are_those_of_the_vectors(laid_out):
    store, key = laid_out
    decryptor = RecordDecryptor([key], store, CONTEXT)
    for cipher in (RAW_CELL_CIPHER, FERNET_CIPHER):
        found = decryptor.key(bytes.fromhex(KEYS[cipher]["key_id"]), cipher)
        assert found.raw_key().hex() == KEYS[cipher]["derived"][:64]


def test_deterministic_encryption_gives_the_vectors(laid_out):
    store, key = laid_out
    store.put("dataset", KEYS[DETERMINISTIC_CIPHER]["key_file"].encode())
    encryptor = DeterministicEncryptor([key], store, CONTEXT)
    for vector in ENVELOPES:
        if vector["cipher"] == DETERMINISTIC_CIPHER:
            found = encryptor.encrypt(bytes.fromhex(vector["plaintext"]), bytes.fromhex(vector["place"]))
            assert found.hex() == vector["envelope"]


# ----------------------------------------------------------------------------------------- the reader as a program


def read(store, keyring, envelope, *aad):
    return subprocess.run(
        [sys.executable, READER, store.place, keyring, *aad], input=envelope, capture_output=True, check=False
    )


def test_the_reader_reads_what_we_write_and_refuses_what_was_changed(tmp_path, local_key):
    context = {"ключ": "значение", "dataset": "a"}
    store = LocalKeyStore(tmp_path / "keys")
    randomized = create_records(key=local_key, keys=store, context=context).encrypt(b"4111", record_place(b"here"))
    deterministic = DeterministicEncryptor([local_key], store, context).encrypt(b"4111", record_place(b"here"))
    for envelope in (randomized, deterministic):
        done = read(store, local_key.path, envelope, "here")
        assert (done.returncode, done.stdout) == (0, b"4111"), done.stderr
        assert read(store, local_key.path, envelope).returncode == 1
    for changed in (randomized[:-1], b"\xf9" + randomized[1:], b"\xf8" + deterministic[1:], b"", b"text"):
        done = read(store, local_key.path, changed, "here")
        assert (done.returncode, done.stdout) == (1, b"")


def test_the_reader_refuses_every_changed_byte(laid_out, reader):
    store, _ = laid_out
    folder, keyring = Path(store.place), VECTORS["keyring"]
    vector = next(vector for vector in ENVELOPES if vector["place"] == "00" and len(vector["plaintext"]) == 32)
    envelope = bytes.fromhex(vector["envelope"])
    for at in range(len(envelope)):
        changed = bytearray(envelope)
        changed[at] ^= 1
        with pytest.raises(Exception):  # noqa: B017, PT011  # of any kind
            reader.decrypt(bytes(changed), folder, keyring)
    path = folder / key_file_name(vector["envelope"][2:34])
    raw = path.read_bytes()
    for at in range(0, len(raw), 7):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(Exception):  # noqa: B017, PT011
            reader.decrypt(envelope, folder, keyring)
    path.write_bytes(raw)
    assert reader.decrypt(envelope, folder, keyring).hex() == vector["plaintext"]


def test_the_keyring_is_that_of_the_shards():
    (entry,) = VECTORS["keyring"]["keys"]
    assert base64.b64decode(entry["key"]) == hashlib.sha256(b"beam-envelope test vector: writer").digest()


# ------------------------------------------------------------------------------------------------------- the guide


def test_the_examples_of_the_guide_run(tmp_path):
    text = (ROOT / "docs" / "records.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program = blocks[0] + next(block for block in blocks if "create_records" in block)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "4111 1111 1111 1111", "5500 0000 0000 0004"]
