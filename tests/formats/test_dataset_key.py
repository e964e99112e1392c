"""Deterministic encryption: equal where it should be, different where it should be, one key for all who race."""

import os
import threading
import uuid
from dataclasses import replace

import pytest

from beam_envelope.errors import (
    AlreadyEncryptedError,
    ContextMismatchError,
    FormatError,
    KeyAccessError,
    TamperedError,
    WrongKeyError,
)
from beam_envelope.formats.dataset_key import (
    DeterministicEncryptor,
    checked_key_name,
    create_dataset_key,
    create_named_key,
)
from beam_envelope.formats.keyfile import FERNET_CIPHER, KeyFile
from beam_envelope.formats.keystore import LocalKeyStore
from beam_envelope.formats.record import RecordDecryptor, RecordEncryptor, cell_place, record_place
from beam_envelope.keys.cache import DataKeyPolicy, clear_caches
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.keys.provider import kms_calls
from tests.children import Child
from tests.running import listing

CONTEXT = {"dataset": "orders"}


@pytest.fixture
def store(tmp_path):
    return LocalKeyStore(tmp_path / "keys")


def encryptor(key, store, context=CONTEXT, **settings):
    return DeterministicEncryptor([key], store, context, **settings)


def test_equal_records_have_equal_envelopes_also_of_another_process(local_key, store):
    one = encryptor(local_key, store).encrypt(b"4111")
    clear_caches()
    other = encryptor(local_key, LocalKeyStore(store.place))
    assert other.encrypt(b"4111") == one
    assert other.encrypt(b"4112") != one
    assert RecordDecryptor([local_key], store, CONTEXT).decrypt(one) == b"4111"


@pytest.mark.parametrize("record", [b"", b"x", b"y" * 100_000])
def test_an_envelope_has_33_bytes_more_than_the_record(local_key, store, record):
    envelope = encryptor(local_key, store).encrypt(record)
    assert len(envelope) == 33 + len(record)
    assert envelope[:1] == b"\xf9"
    assert RecordDecryptor([local_key], store, CONTEXT).decrypt(envelope) == record


def test_equal_records_differ_between_places_contexts_names_and_stores(local_key, store, tmp_path):
    places = [record_place(), record_place(b"a"), record_place(b"aa"), cell_place(""), cell_place("a")]
    one = encryptor(local_key, store)
    envelopes = [one.encrypt(b"4111", place) for place in places]
    envelopes += [
        encryptor(local_key, LocalKeyStore(tmp_path / "b")).encrypt(b"4111"),
        encryptor(local_key, LocalKeyStore(tmp_path / "c"), {"dataset": "c"}).encrypt(b"4111"),
        encryptor(local_key, store, name="second").encrypt(b"4111"),
    ]
    assert len({envelope[17:] for envelope in envelopes}) == len(envelopes)


def test_an_envelope_opens_at_its_place_only(local_key, store):
    envelope = encryptor(local_key, store).encrypt(b"4111", record_place(b"a"))
    decryptor = RecordDecryptor([local_key], store, CONTEXT)
    assert decryptor.decrypt(envelope, record_place(b"a")) == b"4111"
    for place in (record_place(), record_place(b"b"), cell_place("a")):
        with pytest.raises(TamperedError, match="comes from another place"):
            decryptor.decrypt(envelope, place)


def test_there_is_one_data_key_however_many_records(local_key, store):
    kms_calls.counts.clear()
    one = encryptor(local_key, store)
    for number in range(100):
        one.encrypt(b"%d" % number)
    assert kms_calls.counts == {"GenerateDataKey": 1, "Decrypt": 1}
    clear_caches()
    encryptor(local_key, store).encrypt(b"a")
    assert kms_calls.counts == {"GenerateDataKey": 1, "Decrypt": 2}


def test_the_key_lies_under_its_name_and_under_its_id(local_key, store):
    key_id = create_dataset_key([local_key], store, CONTEXT)
    assert listing(store.place) == sorted([f"_KEY_FOR_{key_id.hex()}.json", "_KEY_FOR_dataset.json"])
    assert store.get("dataset") == store.get(key_id.hex())
    assert create_dataset_key([local_key], store, CONTEXT) == key_id


def test_a_job_that_died_between_the_two_files_is_finished_by_the_next(local_key, store, tmp_path):
    class Dying(LocalKeyStore):
        def put(self, name, key_file):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        encryptor(local_key, Dying(store.place)).encrypt(b"a")
    assert listing(store.place) == ["_KEY_FOR_dataset.json"]
    envelope = encryptor(local_key, store).encrypt(b"a")
    assert RecordDecryptor([local_key], store, CONTEXT).decrypt(envelope) == b"a"


def test_no_envelope_comes_out_before_readers_find_the_key(local_key, store):
    class Failing(LocalKeyStore):
        def put(self, name, key_file):
            raise OSError(5, "Input/output error")

    one = encryptor(local_key, Failing(store.place))
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            one.encrypt(b"a")


def test_threads_that_race_get_the_same_key(local_key, store):
    barrier, found = threading.Barrier(8), []

    def create():
        barrier.wait()
        found.append(encryptor(local_key, store).encrypt(b"4111"))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_processes_that_race_get_the_same_key(local_key, store):
    reader, writer = os.pipe()

    def create():
        os.close(writer)
        os.read(reader, 1)  # until the parent closes its end
        return encryptor(local_key, store).encrypt(b"4111")

    children = [Child(create) for _ in range(4)]
    os.close(reader)
    os.close(writer)
    found = {child.result() for child in children}
    assert len(found) == 1
    assert RecordDecryptor([local_key], store, CONTEXT).decrypt(found.pop()) == b"4111"


# ------------------------------------------------------------------------------------------------ what is wrong


def test_a_key_of_another_context_or_kms_key_is_refused(local_key, store):
    other = LocalKms(local_key.path, "other")
    generate_local_key(other)
    create_dataset_key([local_key], store, CONTEXT)
    with pytest.raises(ContextMismatchError, match=r"the key _KEY_FOR_dataset\.json in .* written with another"):
        encryptor(local_key, store, {"dataset": "other"}).encrypt(b"a")
    with pytest.raises(WrongKeyError):
        encryptor(other, store).encrypt(b"a")


def test_a_kms_that_refuses_leaves_nothing(fake_kms, store):
    arn = fake_kms.create_key("etl")
    fake_kms.deny("GenerateDataKey")
    from beam_envelope import open_key

    with pytest.raises(KeyAccessError):
        encryptor(open_key(f"aws-kms://{arn}"), store).encrypt(b"a")
    assert listing(store.place) == []


def test_what_is_no_dataset_key_is_refused(local_key, store):
    create_named_key([local_key], store, CONTEXT, "dataset", FERNET_CIPHER)
    with pytest.raises(FormatError, match="is of the cipher fernet and named 'dataset': choose another name"):
        encryptor(local_key, store).encrypt(b"a")
    RecordEncryptor([local_key], store, CONTEXT, DataKeyPolicy()).encrypt(b"a")
    (name,) = [name for name in listing(store.place) if name != "_KEY_FOR_dataset.json"]
    raw = store.get(name.removeprefix("_KEY_FOR_").removesuffix(".json"))
    store.put("dataset", raw)
    with pytest.raises(FormatError, match="is of the cipher record-aes-256-gcm"):
        encryptor(local_key, store).encrypt(b"a")
    store.put("dataset", b"{}")
    with pytest.raises(FormatError, match="is not a readable key file"):
        encryptor(local_key, store).encrypt(b"a")


def test_a_key_under_the_name_of_another_is_refused(local_key, store):
    create_dataset_key([local_key], store, CONTEXT, "one")
    store.put("two", store.get("one"))
    with pytest.raises(FormatError, match="named 'one': choose another name"):
        encryptor(local_key, store, name="two").encrypt(b"a")


def test_a_forged_key_file_is_refused(local_key, store):
    create_dataset_key([local_key], store, CONTEXT)
    forged = replace(KeyFile.from_bytes(store.get("dataset"), "it"), shard_id=uuid.uuid4())
    store.put("dataset", forged.to_bytes())
    with pytest.raises(TamperedError):
        encryptor(local_key, store).encrypt(b"a")


@pytest.mark.parametrize(
    "name", ["", ".", "../x", "a/b", "ac2e8f5f8cad64f972a988f611766261", "a*", "x" * 101, "ü", "a\n"]
)
def test_names_that_are_none_are_refused(local_key, store, name):
    with pytest.raises(ValueError, match="the name of a key in a key store is up to 100 letters"):
        checked_key_name(name)
    with pytest.raises(ValueError, match="the name of a key"):
        create_dataset_key([local_key], store, CONTEXT, name)
    with pytest.raises(ValueError, match="the name of a key"):
        encryptor(local_key, store, name=name)


def test_what_is_an_envelope_already_is_refused(local_key, store):
    one = encryptor(local_key, store)
    with pytest.raises(AlreadyEncryptedError):
        one.encrypt(one.encrypt(b"a"))


def test_the_key_can_be_dropped_and_comes_again(local_key, store):
    one = encryptor(local_key, store)
    first = one.encrypt(b"a")
    one.close()
    assert one.encrypt(b"a") == first


def test_alone_works_where_a_store_cannot_create_once(local_key, tmp_path):
    class Plain(LocalKeyStore):
        def create_once(self, name, key_file):
            raise OSError(95, "cannot")

    store = Plain(tmp_path / "keys")
    with pytest.raises(OSError, match="cannot"):
        create_dataset_key([local_key], store, CONTEXT)
    key_id = create_dataset_key([local_key], store, CONTEXT, alone=True)
    assert create_dataset_key([local_key], store, CONTEXT) == key_id
    assert encryptor(local_key, store).encrypt(b"a")[1:17] == key_id
