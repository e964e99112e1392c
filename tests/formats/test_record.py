"""The compact record envelope: what opens it, what does not, and that no nonce is ever used twice."""

import contextlib
import copy
import json
import os
import pickle
import random
import threading
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_envelope.errors import (
    AlreadyEncryptedError,
    ContextMismatchError,
    EnvelopeError,
    FormatError,
    KeyFileMissingError,
    NotEncryptedError,
    TamperedError,
    TruncatedError,
    WrongKeyError,
)
from beam_envelope.formats import record as record_module
from beam_envelope.formats.dataset_key import DeterministicEncryptor
from beam_envelope.formats.keyfile import RAW_CELL_CIPHER, RECORD_CIPHER, KeyFile
from beam_envelope.formats.keystore import LocalKeyStore
from beam_envelope.formats.record import (
    RecordDecryptor,
    RecordEncryptor,
    cell_place,
    check_envelope,
    record_place,
    refuse_envelope,
)
from beam_envelope.keys import cache
from beam_envelope.keys.cache import DataKeyPolicy, clear_caches
from beam_envelope.keys.context import ANY_CONTEXT
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.keys.provider import kms_calls
from tests.children import Child

CONTEXT = {"dataset": "orders"}


@pytest.fixture
def store(tmp_path):
    return LocalKeyStore(tmp_path / "keys")


@pytest.fixture
def encryptor(local_key, store):
    return RecordEncryptor([local_key], store, CONTEXT, DataKeyPolicy())


@pytest.fixture
def decryptor(local_key, store):
    return RecordDecryptor([local_key], store, CONTEXT)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(record_module.time, "monotonic", lambda: Clock.now)
    return Clock


def key_id(envelope):
    return envelope[1:17]


def key_and_nonce(envelope):
    return envelope[:29]


def assert_never_twice(envelopes):
    assert len({key_and_nonce(envelope) for envelope in envelopes}) == len(envelopes)


def numbers(envelopes, decryptor):
    """The number of each record under its key, from its nonce."""
    return [
        int.from_bytes(envelope[17:29], "big") ^ decryptor.key(key_id(envelope), RECORD_CIPHER).base_nonce
        for envelope in envelopes
    ]


# ------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 100, 1 << 20])
def test_a_record_comes_back_from_45_bytes_more(encryptor, decryptor, size):
    record = os.urandom(size)
    envelope = encryptor.encrypt(record)
    assert len(envelope) == size + 45
    assert envelope[:1] == b"\xf8"
    assert decryptor.decrypt(envelope) == record


@given(record=st.binary(max_size=200), aad=st.binary(max_size=50))
def test_any_record_comes_back_at_its_place(record, aad):
    encryptor, decryptor = shared_pair()
    assert decryptor.decrypt(encryptor.encrypt(record, record_place(aad)), record_place(aad)) == record


_pairs = {}


def shared_pair(folder=None):
    """One encryptor and decryptor for tests by hypothesis, which takes no fixtures of a function."""
    if not _pairs:
        import tempfile

        folder = tempfile.mkdtemp()
        key = LocalKms(f"{folder}/keyring.json")
        generate_local_key(key)
        store = LocalKeyStore(f"{folder}/keys")
        _pairs["pair"] = RecordEncryptor([key], store, {}, DataKeyPolicy()), RecordDecryptor([key], store, {})
    return _pairs["pair"]


def test_equal_records_have_different_envelopes(encryptor):
    assert_never_twice([encryptor.encrypt(b"4111") for _ in range(1000)])


def test_there_is_one_generate_and_one_decrypt_however_many_records_and_threads(fake_kms, store):
    from beam_envelope import open_key

    key = open_key(f"aws-kms://{fake_kms.create_key('etl')}")
    encryptor = RecordEncryptor([key], store, CONTEXT, DataKeyPolicy())
    envelopes = in_threads(8, lambda: [encryptor.encrypt(b"4111") for _ in range(200)])
    assert fake_kms.calls == {"GenerateDataKey": 1}
    decryptor = RecordDecryptor([key], store, CONTEXT)
    opened = in_threads(8, lambda: [decryptor.decrypt(envelope) for envelope in envelopes])
    assert opened == [b"4111"] * 8 * len(envelopes)
    assert fake_kms.calls == {"GenerateDataKey": 1, "Decrypt": 1}


def test_either_of_two_kms_keys_opens(local_key, store):
    other = LocalKms(local_key.path, "other")
    generate_local_key(other)
    envelope = RecordEncryptor([local_key, other], store, CONTEXT, DataKeyPolicy()).encrypt(b"4111")
    for key in (local_key, other):
        clear_caches()
        assert RecordDecryptor([key], store, CONTEXT).decrypt(envelope) == b"4111"


def test_a_rotated_key_file_opens_the_same_records(local_key, store, encryptor):
    other = LocalKms(local_key.path, "other")
    generate_local_key(other)
    envelope = encryptor.encrypt(b"4111")
    key_file = KeyFile.from_bytes(store.get(key_id(envelope).hex()), "it")
    (data_key,) = key_file.data_keys
    forms = (local_key.rewrap(data_key.wrapped_keys[0], CONTEXT, other),)
    store.put(key_id(envelope).hex(), key_file.with_wrapped_keys([replace(data_key, wrapped_keys=forms)]).to_bytes())
    clear_caches()
    assert RecordDecryptor([other], store, CONTEXT).decrypt(envelope) == b"4111"
    with pytest.raises(WrongKeyError):
        RecordDecryptor([local_key], store, CONTEXT).decrypt(envelope)


# ------------------------------------------------------------------------------------------------------- nonces


def in_threads(count, work):
    """Run `work` in threads and return all that they found; an error in one is an error here."""
    barrier, found, errors = threading.Barrier(count), [], []

    def run():
        barrier.wait()
        try:
            found.append(work())
        except Exception as error:  # noqa: BLE001  # it is raised below
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [item for items in found for item in items]


def test_threads_never_share_a_nonce(encryptor, decryptor, monkeypatch):
    import sys

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        envelopes = in_threads(8, lambda: [encryptor.encrypt(b"x") for _ in range(3000)])
    finally:
        sys.setswitchinterval(interval)
    assert_never_twice(envelopes)
    assert sorted(numbers(envelopes, decryptor)) == list(range(24_000))


def test_blocks_for_columns_and_single_records_share_no_number(encryptor, decryptor):
    key, first = encryptor.reserve(10, 100)
    (after,) = numbers([encryptor.encrypt(b"x")], decryptor)
    again, second = encryptor.reserve(5, 100)
    last = numbers([encryptor.encrypt(b"x") for _ in range(600)], decryptor)
    assert (first, after) == (0, 10)
    assert second > after
    assert not {*range(10), after, *range(second, second + 5)} & set(last)
    assert len(set(last)) == 600
    assert key is again


def test_a_block_larger_than_the_limit_is_refused(local_key, store):
    encryptor = RecordEncryptor([local_key], store, CONTEXT, DataKeyPolicy(max_records=10))
    with pytest.raises(ValueError, match="11 records do not fit under one key of 10"):
        encryptor.reserve(11, 1)


def test_a_forked_child_uses_another_key(encryptor, decryptor):
    before = [encryptor.encrypt(b"x") for _ in range(10)]
    child = Child(lambda: [encryptor.encrypt(b"x") for _ in range(100)])
    parent = [encryptor.encrypt(b"x") for _ in range(100)]
    found = child.result()
    assert_never_twice(before + parent + found)
    assert {key_id(envelope) for envelope in before + parent}.isdisjoint(map(key_id, found))
    assert {decryptor.decrypt(envelope) for envelope in found + parent} == {b"x"}


def test_a_forked_child_of_a_child_and_reserved_blocks_use_other_keys(encryptor):
    encryptor.encrypt(b"x")

    def grandchild():
        first = encryptor.reserve(10, 10)[1]
        inner = Child(lambda: (encryptor.reserve(10, 10)[1], encryptor._key.key_id))
        return first, encryptor._key.key_id, inner.result()

    first, child_id, (second, grandchild_id) = Child(grandchild).result()
    assert first == second == 0
    assert len({encryptor._key.key_id, child_id, grandchild_id}) == 3


def test_forks_while_another_thread_encrypts_neither_hang_nor_repeat(encryptor):
    running, stop, of_thread = threading.Event(), threading.Event(), []

    def work():
        while not stop.is_set():
            of_thread.append(encryptor.encrypt(b"x"))
            running.set()

    thread = threading.Thread(target=work)
    thread.start()
    running.wait()
    children, found = [], []
    try:
        for _ in range(20):
            children.append(Child(lambda: [encryptor.encrypt(b"x") for _ in range(20)]))
            found += [encryptor.encrypt(b"x") for _ in range(5)]
    finally:
        stop.set()
        thread.join()
    for child in children:
        found += child.result()
    assert_never_twice(of_thread + found)


def test_a_fork_while_the_lock_is_held_does_not_hang_the_child(encryptor, decryptor):
    envelope = encryptor.encrypt(b"x")
    decryptor.decrypt(envelope)
    with encryptor._lock, decryptor._lock:
        child = Child(lambda: decryptor.decrypt(encryptor.encrypt(b"y")))
        assert child.result() == b"y"


def test_a_fork_in_the_middle_of_a_record_neither_hangs_nor_repeats(encryptor, monkeypatch):
    found, children = [encryptor.encrypt(b"x")], []
    monotonic = record_module.time.monotonic

    def fork_and_tell_the_time():  # it is called with the lock held
        monkeypatch.setattr(record_module.time, "monotonic", monotonic)
        children.append(Child(lambda: [encryptor.encrypt(b"x") for _ in range(3)]))
        return monotonic()

    for _ in range(5):
        monkeypatch.setattr(record_module.time, "monotonic", fork_and_tell_the_time)
        found += [encryptor.encrypt(b"x") for _ in range(3)]
    assert len(children) == 5
    for child in children:
        found += child.result()
    assert_never_twice(found)


def test_encryptors_and_decryptors_do_not_travel(encryptor, decryptor):
    for one in (encryptor, decryptor):
        for travel in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be pickled or copied; make one where it is needed"):
                travel(one)


# ------------------------------------------------------------------------------------------------------- limits


def runs(envelopes):
    """How many envelopes in a row are under one key."""
    return [count for _, count in Counter(map(key_id, envelopes)).items()]


def test_max_records_rotates_and_never_wraps(local_key, store, decryptor):
    encryptor = RecordEncryptor([local_key], store, CONTEXT, DataKeyPolicy(max_records=3))
    envelopes = [encryptor.encrypt(b"x") for _ in range(10)]
    assert runs(envelopes) == [3, 3, 3, 1]
    assert numbers(envelopes, decryptor) == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert_never_twice(envelopes)


def test_max_records_holds_for_blocks_too(local_key, store):
    encryptor = RecordEncryptor([local_key], store, CONTEXT, DataKeyPolicy(max_records=10))
    found = [encryptor.reserve(count, 1) for count in (4, 6, 1, 9, 1)]
    assert [first for _, first in found] == [0, 4, 0, 1, 0]
    assert len({key.key_id for key, _ in found}) == 3


def test_the_largest_limit_is_that_of_nist(local_key, store):
    encryptor = RecordEncryptor([local_key], store, CONTEXT, DataKeyPolicy(max_records=2**32))
    key, _ = encryptor.reserve(2**32 - 1, 1)
    last = encryptor.encrypt(b"x")
    assert key_id(last) == key.key_id
    assert int.from_bytes(last[17:29], "big") ^ key.base_nonce == 2**32 - 1
    assert key_id(encryptor.encrypt(b"x")) != key.key_id
    with pytest.raises(ValueError, match="max_records is between 1 and"):
        DataKeyPolicy(max_records=2**32 + 1)


def test_max_bytes_rotates(local_key, store):
    encryptor = RecordEncryptor([local_key], store, CONTEXT, DataKeyPolicy(max_bytes=100))
    assert runs([encryptor.encrypt(bytes(30)) for _ in range(7)]) == [3, 3, 1]
    assert runs([encryptor.encrypt(bytes(500)) for _ in range(3)]) == [1, 1, 1]  # larger than the limit: one each


@pytest.mark.parametrize("jitter", [0.5, 0.75, 1.0])
def test_max_age_rotates_with_jitter(local_key, store, clock, monkeypatch, jitter):
    monkeypatch.setattr(cache.random, "uniform", lambda low, high: low + (high - low) * (jitter - 0.5) * 2)
    encryptor = RecordEncryptor([local_key], store, CONTEXT, DataKeyPolicy(max_age_s=600))
    first = encryptor.encrypt(b"x")
    clock.now += 600 * jitter - 1
    assert key_id(encryptor.encrypt(b"x")) == key_id(first)
    clock.now += 1
    assert key_id(encryptor.encrypt(b"x")) != key_id(first)


def test_a_closed_encryptor_takes_a_new_key(encryptor):
    first = encryptor.encrypt(b"x")
    encryptor.close()
    assert key_id(encryptor.encrypt(b"x")) != key_id(first)


# ------------------------------------------------------------------------------------------- the key file comes first


def test_the_key_file_is_durable_before_the_first_envelope_comes_out(local_key, tmp_path):
    events = []

    class Recording(LocalKeyStore):
        def put(self, name, key_file):
            events.append("put begins")
            super().put(name, key_file)
            events.append(f"durable {name}")

    encryptor = RecordEncryptor([local_key], Recording(tmp_path), CONTEXT, DataKeyPolicy(max_records=2))
    for _ in range(3):
        events.append(f"envelope {key_id(encryptor.encrypt(b'x')).hex()}")  # noqa: PERF401  # the order counts
    first, second = (event.split()[1] for event in (events[2], events[6]))
    assert events == [
        "put begins", f"durable {first}", f"envelope {first}", f"envelope {first}",
        "put begins", f"durable {second}", f"envelope {second}",
    ]  # fmt: skip


def test_no_envelope_comes_out_when_the_key_file_cannot_be_written(local_key, tmp_path):
    class Failing(LocalKeyStore):
        failing = True
        names = ()

        def put(self, name, key_file):
            self.names += (name,)
            if self.failing:
                raise OSError(28, "No space left on device")
            super().put(name, key_file)

    store = Failing(tmp_path)
    encryptor = RecordEncryptor([local_key], store, CONTEXT, DataKeyPolicy())
    for _ in range(3):
        with pytest.raises(OSError, match="No space left on device"):
            encryptor.encrypt(b"x")
        with pytest.raises(OSError, match="No space left on device"):
            encryptor.reserve(1, 1)
    store.failing = False
    envelope = encryptor.encrypt(b"x")
    assert key_id(envelope).hex() == store.names[-1]
    assert len(set(store.names)) == 7  # a key whose file may be lost is never used
    assert RecordDecryptor([local_key], store, CONTEXT).decrypt(envelope) == b"x"


def test_a_failing_rotation_does_not_go_on_with_the_old_key(local_key, tmp_path):
    class Failing(LocalKeyStore):
        left = 1

        def put(self, name, key_file):
            if not self.left:
                raise OSError(5, "Input/output error")
            self.left -= 1
            super().put(name, key_file)

    encryptor = RecordEncryptor([local_key], Failing(tmp_path), CONTEXT, DataKeyPolicy(max_records=2))
    encryptor.encrypt(b"x")
    encryptor.encrypt(b"x")
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output"):
            encryptor.encrypt(b"x")


def test_other_threads_wait_for_the_key_file(local_key, tmp_path):
    writing, go_on, found = threading.Event(), threading.Event(), []

    class Slow(LocalKeyStore):
        def put(self, name, key_file):
            writing.set()
            assert go_on.wait(60)
            super().put(name, key_file)

    encryptor = RecordEncryptor([local_key], Slow(tmp_path), CONTEXT, DataKeyPolicy())
    threads = [threading.Thread(target=lambda: found.append(encryptor.encrypt(b"x"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert writing.wait(60)
    for thread in threads:
        thread.join(0.02)
    assert found == []
    go_on.set()
    for thread in threads:
        thread.join()
    assert runs(found) == [4]


# ------------------------------------------------------------------------------------------- records in other places


def test_an_envelope_opens_only_at_its_place(encryptor, decryptor):
    places = [record_place(), record_place(b"a"), record_place(b"ab"), cell_place(""), cell_place("a")]
    for place in places:
        envelope = encryptor.encrypt(b"4111", place)
        assert decryptor.decrypt(envelope, place) == b"4111"
        for other in places:
            if other != place:
                with pytest.raises(TamperedError, match="comes from another place: another field or column, or other"):
                    decryptor.decrypt(envelope, other)


def test_places_are_ambiguous_in_no_way():
    assert record_place(b"a") == b"\x00a"
    assert cell_place("a") == b"\x01a"
    assert record_place() == b"\x00"


def test_a_record_of_another_key_store_has_no_key_file_there(encryptor, local_key, tmp_path):
    envelope = encryptor.encrypt(b"4111")
    other = LocalKeyStore(tmp_path / "others")
    with pytest.raises(KeyFileMissingError) as caught:
        RecordDecryptor([local_key], other, CONTEXT).decrypt(envelope)
    assert str(caught.value) == (
        f"there is no key file _KEY_FOR_{key_id(envelope).hex()}.json in {other.place}; without it nobody can open "
        "this record. Is keys= the key store that the writer had?"
    )


def test_of_many_records_without_a_key_file_only_the_first_asks_the_store(encryptor, local_key, tmp_path, clock):
    class Counting(LocalKeyStore):
        asked = 0

        def get(self, name):
            Counting.asked += 1
            return super().get(name)

    envelope, store = encryptor.encrypt(b"4111"), Counting(tmp_path / "others")
    decryptor = RecordDecryptor([local_key], store, CONTEXT)
    for _ in range(5):
        with pytest.raises(KeyFileMissingError):
            decryptor.decrypt(envelope)
    assert Counting.asked == 1
    store.put(key_id(envelope).hex(), LocalKeyStore(tmp_path / "keys").get(key_id(envelope).hex()))
    clock.now += 31
    assert decryptor.decrypt(envelope) == b"4111"  # but it may come


@pytest.mark.parametrize("context", [None, {}, {"dataset": "x"}, {**CONTEXT, "more": "x"}])
def test_another_context_is_refused_before_the_kms_is_asked(encryptor, local_key, store, context):
    envelope = encryptor.encrypt(b"4111")
    kms_calls.counts.clear()
    with pytest.raises(ContextMismatchError):
        RecordDecryptor([local_key], store, context).decrypt(envelope)
    assert kms_calls.counts == {}
    assert RecordDecryptor([local_key], store, ANY_CONTEXT).decrypt(envelope) == b"4111"


def test_records_under_one_key_do_not_change_places_unnoticed_only_when_bound(encryptor, decryptor):
    first, second = (encryptor.encrypt(text, record_place(text)) for text in (b"first", b"second"))
    with pytest.raises(TamperedError):
        decryptor.decrypt(first, record_place(b"second"))
    assert decryptor.decrypt(second, record_place(b"second")) == b"second"


def test_another_kms_key_does_not_open(encryptor, local_key, store):
    other = LocalKms(local_key.path, "other")
    generate_local_key(other)
    with pytest.raises(WrongKeyError):
        RecordDecryptor([other], store, CONTEXT).decrypt(encryptor.encrypt(b"4111"))


def test_keys_are_asked_for_again_after_their_time(encryptor, decryptor, clock):
    envelope = encryptor.encrypt(b"4111")
    decryptor.decrypt(envelope)
    kms_calls.counts.clear()
    clock.now += cache.UNWRAPPED_TTL_S - 1
    decryptor.decrypt(envelope)
    assert kms_calls.counts == {}
    clock.now += 60
    decryptor.decrypt(envelope)
    assert kms_calls.counts == {"Decrypt": 1}


def test_a_closed_decryptor_opens_again(encryptor, decryptor):
    envelope = encryptor.encrypt(b"4111")
    decryptor.decrypt(envelope)
    decryptor.close()
    assert decryptor.decrypt(envelope) == b"4111"


def test_many_keys_are_held_in_bounded_memory(encryptor, decryptor, monkeypatch):
    monkeypatch.setattr(record_module, "_MAX_OPENED", 5)
    envelopes = []
    for _ in range(12):
        envelopes.append(encryptor.encrypt(b"x"))
        encryptor.close()
    assert {decryptor.decrypt(envelope) for envelope in envelopes * 2} == {b"x"}
    assert len(decryptor._opened) <= 5
    assert len(record_module._prefixes) <= 5


# --------------------------------------------------------------------------------------------------- changed bytes


def test_every_flip_cut_and_extension_of_an_envelope_is_an_error(encryptor, local_key, store):
    envelope = encryptor.encrypt(b"4111 1111")
    known, fresh = (RecordDecryptor([local_key], store, CONTEXT) for _ in range(2))
    known.decrypt(envelope)
    for decryptor in (known, fresh):
        for at in range(len(envelope)):
            changed = bytearray(envelope)
            changed[at] ^= 1 << (at % 8)
            # The first byte may become that of the other suite.
            error = (TamperedError, KeyFileMissingError, NotEncryptedError)[at > 0 :] if at < 17 else TamperedError
            with pytest.raises(error):
                decryptor.decrypt(bytes(changed))
        for size in range(len(envelope)):
            error = NotEncryptedError if size == 0 else TruncatedError if size < 45 else TamperedError
            with pytest.raises(error):
                decryptor.decrypt(envelope[:size])
        for more in (b"\0", b"\xf8", bytes(16), envelope):
            with pytest.raises(TamperedError):
                decryptor.decrypt(envelope + more)
            with pytest.raises((NotEncryptedError, KeyFileMissingError)):
                decryptor.decrypt(b"\0" + envelope)
        assert decryptor.decrypt(envelope) == b"4111 1111"


def test_every_flip_and_cut_of_a_deterministic_envelope_is_an_error(local_key, store, decryptor):
    envelope = DeterministicEncryptor([local_key], store, CONTEXT).encrypt(b"4111 1111")
    for at in range(len(envelope)):
        for bit in range(8):
            changed = bytearray(envelope)
            changed[at] ^= 1 << bit
            with pytest.raises((KeyFileMissingError, NotEncryptedError, TruncatedError, TamperedError)):
                decryptor.decrypt(bytes(changed))
    for size in range(len(envelope)):
        error = NotEncryptedError if size == 0 else TruncatedError if size < 33 else TamperedError
        with pytest.raises(error):
            decryptor.decrypt(envelope[:size])
    with pytest.raises(TamperedError):
        decryptor.decrypt(envelope + b"\0")


def test_the_suite_byte_cannot_be_exchanged(local_key, store, encryptor):
    randomized = encryptor.encrypt(bytes(40))
    deterministic = DeterministicEncryptor([local_key], store, CONTEXT).encrypt(bytes(40))
    for envelope, other in ((randomized, b"\xf9"), (deterministic, b"\xf8")):
        for warm in (False, True):
            decryptor = RecordDecryptor([local_key], store, CONTEXT)
            if warm:
                decryptor.decrypt(envelope)
            with pytest.raises(TamperedError, match=r"is of the cipher record-aes-256-.* one of them was changed"):
                decryptor.decrypt(other + envelope[1:])


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", NotEncryptedError, r"known suite$"),
        (b"hello", NotEncryptedError, r"It looks like text; if it is base64 or hex, decode it first"),
        ("größe".encode(), NotEncryptedError, r"known suite$"),
        (b"\xf8", TruncatedError, r"this record has 1 bytes; an envelope has at least 45\. It was cut short"),
        (b"\xf9" + bytes(31), TruncatedError, r"this record has 32 bytes; an envelope has at least 33"),
        (b"\xfa" + bytes(100), NotEncryptedError, r"its first byte is not that of a known suite$"),
    ],
)
def test_what_is_no_envelope_is_told_apart(decryptor, data, error, message):
    for check in (check_envelope, decryptor.decrypt):
        with pytest.raises(error, match=message):
            check(data)


def test_random_bytes_raise_our_errors_only(local_key, store, encryptor):
    envelope = encryptor.encrypt(b"4111")
    key_file = store.get(key_id(envelope).hex())
    generator = random.Random(1)
    decryptor = RecordDecryptor([local_key], store, CONTEXT)
    decryptor.decrypt(envelope)
    starts = [b"", b"\xf8", b"\xf9", envelope[:17], b"\xf9" + envelope[1:17], envelope[1:17], key_file[:200]]
    for number in range(10_000):
        data = starts[number % len(starts)] + generator.randbytes(generator.choice((0, 1, 5, 16, 28, 29, 44, 60, 200)))
        if data[:29] == envelope[:29]:
            continue
        for parse in (decryptor.decrypt, lambda found: KeyFile.from_bytes(found, "it")):
            with pytest.raises(EnvelopeError):
                parse(data)
        with contextlib.suppress(NotEncryptedError, TruncatedError):
            check_envelope(data)


# --------------------------------------------------------------------------------------------------- forged key files


def forge(store, name, change):
    """Change a key file by way of its JSON, in the one encoding."""
    document = json.loads(store.get(name))
    change(document)
    store.put(name, json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n")


def set_in(*path):
    """Return a change of one field."""
    *parents, name, value = path

    def change(document):
        for parent in parents:
            document = document[parent]
        assert document[name] != value
        document[name] = value

    return change


FORM = ("data_keys", 0, "wrapped_keys", 0)
FORGERIES = {
    "format": (set_in("format", "x"), FormatError),
    "version": (set_in("version", 2), FormatError),
    "shard_id": (set_in("shard_id", "01fa36a3-6cd3-4d1d-8c4a-0c96844b4732"), TamperedError),
    "cipher": (set_in("cipher", "cell-aes-256-gcm"), TamperedError),
    "cipher of a shard": (set_in("cipher", "cobblestone-256"), FormatError),
    "unknown cipher": (set_in("cipher", "rot13"), FormatError),
    "compression": (set_in("content", "compression", "zstd"), TamperedError),
    "created": (set_in("content", "created", "2020-01-01T00:00:00Z"), TamperedError),
    "name": (set_in("content", "name", "x"), TamperedError),
    "salt": (set_in("derivation", "salt", "00" * 24), TamperedError),
    "short salt": (set_in("derivation", "salt", "00" * 23), FormatError),
    "commitment": (set_in("derivation", "commitment", "00" * 32), TamperedError),
    "short commitment": (set_in("derivation", "commitment", "00" * 16), FormatError),
    "no derivation": (lambda document: document.pop("derivation"), FormatError),
    "context": (set_in("context", "dataset", "others"), ContextMismatchError),
    "key id": (set_in("data_keys", 0, "key_id", "00" * 16), TamperedError),
    "provider": (set_in(*FORM, "provider", "aws-kms"), WrongKeyError),
    "KMS key": (set_in(*FORM, "kms_key", "default/" + "0" * 32), WrongKeyError),
    "wrapped key": (set_in(*FORM, "wrapped_key", "A" * 80), TamperedError),
    "two data keys": (lambda document: document["data_keys"].append(document["data_keys"][0]), FormatError),
    "no data key": (lambda document: document["data_keys"].clear(), FormatError),
    "more": (set_in("data_keys", [{"key_id": "00" * 16}]), FormatError),
}


@pytest.mark.parametrize("field", FORGERIES)
def test_a_forged_key_file_is_refused(encryptor, decryptor, store, field):
    envelope = encryptor.encrypt(b"4111")
    change, error = FORGERIES[field]
    forge(store, key_id(envelope).hex(), change)
    with pytest.raises(error, match="the key file _KEY_FOR_"):
        decryptor.decrypt(envelope)


def test_a_context_forged_for_who_takes_any_is_refused_by_the_kms(encryptor, local_key, store):
    envelope = encryptor.encrypt(b"4111")
    forge(store, key_id(envelope).hex(), set_in("context", "dataset", "others"))
    with pytest.raises(TamperedError):
        RecordDecryptor([local_key], store, ANY_CONTEXT).decrypt(envelope)


def test_the_key_file_of_another_in_its_place_is_refused(encryptor, decryptor, store):
    first = encryptor.encrypt(b"4111")
    encryptor.close()
    second = encryptor.encrypt(b"4111")
    store.put(key_id(first).hex(), store.get(key_id(second).hex()))
    with pytest.raises(TamperedError, match=f"is the key file of {key_id(second).hex()}: it was put in the place of"):
        decryptor.decrypt(first)
    assert decryptor.decrypt(second) == b"4111"


def test_a_dataset_key_in_the_place_of_a_records_key_is_refused(local_key, encryptor, decryptor, store):
    first = encryptor.encrypt(b"4111")
    DeterministicEncryptor([local_key], store, CONTEXT).encrypt(b"4111")
    store.put(key_id(first).hex(), store.get("dataset"))
    with pytest.raises(TamperedError, match="is of the cipher record-aes-256-siv, but what names it is of record-aes"):
        decryptor.decrypt(first)


def test_a_raw_cells_key_opens_no_envelope(local_key, store, decryptor):
    encryptor = RecordEncryptor([local_key], store, CONTEXT, DataKeyPolicy(), RAW_CELL_CIPHER)
    key, _ = encryptor.reserve(1, 1)
    assert decryptor.key(key.key_id, RAW_CELL_CIPHER).raw_key() == key.raw_key()  # it is in memory now
    nonce = bytes(12)
    forged = key.gcm.encrypt(nonce, b"4111", b"\xf8" + key.key_id + record_place())
    with pytest.raises(TamperedError, match="is of the cipher cell-aes-256-gcm"):
        decryptor.decrypt(b"\xf8" + key.key_id + nonce + forged)


# --------------------------------------------------------------------------------------------------- twice encrypted


def test_what_was_encrypted_or_opened_in_this_process_is_not_encrypted_again(local_key, store, tmp_path):
    policy, other = DataKeyPolicy(), LocalKeyStore(tmp_path / "others")
    writer = RecordEncryptor([local_key], store, CONTEXT, policy)
    envelope = writer.encrypt(b"4111")
    for store_of_second in (store, other):
        with pytest.raises(AlreadyEncryptedError, match="this record is an envelope already"):
            RecordEncryptor([local_key], store_of_second, CONTEXT, policy).encrypt(envelope)
    record_module._prefixes.clear()
    refuse_envelope(envelope)
    RecordDecryptor([local_key], store, CONTEXT).decrypt(envelope)
    with pytest.raises(AlreadyEncryptedError):
        refuse_envelope(envelope)


def test_records_that_only_begin_like_an_envelope_are_encrypted(encryptor, decryptor):
    for record in (b"\xf8", b"\xf9", b"\xf8" + bytes(100), b"\xf9" + bytes(16)):
        assert decryptor.decrypt(encryptor.encrypt(record)) == record
