"""The caches: how often the KMS is asked, for how long a key lives, and who waits for whom."""

import os
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from beam_envelope.errors import FormatError, KeyAccessError, KmsUnavailableError, TamperedError, WrongKeyError
from beam_envelope.keys import cache
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.cache import (
    DataKeyPolicy,
    DataKeySource,
    clear_caches,
    generate_data_key,
    shared_source,
    unwrap,
)
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.keys.provider import DataKey, KeyProvider, WrappedKey, kms_calls

CONTEXT = {"dataset": "orders"}


@dataclass(frozen=True)
class CountingKms(KeyProvider):
    """A KMS whose wrapped keys are the data keys themselves, and which counts over all threads."""

    name: str = "k"
    provider = "counting"
    calls: ClassVar = Counter()
    on_unwrap: ClassVar = []

    def generate_data_key(self, context):
        self.calls["generate"] += 1
        material = self.calls["generate"].to_bytes(32, "big")
        return DataKey(material, [WrappedKey(self.provider, self.name, material)])

    def wrap(self, data_key, context):
        self.calls["wrap"] += 1
        return WrappedKey(self.provider, self.name, bytes(data_key.material))

    def unwrap(self, wrapped, context):
        self.calls["unwrap"] += 1
        for action in self.on_unwrap:
            action(self)
        return DataKey(wrapped.wrapped, [wrapped])

    def rewrap(self, wrapped, context, to):
        raise NotImplementedError

    def may_open(self, wrapped):
        return wrapped.kms_key == self.name

    def __str__(self):
        return f"counting://{self.name}"


@pytest.fixture
def kms():
    CountingKms.calls.clear()
    CountingKms.on_unwrap.clear()
    return CountingKms()


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves, and jitter that takes the whole time."""

    class Clock:
        now = 1000.0
        jitter = 1.0

    monkeypatch.setattr(cache.time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(cache.random, "uniform", lambda low, high: low + (high - low) * Clock.jitter)
    return Clock


def ask(keys, data_key, context=None, what="part-0", key_id=None):
    """Unwrap through the cache."""
    context = CONTEXT if context is None else context
    return unwrap(keys, data_key.wrapped_keys, context, key_id or data_key.key_id, what)


# The read side


def test_a_data_key_is_unwrapped_once_for_many_readers(kms):
    data_key = kms.generate_data_key(CONTEXT)
    for _ in range(5):
        with ask([kms], data_key) as found:
            assert found.material == data_key.material
    assert kms.calls["unwrap"] == 1


def test_the_hits_are_seen_by_the_kms_too(fake_kms):
    fake_kms.create_key("etl")
    key = AwsKms("alias/etl")
    data_key = key.generate_data_key(CONTEXT)
    for _ in range(3):
        ask([key], data_key).close()
    assert fake_kms.calls == {"GenerateDataKey": 1, "Decrypt": 1}
    clear_caches()
    ask([key], data_key).close()
    assert fake_kms.calls["Decrypt"] == 2


def test_every_reader_has_a_copy_of_its_own(kms):
    data_key = kms.generate_data_key(CONTEXT)
    one, other = ask([kms], data_key), ask([kms], data_key)
    one.close()
    assert other.material == data_key.material
    assert ask([kms], data_key).material is not other.material


def test_another_key_context_or_wrapped_form_is_another_entry(kms):
    data_key = kms.generate_data_key(CONTEXT)
    ask([kms], data_key).close()
    ask([kms, CountingKms("more")], data_key).close()
    assert kms.calls["unwrap"] == 2
    ask([kms], data_key, {"dataset": "other"}).close()
    assert kms.calls["unwrap"] == 3
    again = DataKey(data_key.material, [*data_key.wrapped_keys, WrappedKey("counting", "z", b"")])
    ask([kms], again).close()
    assert kms.calls["unwrap"] == 4


def test_a_cached_key_does_not_serve_who_may_not_use_it(kms):
    data_key = kms.generate_data_key(CONTEXT)
    ask([kms], data_key).close()
    with pytest.raises(WrongKeyError):
        ask([CountingKms("other")], data_key)


def test_an_entry_lives_for_its_time_and_is_then_erased(kms, clock):
    data_key = kms.generate_data_key(CONTEXT)
    ask([kms], data_key).close()
    ((_, cached),) = cache._caches.unwrapped.values()
    clock.now += cache.UNWRAPPED_TTL_S - 1
    ask([kms], data_key).close()  # being read does not make it live longer
    assert kms.calls["unwrap"] == 1
    clock.now += 1
    ask([kms], data_key).close()
    assert kms.calls["unwrap"] == 2
    assert cached.closed


def test_the_cache_is_bounded_and_drops_what_was_not_used_for_longest(kms, monkeypatch):
    monkeypatch.setattr(cache, "MAX_ENTRIES", 3)
    data_keys = [kms.generate_data_key(CONTEXT) for _ in range(4)]
    held = [ask([kms], data_key) for data_key in data_keys[:3]]
    first, second, _ = [cached for _, cached in cache._caches.unwrapped.values()]
    ask([kms], data_keys[0]).close()  # now the second is the oldest
    ask([kms], data_keys[3]).close()
    assert len(cache._caches.unwrapped) == 3
    assert (first.closed, second.closed) == (False, True)
    assert held[1].material == data_keys[1].material  # what was taken stays whole
    kms.calls.clear()
    ask([kms], data_keys[0]).close()
    assert kms.calls["unwrap"] == 0
    ask([kms], data_keys[1]).close()
    assert kms.calls["unwrap"] == 1


def test_clearing_erases_what_is_cached_and_nothing_that_was_taken(kms):
    data_key = kms.generate_data_key(CONTEXT)
    taken = ask([kms], data_key)
    ((_, cached),) = cache._caches.unwrapped.values()
    buffer = cached.material
    clear_caches()
    assert cached.closed
    assert buffer == bytes(32)
    assert taken.material == data_key.material


def test_threads_that_need_the_same_key_wait_for_one_call(kms):
    data_key = kms.generate_data_key(CONTEXT)
    entered, go_on = threading.Event(), threading.Event()
    kms.on_unwrap.append(lambda _: (entered.set(), go_on.wait(10)))
    results = []
    threads = [threading.Thread(target=lambda: results.append(ask([kms], data_key))) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert entered.wait(10)
    go_on.set()
    for thread in threads:
        thread.join()
    assert kms.calls["unwrap"] == 1
    assert [found.material for found in results] == [data_key.material] * 8
    assert cache._caches.in_flight == {}


def test_threads_that_need_different_keys_do_not_wait_for_each_other(kms):
    one, other = kms.generate_data_key(CONTEXT), kms.generate_data_key(CONTEXT)
    both = threading.Barrier(2, timeout=10)
    kms.on_unwrap.append(lambda _: both.wait())
    thread = threading.Thread(target=lambda: ask([kms], one))
    thread.start()
    assert ask([kms], other).material
    thread.join()
    assert kms.calls["unwrap"] == 2


def test_a_failure_is_not_cached(kms):
    data_key = kms.generate_data_key(CONTEXT)

    def fail(_):
        raise KmsUnavailableError("down")

    kms.on_unwrap.append(fail)
    for _ in range(2):
        with pytest.raises(KmsUnavailableError, match=r"^part-0 cannot be opened: down$"):
            ask([kms], data_key)
    kms.on_unwrap.clear()
    assert ask([kms], data_key).material
    assert kms.calls["unwrap"] == 3
    assert cache._caches.in_flight == {}


def test_clearing_while_a_thread_unwraps_leaves_no_key_behind(kms):
    data_key = kms.generate_data_key(CONTEXT)
    kms.on_unwrap.append(lambda _: clear_caches())
    assert ask([kms], data_key).material == data_key.material
    assert len(cache._caches.unwrapped) == 0


def test_clearing_waits_for_a_thread_that_copies_a_key(kms, monkeypatch):
    data_key = kms.generate_data_key(CONTEXT)
    ask([kms], data_key).close()
    clearing = threading.Thread(target=clear_caches)
    duplicate = DataKey.duplicate

    def slow_duplicate(self):
        if not clearing.ident:
            clearing.start()
            clearing.join(0.2)  # it would finish, and erase the key, if it did not wait
        return duplicate(self)

    monkeypatch.setattr(DataKey, "duplicate", slow_duplicate)
    assert ask([kms], data_key).material == data_key.material
    clearing.join()


# Several keys on the read side


def test_any_allowed_key_that_wrapped_it_opens_it(kms):
    other = CountingKms("other")
    data_key = generate_data_key([kms, other], CONTEXT)
    assert [wrapped.kms_key for wrapped in data_key.wrapped_keys] == ["k", "other"]
    for keys in ([kms], [other], [CountingKms("third"), other], [kms, other]):
        clear_caches()
        kms.calls.clear()
        with ask(keys, data_key) as found:
            assert found.material == data_key.material
        assert kms.calls["unwrap"] == 1


def test_the_second_key_is_tried_when_the_first_is_out_of_order(kms, tmp_path):
    lost = LocalKms(tmp_path / "lost.json")
    generate_local_key(lost)
    data_key = generate_data_key([lost, kms], CONTEXT)
    for break_it in (
        lambda: os.chmod(lost.path, 0o644),
        lambda: os.truncate(lost.path, 5),
        lambda: os.unlink(lost.path),
    ):
        break_it()
        clear_caches()
        with ask([lost, kms], data_key) as found:
            assert found.material == data_key.material
        os.path.exists(lost.path) and os.chmod(lost.path, 0o600)
    with pytest.raises(KeyAccessError, match="there is no keyring"):
        ask([lost], data_key)


def test_a_keyring_that_is_none_says_so(tmp_path, kms):
    broken = LocalKms(tmp_path / "broken.json")
    generate_local_key(broken)
    data_key = broken.generate_data_key(CONTEXT)
    os.truncate(broken.path, 5)
    with pytest.raises(FormatError, match="is not a keyring"):
        ask([broken, kms], data_key)


def test_when_no_key_opens_it_the_failure_that_can_be_mended_is_told(fake_kms):
    fake_kms.create_key("ours")
    fake_kms.create_key("other")
    ours, other = AwsKms("alias/ours"), AwsKms("alias/other")
    data_key = ours.generate_data_key(CONTEXT)
    with pytest.raises(WrongKeyError, match="did not wrap this data key"):
        ask([other], data_key)
    fake_kms.deny("Decrypt", "alias/ours")
    with pytest.raises(KeyAccessError, match=r"^part-0 cannot be opened: not allowed to use KMS key alias/ours"):
        ask([other, ours], data_key)


def test_a_kms_that_is_down_is_told_before_all_else(kms):
    data_key = generate_data_key([kms, CountingKms("second"), CountingKms("third")], CONTEXT)
    errors = {"k": KeyAccessError("denied"), "second": KmsUnavailableError("down"), "third": TamperedError("changed")}

    def fail(key):
        raise errors[key.name]

    kms.on_unwrap.append(fail)
    with pytest.raises(KmsUnavailableError, match=r"^part-0 cannot be opened: down$"):
        ask([kms, CountingKms("second"), CountingKms("third")], data_key)


def test_no_allowed_key_is_told_with_all_names(kms):
    data_key = generate_data_key([kms, CountingKms("second")], CONTEXT)
    with pytest.raises(WrongKeyError) as caught:
        ask([CountingKms("a"), CountingKms("b")], data_key, what="out/part-3")
    assert str(caught.value) == (
        "out/part-3 is encrypted under k, second; the keys allowed here are counting://a, counting://b. "
        "Give one that it is under"
    )
    assert kms.calls["unwrap"] == 0


def test_a_data_key_with_another_id_is_refused_and_not_cached(kms):
    data_key = kms.generate_data_key(CONTEXT)
    for _ in range(2):
        with pytest.raises(TamperedError) as caught:
            ask([kms], data_key, key_id=bytes(16))
        assert str(caught.value) == (
            "part-0 cannot be opened: the key id in the key file of part-0 is not that of its data key: "
            "the key file was changed"
        )
    assert kms.calls["unwrap"] == 2


@pytest.mark.parametrize("size", [16, 24])
def test_a_data_key_with_an_id_has_32_bytes(kms, size):
    short = DataKey(bytes(size), [WrappedKey("counting", "k", bytes(size))])
    with pytest.raises(TamperedError, match="the key file was changed"):
        ask([kms], short)
    with unwrap([kms], short.wrapped_keys, CONTEXT, None, "part-0") as found:
        assert found.material == short.material
    with pytest.raises(TamperedError, match="the key file was changed"):
        ask([kms], short)  # also with a cache that holds it


def test_without_an_id_whatever_is_opened_is_taken_and_cached(kms):
    data_key = kms.generate_data_key(CONTEXT)
    for _ in range(2):
        with unwrap([kms], data_key.wrapped_keys, CONTEXT, None, "record 7") as found:
            assert found.material == data_key.material
    assert kms.calls["unwrap"] == 1
    with pytest.raises(TamperedError):
        ask([kms], data_key, key_id=bytes(16))


# The write side


def test_every_key_wraps_the_same_data_key(local_key, tmp_path):
    second = LocalKms(tmp_path / "second.json")
    generate_local_key(second)
    kms_calls.counts.clear()
    data_key = generate_data_key([local_key, second], CONTEXT)
    assert kms_calls.counts == {"GenerateDataKey": 1, "Encrypt": 1}
    for key, form in zip([local_key, second], data_key.wrapped_keys, strict=True):
        with key.unwrap(form, CONTEXT) as found:
            assert found.material == data_key.material


def test_a_key_that_cannot_wrap_leaves_no_data_key(kms, tmp_path, monkeypatch):
    made = []
    generate = CountingKms.generate_data_key
    monkeypatch.setattr(CountingKms, "generate_data_key", lambda *args: made.append(generate(*args)) or made[-1])
    with pytest.raises(KeyAccessError):
        generate_data_key([kms, LocalKms(tmp_path / "none.json")], CONTEXT)
    assert made[0].closed


def test_a_source_hands_out_copies_of_one_data_key(kms):
    source = DataKeySource([kms], CONTEXT, DataKeyPolicy())
    with source.take() as one, source.take() as other:
        assert one.material == other.material
        assert one.material is not other.material
    assert source.take().material
    assert kms.calls["generate"] == 1


def test_a_data_key_encrypts_no_more_than_its_records(kms):
    source = DataKeySource([kms], CONTEXT, DataKeyPolicy(max_records=3))
    ids = [source.take().key_id for _ in range(7)]
    assert [ids.index(key_id) for key_id in ids] == [0, 0, 0, 3, 3, 3, 6]
    assert source.take(n_records=2).key_id == ids[6]
    assert source.take().key_id not in ids


def test_a_data_key_encrypts_no_more_than_its_bytes(kms):
    source = DataKeySource([kms], CONTEXT, DataKeyPolicy(max_bytes=100))
    ids = [source.take(n_bytes).key_id for n_bytes in (40, 60, 1, 99, 1000, 1)]
    assert [ids.index(key_id) for key_id in ids] == [0, 0, 2, 2, 4, 5]  # one file may be larger than the limit


@pytest.mark.parametrize(("jitter", "age"), [(0.0, 300.0), (0.5, 450.0), (1.0, 600.0)])
def test_a_data_key_is_used_for_a_random_time_between_half_and_all_of_its_age(kms, clock, jitter, age):
    clock.jitter = jitter
    source = DataKeySource([kms], CONTEXT, DataKeyPolicy(max_age_s=600))
    first = source.take().key_id
    clock.now += age - 0.01
    assert source.take().key_id == first
    clock.now += 0.01
    assert source.take().key_id != first


def test_processes_choose_different_times():
    lifetimes = set()
    for _ in range(20):
        source = DataKeySource([CountingKms()], CONTEXT, DataKeyPolicy())
        before = time.monotonic()
        source.take().close()
        lifetimes.add(round(source._left.expires - before))
        assert 300 <= source._left.expires - before <= 601
    assert len(lifetimes) > 10


def test_a_replaced_or_closed_key_is_erased_and_what_was_taken_lives_on(kms):
    source = DataKeySource([kms], CONTEXT, DataKeyPolicy(max_records=1))
    taken = source.take()
    first = source._current
    source.take().close()
    second = source._current
    assert first.closed
    source.close()
    source.close()
    assert second.closed
    assert taken.material == (1).to_bytes(32, "big")
    assert source.take().material == (3).to_bytes(32, "big")


def test_a_source_serves_threads_within_its_limits(kms):
    source = DataKeySource([kms], CONTEXT, DataKeyPolicy(max_records=10))
    taken, lock = Counter(), threading.Lock()

    def take():
        for _ in range(50):
            with source.take() as data_key, lock:
                taken[data_key.key_id] += 1

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(taken.values()) == {10}
    assert kms.calls["generate"] == 20


def test_a_source_that_cannot_replace_its_key_does_not_go_on_with_the_old_one(kms, monkeypatch):
    source = DataKeySource([kms], CONTEXT, DataKeyPolicy(max_records=1))
    source.take().close()

    def fail(*_):
        raise KmsUnavailableError("down")

    with monkeypatch.context() as down:
        down.setattr(CountingKms, "generate_data_key", fail)
        with pytest.raises(KmsUnavailableError):
            source.take()
    assert source.take().material == (2).to_bytes(32, "big")


def test_a_process_has_one_source_for_each_key_context_and_policy(kms):
    policy = DataKeyPolicy("worker")
    source = shared_source([kms], {"a": "1", "b": "2"}, policy)
    assert shared_source([CountingKms()], {"b": "2", "a": "1"}, DataKeyPolicy("worker")) is source
    assert shared_source([CountingKms("other")], {"a": "1", "b": "2"}, policy) is not source
    assert shared_source([kms], {"a": "1"}, policy) is not source
    assert shared_source([kms], {"a": "1", "b": "2"}, replace(policy, max_records=1)) is not source


def test_the_shared_sources_are_bounded(kms, monkeypatch):
    monkeypatch.setattr(cache, "MAX_ENTRIES", 2)
    sources = [shared_source([kms], {"n": str(number)}, DataKeyPolicy()) for number in range(3)]
    assert len(cache._caches.shared) == 2
    assert shared_source([kms], {"n": "2"}, DataKeyPolicy()) is sources[2]
    assert shared_source([kms], {"n": "0"}, DataKeyPolicy()) is not sources[0]
    assert sources[0].take().material  # who holds it still may use it


def test_clearing_erases_the_keys_of_shared_sources(kms):
    source = shared_source([kms], CONTEXT, DataKeyPolicy())
    source.take().close()
    current = source._current
    clear_caches()
    assert current.closed
    assert shared_source([kms], CONTEXT, DataKeyPolicy()) is not source


@pytest.mark.parametrize(
    "settings",
    [{"max_age_s": 0}, {"max_age_s": -1}, {"max_records": 0}, {"max_records": 2**32 + 1}, {"max_bytes": 0}],
)
def test_limits_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="max_age_s and max_bytes are above 0, and max_records is between 1 and 2"):
        DataKeyPolicy(**settings)
    with pytest.raises(ValueError, match="reuse is 'bundle' or 'worker', not 'ever'"):
        DataKeyPolicy("ever")


# Forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_starts_with_empty_caches_even_if_a_lock_was_held(kms):
    data_key = kms.generate_data_key(CONTEXT)
    ask([kms], data_key).close()
    shared_source([kms], CONTEXT, DataKeyPolicy("worker")).take().close()
    with cache._caches.lock:  # as another thread of the parent might hold it
        child = os.fork()
        if not child:
            signal.alarm(20)  # a child that waits for a lock must not wait for ever
            try:
                assert (len(cache._caches.unwrapped), len(cache._caches.shared)) == (0, 0)
                assert ask([kms], data_key).material == data_key.material
                assert kms.calls["unwrap"] == 2
                assert shared_source([kms], CONTEXT, DataKeyPolicy("worker")).take().material == (3).to_bytes(32, "big")
                os._exit(0)
            except BaseException:  # noqa: BLE001  # a child of a test must not go on as a test
                os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert ask([kms], data_key).material  # the parent's caches are as they were
    assert kms.calls["unwrap"] == 1
