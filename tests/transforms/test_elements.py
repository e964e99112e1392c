"""What the transforms over elements share: which keys a bundle gets, and what of a DoFn travels."""

import pickle
from dataclasses import replace

import apache_beam as beam
import pytest
from apache_beam.internal.cloudpickle import cloudpickle

from beam_envelope import ANY_CONTEXT, DataKeyPolicy
from beam_envelope.errors import EnvelopeError, FormatError, KeyAccessError, KmsUnavailableError, TamperedError
from beam_envelope.keys import cache
from beam_envelope.keys.provider import kms_calls
from beam_envelope.transforms.elements import (
    DEAD_LETTERS,
    FAILED,
    KeyUsingDoFn,
    failed_record,
    read_keys,
    write_keys,
)
from tests.children import Child

CONTEXT = {"dataset": "orders"}


@pytest.fixture
def keys(local_key, tmp_path):
    return write_keys(local_key, str(tmp_path / "keys"), CONTEXT, None)


class Bounded:
    """Stands in for a PCollection."""

    def __init__(self, is_bounded):
        self.is_bounded = is_bounded


def test_the_default_policy_follows_the_input(keys):
    assert keys.for_input(Bounded(True)).policy == DataKeyPolicy("bundle")
    assert keys.for_input(Bounded(False)).policy == DataKeyPolicy("worker")
    given = replace(keys, policy=DataKeyPolicy(max_records=7))
    assert given.for_input(Bounded(False)) is given


def test_a_bundle_has_an_encryptor_of_its_own_which_loses_its_key(keys):
    one, other = keys.encryptor(), keys.encryptor()
    assert one is not other
    first = one.encrypt(b"x")
    keys.release(one)
    assert one.encrypt(b"x")[:17] != first[:17]


def test_the_encryptor_of_a_process_lives_on(keys):
    keys = replace(keys, policy=DataKeyPolicy("worker"))
    one = keys.encryptor()
    first = one.encrypt(b"x")
    keys.release(one)
    assert keys.encryptor() is one
    assert one.encrypt(b"x")[:17] == first[:17]
    assert replace(keys, context=()).encryptor() is not one
    assert replace(keys, cipher="cell-aes-256-gcm").encryptor() is not one
    assert replace(keys, policy=DataKeyPolicy("worker", max_records=9)).encryptor() is not one


def test_a_forked_child_has_shared_encryptors_of_its_own(keys):
    keys = replace(keys, policy=DataKeyPolicy("worker"))
    first = keys.encryptor().encrypt(b"x")
    assert Child(lambda: keys.encryptor().encrypt(b"x")).result()[:17] != first[:17]


def test_deterministic_encryptors_and_decryptors_are_shared(keys, local_key, tmp_path):
    assert keys.deterministic() is keys.deterministic()
    assert keys.deterministic() is not replace(keys, dataset_key="second").deterministic()
    reading = read_keys(local_key, str(tmp_path / "keys"), CONTEXT)
    assert reading.decryptor() is reading.decryptor()
    assert reading.decryptor() is not read_keys(local_key, str(tmp_path / "keys"), ANY_CONTEXT).decryptor()
    kms_calls.counts.clear()
    envelope = keys.deterministic().encrypt(b"x")
    assert reading.decryptor().decrypt(envelope) == b"x"
    assert kms_calls.counts == {"GenerateDataKey": 1, "Decrypt": 1}


def test_settings_travel_and_are_equal(keys, local_key, tmp_path):
    for settings in (keys, read_keys(local_key, str(tmp_path), ANY_CONTEXT)):
        assert pickle.loads(pickle.dumps(settings)) == settings
        assert hash(pickle.loads(pickle.dumps(settings))) == hash(settings)


def test_arguments_are_checked_at_once(local_key):
    with pytest.raises(FormatError):
        write_keys("nonsense", "keys/", None, None)
    with pytest.raises(ValueError, match="the name of a key"):
        write_keys(local_key, "keys/", None, None, "a/b")
    with pytest.raises(ValueError, match="keys= is one folder"):
        read_keys(local_key, "", None)


class Counting(KeyUsingDoFn):
    """Keeps something that cannot travel."""

    def open(self):
        return {"lock": cache._caches.lock, "done": 0}

    def close(self, bundle):
        return {"records_encrypted": bundle["done"]}

    def process(self, element):
        self.bundle["done"] += 1
        return [element]


def test_what_belongs_to_a_bundle_does_not_travel():
    dofn = Counting()
    dofn.start_bundle()
    dofn.process(1)
    for travel in (pickle, cloudpickle):
        assert not hasattr(pickle.loads(travel.dumps(dofn)), "bundle")
    dofn.finish_bundle()
    assert not hasattr(dofn, "bundle")


def test_a_bundle_that_failed_leaves_nothing():
    dofn = Counting()
    dofn.start_bundle()
    dofn.teardown()
    assert not hasattr(dofn, "bundle")
    dofn.teardown()


def test_failed_records_name_the_error_and_what_it_was():
    output = failed_record(TamperedError("changed"), record_id="7", field="card", ciphertext=b"sealed")
    assert isinstance(output, beam.pvalue.TaggedOutput)
    assert output.tag == FAILED
    assert tuple(output.value) == ("7", "TamperedError", "changed", "card", b"sealed")
    assert failed_record(TamperedError("changed")).value.record_id != failed_record(TamperedError("")).value.record_id


def test_errors_of_the_kms_are_no_dead_letters():
    assert not issubclass(KeyAccessError, DEAD_LETTERS)
    assert not issubclass(KmsUnavailableError, DEAD_LETTERS)
    assert all(issubclass(error, EnvelopeError) for error in DEAD_LETTERS)
