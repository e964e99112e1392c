"""Key stores away from the local disk, and the functions that open them without Beam."""

import errno
import pickle
import subprocess
import sys
import threading

import boto3
import pytest

from beam_envelope import (
    ANY_CONTEXT,
    DataKeyPolicy,
    create_dataset_key,
    create_records,
    open_key_store,
    open_records,
)
from beam_envelope.errors import ContextMismatchError, FormatError
from beam_envelope.formats.dataset_key import DeterministicEncryptor
from beam_envelope.formats.keystore import LocalKeyStore
from beam_envelope.io.keystore import RemoteKeyStore
from beam_envelope.keys.local import LocalKms, generate_local_key
from tests.io.test_store import disk  # noqa: F401  # a fixture
from tests.running import listing

CONTEXT = {"dataset": "orders"}


@pytest.fixture
def bucket(moto_server):
    """An empty bucket."""
    client = boto3.client("s3")
    client.create_bucket(Bucket="sealed")
    return client


def objects(client):
    return [entry["Key"] for entry in client.list_objects_v2(Bucket="sealed").get("Contents", [])]


# ------------------------------------------------------------------------------------------------------- which store


def test_a_folder_becomes_the_store_of_its_kind(tmp_path):
    assert open_key_store(str(tmp_path)) == open_key_store(tmp_path) == LocalKeyStore(tmp_path)
    assert (
        open_key_store("s3://sealed/keys") == open_key_store("s3://sealed/keys/") == RemoteKeyStore("s3://sealed/keys")
    )
    assert open_key_store("s3://sealed/keys").place == "s3://sealed/keys/"
    assert repr(open_key_store("gs://sealed/keys")) == "RemoteKeyStore('gs://sealed/keys/')"


def test_a_store_of_ones_own_is_taken(tmp_path):
    store = LocalKeyStore(tmp_path)
    assert open_key_store(store) is store


@pytest.mark.parametrize("keys", ["", "keys/*", "s3://sealed/*"])
def test_what_is_no_folder_is_refused(keys):
    with pytest.raises(ValueError, match=r"keys= is one folder for key files, such as s3://bucket/keys/, not"):
        open_key_store(keys)


@pytest.mark.parametrize("keys", [None, 3, ["keys"], b"keys"])
def test_what_is_no_store_is_refused(keys):
    with pytest.raises(TypeError, match="keys= is a folder or a KeyStore, not a"):
        open_key_store(keys)


def test_remote_stores_travel_and_are_equal_by_place():
    store = open_key_store("s3://sealed/keys")
    assert pickle.loads(pickle.dumps(store)) == store
    assert hash(pickle.loads(pickle.dumps(store))) == hash(store)
    assert store != open_key_store("s3://sealed/others")
    assert store != LocalKeyStore("s3://sealed/keys")


# --------------------------------------------------------------------------------------------------------------- S3


def test_a_key_file_on_s3_comes_back(bucket):
    store = open_key_store("s3://sealed/keys")
    assert store.get("a") is None
    store.put("a", b"one")
    store.put("a", b"two")
    assert store.get("a") == b"two"
    assert store.create_once("a", b"three") == b"two"
    assert store.create_once("b", b"four") == store.get("b") == b"four"
    assert objects(bucket) == ["keys/_KEY_FOR_a.json", "keys/_KEY_FOR_b.json"]


def test_of_many_threads_that_create_on_s3_all_get_the_same(bucket):
    store, barrier, found = open_key_store("s3://sealed/keys"), threading.Barrier(6), []

    def create(number):
        barrier.wait()
        found.append(store.create_once("a", b"%d" % number))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [store.get("a")] * 6


def test_who_loses_the_race_between_look_and_write_gets_the_winners(bucket, monkeypatch):
    store = open_key_store("s3://sealed/keys")
    store.put("a", b"winner")
    get, answers = RemoteKeyStore.get, [None]
    monkeypatch.setattr(RemoteKeyStore, "get", lambda self, name: answers.pop() if answers else get(self, name))
    assert store.create_once("a", b"loser") == b"winner"
    assert get(store, "a") == b"winner"


def test_jobs_that_race_on_s3_get_the_same_dataset_key(bucket, local_key):
    barrier, found = threading.Barrier(4), []

    def encrypt():
        store = open_key_store("s3://sealed/keys")
        barrier.wait()
        found.append(DeterministicEncryptor([local_key], store, CONTEXT).encrypt(b"4111"))

    threads = [threading.Thread(target=encrypt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(objects(bucket)) == 2
    assert open_records(key=local_key, keys="s3://sealed/keys", context=CONTEXT).decrypt(found[0]) == b"4111"


def test_records_with_their_keys_on_s3(bucket, local_key):
    records = create_records(key=local_key, keys="s3://sealed/keys", context=CONTEXT)
    envelopes = [records.encrypt(b"%d" % number) for number in range(5)]
    assert objects(bucket) == [f"keys/_KEY_FOR_{envelopes[0][1:17].hex()}.json"]
    opened = open_records(key=local_key, keys="s3://sealed/keys/", context=CONTEXT)
    assert [opened.decrypt(envelope) for envelope in envelopes] == [b"0", b"1", b"2", b"3", b"4"]


def test_no_envelope_comes_out_when_the_bucket_is_missing(moto_server, local_key):
    records = create_records(key=local_key, keys="s3://not-there/keys")
    with pytest.raises(OSError, match="not-there"):
        records.encrypt(b"4111")


# ------------------------------------------------------------------------------------------------------- other stores


@pytest.fixture
def elsewhere(disk):  # noqa: F811
    """A folder of another Beam filesystem."""
    return "test-disk://keys"


def test_a_store_that_cannot_create_once_says_what_to_do(elsewhere, local_key):
    with pytest.raises(
        OSError, match=r"Make the key beforehand, in one place, with create_dataset_key\(.*alone=True"
    ) as caught:
        create_dataset_key(key=local_key, keys=elsewhere)
    assert caught.value.errno == errno.ENOTSUP
    key_id = create_dataset_key(key=local_key, keys=elsewhere, alone=True)
    store = open_key_store(elsewhere)
    assert create_dataset_key(key=local_key, keys=elsewhere) == key_id
    assert store.create_once("dataset", b"x") == store.get("dataset")
    envelope = DeterministicEncryptor([local_key], store, {}).encrypt(b"4111")
    assert envelope[1:17].hex() == key_id
    assert open_records(key=local_key, keys=elsewhere).decrypt(envelope) == b"4111"


def test_randomised_records_need_no_such_thing(elsewhere, local_key):
    envelope = create_records(key=local_key, keys=elsewhere).encrypt(b"4111")
    assert open_records(key=local_key, keys=elsewhere).decrypt(envelope) == b"4111"


# ------------------------------------------------------------------------------------------------- without Beam


def test_uris_and_a_policy_are_taken(tmp_path, local_key):
    uri = f"local-kms://{local_key.path}"
    records = create_records(key=uri, keys=tmp_path / "keys", context=CONTEXT, policy=DataKeyPolicy(max_records=1))
    envelopes = [records.encrypt(b"x") for _ in range(3)]
    assert len(listing(tmp_path / "keys")) == 3
    for context in (CONTEXT, ANY_CONTEXT):
        opened = open_records(key=[uri], keys=str(tmp_path / "keys"), context=context)
        assert {opened.decrypt(envelope) for envelope in envelopes} == {b"x"}
    with pytest.raises(ContextMismatchError):
        open_records(key=uri, keys=str(tmp_path / "keys")).decrypt(envelopes[0])


def test_arguments_are_checked_at_once(local_key):
    for function in (create_records, open_records, create_dataset_key):
        with pytest.raises(FormatError, match="does not start with a scheme"):
            function(key="nonsense", keys="keys/")
        with pytest.raises(ValueError, match="no key was given"):
            function(key=[], keys="keys/")
        with pytest.raises(ValueError, match="reserves"):
            function(key=local_key, keys="keys/", context={"aws:x": "y"})
        with pytest.raises(ValueError, match="keys= is one folder"):
            function(key=local_key, keys="")


def test_a_dataset_key_is_found_again(tmp_path, local_key):
    key_id = create_dataset_key(key=local_key, keys=tmp_path, context=CONTEXT, name="cards")
    assert create_dataset_key(key=local_key, keys=tmp_path, context=CONTEXT, name="cards") == key_id
    assert create_dataset_key(key=local_key, keys=tmp_path, context=CONTEXT) != key_id
    other = LocalKms(local_key.path, "other")
    generate_local_key(other)
    envelope = DeterministicEncryptor([local_key], LocalKeyStore(tmp_path), CONTEXT, "cards").encrypt(b"4111")
    assert envelope[1:17].hex() == key_id


def test_a_local_key_store_does_not_bring_in_beam(tmp_path, local_key):
    program = (
        "import sys, beam_envelope as b\n"
        f"key, keys = 'local-kms://{local_key.path}', {str(tmp_path / 'keys')!r}\n"
        "envelope = b.create_records(key=key, keys=keys).encrypt(b'4111')\n"
        "assert b.open_records(key=key, keys=keys).decrypt(envelope) == b'4111'\n"
        "b.create_dataset_key(key=key, keys=keys)\n"
        "assert not any(name.startswith('apache_beam') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})
