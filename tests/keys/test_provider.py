"""DataKey keeps its bytes to itself; KeyProvider's shared parts."""

import copy
import gc
import pickle
import threading

import pytest
from cryptography.hazmat.primitives import hashes, hmac

from beam_envelope.keys.provider import DataKey, WrappedKey, as_sequence, kms_calls

MATERIAL = bytes(range(32))
WRAPPED = WrappedKey("aws-kms", "arn:aws:kms:us-east-1:111122223333:key/1", b"wrapped")


def test_leaving_the_block_overwrites_the_bytes():
    with DataKey(MATERIAL) as key:
        buffer = key.material
        assert buffer == MATERIAL
    assert buffer == bytes(32)
    assert key.closed
    with pytest.raises(ValueError, match=r"^this data key was erased$"):
        _ = key.material
    key.close()  # again does no harm


def test_an_exception_in_the_block_overwrites_the_bytes_too():
    key = DataKey(MATERIAL)
    buffer = key.material
    with pytest.raises(KeyError), key:
        raise KeyError
    assert buffer == bytes(32)


def test_a_forgotten_key_is_overwritten_when_it_is_collected():
    key = DataKey(MATERIAL)
    buffer = key.material
    del key
    gc.collect()
    assert buffer == bytes(32)


def test_a_key_copies_what_it_is_given():
    given = bytearray(MATERIAL)
    key = DataKey(given)
    given[:] = bytes(32)
    assert key.material == MATERIAL


def test_a_duplicate_lives_on_by_itself():
    key = DataKey(MATERIAL, [WRAPPED])
    twin = key.duplicate()
    key.close()
    assert twin.material == MATERIAL
    assert twin.wrapped_keys == (WRAPPED,)
    buffer = twin.material
    assert twin.key_id == DataKey(MATERIAL).key_id
    twin.close()
    assert buffer == bytes(32)
    with pytest.raises(ValueError, match="erased"):
        key.duplicate()


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"])
def test_a_key_does_not_travel(take):
    with pytest.raises(TypeError) as caught:
        take(DataKey(MATERIAL))
    assert str(caught.value) == (
        "a DataKey cannot be pickled or copied; send its wrapped keys and unwrap them where they are needed"
    )


def test_all_pickle_protocols_are_refused():
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(DataKey(MATERIAL), protocol)


def test_a_key_shows_its_id_and_its_kms_keys_and_no_byte():
    key = DataKey(MATERIAL, [WRAPPED])
    assert repr(key) == f"<DataKey {key.key_id.hex()} under [{WRAPPED.kms_key}]>"
    assert str(key) == repr(key)
    assert not hasattr(key, "__dict__")
    key.close()
    assert repr(key) == "<DataKey erased>"


def test_the_key_id_is_hkdf_expand_of_rfc5869_under_its_own_label():
    # RFC 5869 2.3 by hand: T(1) = HMAC(PRK, info | 0x01), cut to 16 bytes.
    mac = hmac.HMAC(MATERIAL, hashes.SHA512())
    mac.update(b"beam-envelope/key-id@v1\x00\x01")
    assert DataKey(MATERIAL).key_id == mac.finalize()[:16]
    assert DataKey(bytes(32)).key_id != DataKey(MATERIAL).key_id


@pytest.mark.parametrize("size", [0, 15, 17, 31, 33])
def test_a_data_key_has_the_length_of_an_aes_key(size):
    with pytest.raises(ValueError, match=f"^a data key has 16, 24 or 32 bytes; the KMS returned {size}$"):
        DataKey(bytes(size))


@pytest.mark.parametrize("size", [16, 24])
def test_the_shorter_data_keys_of_other_software_are_data_keys(size):
    key = DataKey(bytes([1]) * size)
    assert key.duplicate().material == bytes([1]) * size
    buffer = key.material
    key.close()
    assert buffer == bytes(size)


def test_each_thread_counts_its_own_kms_calls():
    kms_calls.counts["Decrypt"] += 1
    seen = []
    thread = threading.Thread(target=lambda: seen.append(dict(kms_calls.counts)))
    thread.start()
    thread.join()
    assert seen == [{}]


def test_check_makes_one_data_key_and_drops_it(local_key):
    before = kms_calls.counts["GenerateDataKey"]
    assert local_key.check({"a": "b"}) is None
    assert kms_calls.counts["GenerateDataKey"] == before + 1


def test_a_single_key_is_a_sequence_of_one():
    assert as_sequence("local-kms://a?b") == ("local-kms://a?b",)
    assert as_sequence(["a", "b"]) == ["a", "b"]
    assert as_sequence(("a",)) == ("a",)
