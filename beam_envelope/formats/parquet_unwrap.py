"""The keys of a Parquet file that is read: which KMS key is asked for which, when, and what it answered before."""

from __future__ import annotations

import abc
import time
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from beam_envelope.errors import EnvelopeError, KeyAccessError, KmsUnavailableError, WrongKeyError
from beam_envelope.formats.keyfile import KeyFile
from beam_envelope.formats.parquet_keys import LocalClient, decode_columns
from beam_envelope.keys import cache
from beam_envelope.keys.provider import DataKey, KeyProvider, WrappedKey

DENIAL_TTL_S: Final = 60.0
"""How long a reader that goes on without denied columns does not ask the KMS for them again."""


class _Client(Protocol):
    failure: EnvelopeError | None

    def add(self, number: int, data_key: DataKey) -> None:
        """Take a key that was unwrapped, which may be closed afterwards."""


class Keys(abc.ABC):
    """The keys of one file that a KMS wrapped, each unwrapped when a column under it is first wanted.

    Attributes:
        client: what pyarrow asks.
    """

    def __init__(self, keys: Sequence[KeyProvider], context: Mapping[str, str], what: str, client: _Client) -> None:
        """Make no call yet."""
        self._keys, self._context, self._what, self.client = tuple(keys), dict(context), what, client
        self._wrapped: list[tuple[bytes | None, tuple[WrappedKey, ...]]] = []  # key ids, where known, and forms
        self._denied: dict[int, EnvelopeError] = {}
        self._open: set[int] = set()
        self._memory = cache.shared(_Memory, _Memory)

    @abc.abstractmethod
    def assign(self, entry: bytes | None, leaves: Sequence[str]) -> dict[str, int | None]:
        """Return for each leaf the number of its key, or None if it is plain.

        Args:
            entry: what `encode_columns` returned, if it is in the file.
            leaves: all leaves of the file.

        Raises:
            FormatError: the file does not say, or says what makes no sense.
        """

    def denial(self, number: int, *, remembered: bool) -> EnvelopeError | None:
        """Unwrap a data key; return why it may not be, or None if it is open now.

        Args:
            number: which.
            remembered: take the KMS's answer to another file of this process, if it was no and not long ago.

        Raises:
            TamperedError, KmsUnavailableError: from the KMS.
        """
        if number in self._open:
            return None
        if number in self._denied:
            return self._denied[number]
        entry = (self._keys, tuple(sorted(self._context.items())), self._wrapped[number])
        denial = self._memory.denial(entry) if remembered else None
        if denial is None:
            try:
                self._unwrap(number)
            except (WrongKeyError, KeyAccessError) as error:
                denial = type(error)(str(error))  # without its traceback, which holds the stack
                self._memory.deny(entry, denial)
            else:
                return None
        self._denied[number] = denial
        return denial

    def kms_keys(self, number: int) -> str:
        """Return the names of the KMS keys that a data key is under."""
        return ", ".join(wrapped.kms_key for wrapped in self._wrapped[number][1])

    def _unwrap(self, number: int) -> None:
        self._ask(self._keys, number)

    def _ask(self, keys: Sequence[KeyProvider], number: int) -> None:
        """Unwrap a data key with one of these keys. Raises as `FileKeys`."""
        key_id, forms = self._wrapped[number]
        failures: list[EnvelopeError] = []
        for key in self._memory.in_order(keys, forms) or keys:
            try:
                with cache.unwrap((key,), forms, self._context, key_id, self._what) as data_key:
                    self.client.add(number, data_key)
            except EnvelopeError as error:
                failures.append(error)
                continue
            self._memory.learn(key, forms)
            self._open.add(number)
            return
        # As cache.unwrap has it: first of all that a KMS is down, last of all that a key is not the right one.
        raise min(
            failures, key=lambda error: (not isinstance(error, KmsUnavailableError), isinstance(error, WrongKeyError))
        )


class FileKeys(Keys):
    """The data keys of one file, from its key file."""

    def __init__(self, keys: Sequence[KeyProvider], key_file: KeyFile, context: Mapping[str, str], what: str) -> None:
        """Unwrap the footer's data key.

        Raises:
            WrongKeyError, TamperedError, KeyAccessError, KmsUnavailableError: from the KMS.
        """
        super().__init__(keys, context, what, LocalClient(key_file.binding(), what))
        self._wrapped = [(data_key.key_id, data_key.wrapped_keys) for data_key in key_file.data_keys]
        self._unwrap(0)

    def assign(self, entry: bytes | None, leaves: Sequence[str]) -> dict[str, int | None]:
        """Take it from the entry. Raises FormatError."""
        return decode_columns(entry, leaves, len(self._wrapped), self._what)


class _Memory:
    """What this process has heard of KMS keys; no key is in it.

    An alias does not say which KMS key it stands for, and whoever tried each key of the caller's on each data key would
    make far more calls than there are data keys.
    """

    def __init__(self) -> None:
        self._denials: dict[object, tuple[float, EnvelopeError]] = {}
        self._opened: dict[KeyProvider, str] = {}

    def denial(self, entry: object) -> EnvelopeError | None:
        expires, denial = self._denials.get(entry, (0.0, None))
        return denial if time.monotonic() < expires else None

    def deny(self, entry: object, denial: EnvelopeError) -> None:
        if len(self._denials) >= cache.MAX_ENTRIES:
            self._denials = {}
        self._denials[entry] = (time.monotonic() + DENIAL_TTL_S, denial)

    def learn(self, key: KeyProvider, wrapped_keys: Sequence[WrappedKey]) -> None:
        """Keep in mind what a key has opened, if there is no doubt."""
        forms = [form for form in wrapped_keys if key.may_open(form)]
        if len(self._opened) >= cache.MAX_ENTRIES:
            self._opened = {}
        if len(forms) == 1:
            self._opened[key] = forms[0].kms_key

    def in_order(self, keys: Sequence[KeyProvider], wrapped_keys: Sequence[WrappedKey]) -> list[KeyProvider]:
        """Return the keys that may open one of these, those first that did, and those last that opened others."""
        names = {form.kms_key for form in wrapped_keys}
        rank = {key: 1 if key not in self._opened else 0 if self._opened[key] in names else 2 for key in keys}
        return sorted((key for key in keys if any(map(key.may_open, wrapped_keys))), key=rank.__getitem__)

    def close(self) -> None:
        self._denials, self._opened = {}, {}
