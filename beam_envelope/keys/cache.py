"""The two process-wide caches: the current data key (write side) and unwrapped keys (read side).

Both are locked, bounded, limited in time and emptied after a fork. Every taker gets a copy that it erases itself, so an
entry that is dropped here takes no key from under a reader.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias, TypeVar, cast

from beam_envelope.errors import EnvelopeError, KmsUnavailableError, TamperedError, WrongKeyError
from beam_envelope.keys import aws, vault_server
from beam_envelope.keys.provider import DATA_KEY_BYTES, DataKey, KeyProvider, WrappedKey

UNWRAPPED_TTL_S: Final = 300.0
"""How long a reader goes on without asking the KMS again: the longest time until a revoked right takes effect."""
MAX_ENTRIES: Final = 1000
"""How many data keys each of the two caches holds at most."""
LEASED_BYTES: Final = 1 << 16
"""What a record that is counted in advance counts as, and may have at most."""

_Entry: TypeAlias = "tuple[tuple[KeyProvider, ...], tuple[tuple[str, str], ...], object]"


_Shared = TypeVar("_Shared", bound="Erasable")


@dataclass(frozen=True)
class DataKeyPolicy:
    """When the write side asks the KMS for a new data key.

    Args:
        reuse: `bundle`: each bundle has its own. `worker`: one for the process, until a limit is met; for unbounded
            input, whose bundles can hold a single element.
        max_age_s: seconds that a data key is used. Each process takes a random time between half of it and the whole,
            so that a thousand workers do not call the KMS in the same second.
        max_records: how many files or records one data key encrypts. 2**32 is the limit of NIST SP 800-38D 8.3.
        max_bytes: how many bytes one data key encrypts.
    """

    reuse: Literal["bundle", "worker"] = "bundle"
    max_age_s: float = 600.0
    max_records: int = 2**32
    max_bytes: int = 2**40

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.reuse not in {"bundle", "worker"}:
            msg = f"reuse is 'bundle' or 'worker', not {self.reuse!r}"
            raise ValueError(msg)
        if self.max_age_s <= 0 or not 0 < self.max_records <= 2**32 or self.max_bytes <= 0:
            msg = "max_age_s and max_bytes are above 0, and max_records is between 1 and 2**32"
            raise ValueError(msg)


class Allowance:
    """What is left of a data key's limits. Not safe between threads: its owner has a lock.

    Attributes:
        records: how many more.
        bytes: how many more; below 0 after one record that is larger than the whole limit.
        expires: the time, by `time.monotonic()`.
    """

    __slots__ = ("bytes", "expires", "records")

    def __init__(self, policy: DataKeyPolicy) -> None:
        """Start the clock."""
        self.records, self.bytes = policy.max_records, policy.max_bytes
        self.expires = time.monotonic() + policy.max_age_s * random.uniform(0.5, 1.0)  # noqa: S311  # jitter

    def fits(self, n_records: int, n_bytes: int) -> bool:
        """Whether so much is left; if not, a new data key is due."""
        return self.records >= n_records and self.bytes >= n_bytes and time.monotonic() < self.expires

    def spend(self, n_records: int, n_bytes: int) -> None:
        """Count so much."""
        self.records -= n_records
        self.bytes -= n_bytes

    def lease(self, n_records: int) -> int:
        """Count up to so many records in advance, of `LEASED_BYTES` each, and return how many."""
        leased = max(0, min(n_records, self.records, self.bytes // LEASED_BYTES))
        self.spend(leased, leased * LEASED_BYTES)
        return leased


class DataKeySource:
    """Hands out the current data key, and replaces it when a limit of its policy is met. Safe between threads.

    Args:
        keys: the KMS keys; the first generates, the others wrap the same data key, and any one opens it.
        context: the encryption context.
        policy: the limits.
    """

    def __init__(self, keys: Sequence[KeyProvider], context: Mapping[str, str], policy: DataKeyPolicy) -> None:
        """Make no call yet."""
        self._keys, self._context, self._policy = tuple(keys), dict(context), policy
        self._lock = threading.Lock()
        self._current: DataKey | None = None
        self._left = Allowance(policy)

    def take(self, n_bytes: int = 0, n_records: int = 1) -> DataKey:
        """Return a copy of the current data key, for `n_records` records of `n_bytes` in all; the taker closes it.

        Raises:
            KeyAccessError, KmsUnavailableError: from the KMS, when a new key is due.
        """
        with self._lock:
            if self._current is None or not self._left.fits(n_records, n_bytes):
                self._close()
                self._current = generate_data_key(self._keys, self._context)
                self._left = Allowance(self._policy)
            self._left.spend(n_records, n_bytes)
            return self._current.duplicate()

    def lease(self, n_records: int) -> tuple[int, float]:
        """Count records in advance for the data key that was just taken, so that its taker need not ask for each.

        Returns:
            How many, of at most `LEASED_BYTES` each; and until when, by `time.monotonic()`.
        """
        with self._lock:
            return (0 if self._current is None else self._left.lease(n_records)), self._left.expires

    def close(self) -> None:
        """Erase the current key."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._current is not None:
            self._current.close()
        self._current = None


def generate_data_key(keys: Sequence[KeyProvider], context: Mapping[str, str]) -> DataKey:
    """Have the first key generate a data key and each other key wrap it too.

    Raises:
        KeyAccessError, KmsUnavailableError: from any of the KMSs.
    """
    data_key = keys[0].generate_data_key(context)
    try:
        data_key.wrapped_keys += tuple(key.wrap(data_key, context) for key in keys[1:])
    except BaseException:
        data_key.close()
        raise
    return data_key


class Erasable(Protocol):
    """What holds keys, and can be told to drop them."""

    def close(self) -> None:
        """Drop the keys."""


class _Caches:
    """The state of this process, in one place so that a fork can start afresh."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.shared: OrderedDict[object, Erasable] = OrderedDict()
        self.unwrapped: OrderedDict[_Entry, tuple[float, DataKey]] = OrderedDict()
        self.in_flight: dict[_Entry, threading.Lock] = {}

    def close(self) -> None:
        """Erase every key; under the lock, since another thread may be copying one."""
        with self.lock:
            holders = list(self.shared.values())
            for _, data_key in self.unwrapped.values():
                data_key.close()
            self.shared.clear()
            self.unwrapped.clear()
        for holder in holders:  # outside of the lock: one may be waiting for it, with its own lock held
            holder.close()


_caches = _Caches()


def shared_source(keys: Sequence[KeyProvider], context: Mapping[str, str], policy: DataKeyPolicy) -> DataKeySource:
    """Return this process's one source for these keys, context and policy (`reuse="worker"`)."""
    entry = (tuple(keys), tuple(sorted(context.items())), policy)
    return shared(entry, lambda: DataKeySource(keys, context, policy))


def shared(entry: object, make: Callable[[], _Shared]) -> _Shared:
    """Return this process's one object for a hashable entry, and have it made if there is none.

    It is dropped, and its keys with it, by `clear_caches` and after a fork. Of more than a thousand, the one that was
    asked for longest ago is closed: it drops its keys, and who still holds it makes it take new ones.
    """
    with _caches.lock:
        pushed_out = []
        if entry not in _caches.shared:
            while len(_caches.shared) >= MAX_ENTRIES:
                pushed_out.append(_caches.shared.popitem(last=False)[1])
            _caches.shared[entry] = make()
        _caches.shared.move_to_end(entry)
        found = _caches.shared[entry]
    for holder in pushed_out:  # outside of the lock, as in `_Caches.close`
        holder.close()
    return cast("_Shared", found)


def unwrap(
    keys: Sequence[KeyProvider],
    wrapped_keys: Sequence[WrappedKey],
    context: Mapping[str, str],
    key_id: bytes | None,
    what: str,
) -> DataKey:
    """Return a data key, from the cache or through the first allowed key that opens one of its wrapped forms.

    The caller's keys decide which KMS key is asked, never the key file. Threads that need the same data key wait for
    one call.

    Args:
        keys: the allowed keys.
        wrapped_keys: the data key's wrapped forms.
        context: the encryption context that it is bound to.
        key_id: the id that the data key must turn out to have (`DataKey.key_id`), and 32 bytes with it. None: of what
            it opens, something else tells whether it is the right one.
        what: the shard or key file, for messages.

    Returns:
        A copy that the caller closes.

    Raises:
        WrongKeyError: no allowed key wrapped it.
        TamperedError, KeyAccessError, KmsUnavailableError: from the KMS.
    """
    entry = (tuple(keys), tuple(sorted(context.items())), (key_id, tuple(wrapped_keys)))
    caches = _caches
    with caches.lock:
        in_flight = caches.in_flight.setdefault(entry, threading.Lock())
    with in_flight:
        try:
            found = _cached(caches, entry)
            if found is None:
                found = _unwrap_any(keys, wrapped_keys, context, key_id, what)
                _remember(caches, entry, found)
            return found
        finally:
            with caches.lock:
                caches.in_flight.pop(entry, None)


def clear_caches() -> None:
    """Erase every cached data key and forget every KMS client of this process."""
    global _caches  # one swap, so that other threads see the old state or the new
    old, _caches = _caches, _Caches()
    old.close()
    aws.clear_clients()
    vault_server.clear_clients()


def _after_fork() -> None:
    """Start the child with empty caches; the parent's locks may be held, so they are not touched."""
    global _caches  # noqa: PLW0603
    _caches = _Caches()


os.register_at_fork(after_in_child=_after_fork)


def _cached(caches: _Caches, entry: _Entry) -> DataKey | None:
    with caches.lock:
        expires, data_key = caches.unwrapped.get(entry, (0.0, None))
        if data_key is None:
            return None
        if time.monotonic() >= expires:
            caches.unwrapped.pop(entry)
            data_key.close()
            return None
        caches.unwrapped.move_to_end(entry)
        return data_key.duplicate()


def _remember(caches: _Caches, entry: _Entry, data_key: DataKey) -> None:
    with caches.lock:
        caches.unwrapped[entry] = (time.monotonic() + UNWRAPPED_TTL_S, data_key.duplicate())
        while len(caches.unwrapped) > MAX_ENTRIES:
            _, (_, oldest) = caches.unwrapped.popitem(last=False)
            oldest.close()


def _unwrap_any(
    keys: Sequence[KeyProvider],
    wrapped_keys: Sequence[WrappedKey],
    context: Mapping[str, str],
    key_id: bytes | None,
    what: str,
) -> DataKey:
    failures: list[EnvelopeError] = []
    for key in keys:
        for wrapped in wrapped_keys:
            try:
                if not key.may_open(wrapped):
                    continue
                data_key = key.unwrap(wrapped, context)
            except EnvelopeError as error:
                failures.append(error)
                continue
            # Only messages of other software, which know no key ids, have shorter data keys.
            if key_id is not None and (len(data_key.material) != DATA_KEY_BYTES or data_key.key_id != key_id):
                data_key.close()
                msg = f"the key id in the key file of {what} is not that of its data key: the key file was changed"
                failures.append(TamperedError(msg))
                continue
            return data_key
    if not failures:
        under = ", ".join(wrapped.kms_key for wrapped in wrapped_keys)
        allowed = ", ".join(str(key) for key in keys)
        msg = f"{what} is encrypted under {under}; the keys allowed here are {allowed}. Give one that it is under"
        raise WrongKeyError(msg)
    # A KMS that is down may yet open it, so that is what the caller should hear; that a key is not the right one is
    # no news where several are allowed, so it comes last.
    failure = min(
        failures, key=lambda error: (not isinstance(error, KmsUnavailableError), isinstance(error, WrongKeyError))
    )
    raise type(failure)(f"{what} cannot be opened: {failure}")
