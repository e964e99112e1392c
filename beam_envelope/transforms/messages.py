"""The keys of self-contained records (AWS Encryption SDK messages), which have no key store."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any, Final

import apache_beam as beam

from beam_envelope.formats.esdk import CommitmentPolicy, MessageDecryptor, MessageEncryptor
from beam_envelope.keys import cache
from beam_envelope.keys.cache import LEASED_BYTES, DataKeyPolicy, DataKeySource, shared_source
from beam_envelope.keys.choice import KeyChoice, Values
from beam_envelope.keys.context import AnyContext
from beam_envelope.keys.provider import KeyProvider

_LEASED_MESSAGES: Final = 256


@dataclass(frozen=True)
class MessageWriteKeys:
    """Which keys write messages; configuration only, so it travels."""

    keys: tuple[KeyProvider, ...]
    context: tuple[tuple[str, str], ...]
    policy: DataKeyPolicy | None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the gaps that elements fill, if there are templates."""
        return KeyChoice(self.keys, self.context).names

    def filled(self, values: Values) -> MessageWriteKeys:
        """Return the same without gaps. Raises as `KeyChoice.filled`."""
        choice = KeyChoice(self.keys, self.context).filled(values)
        context: Any = choice.context  # a writer's is never ANY_CONTEXT
        return replace(self, keys=choice.keys, context=context)

    def for_input(self, elements: beam.PCollection[Any]) -> MessageWriteKeys:
        """Return the same with a policy that fits the input: an unbounded one has bundles of a single element."""
        if self.policy is not None:
            return self
        return replace(self, policy=DataKeyPolicy("bundle" if elements.is_bounded else "worker"))

    def encryptor(self) -> BundleMessages:
        """Return the encryptor of a bundle."""
        return BundleMessages(self)

    def source(self) -> DataKeySource:
        """Return the data keys of a bundle: its own, or the process's."""
        policy = self.policy or DataKeyPolicy()
        take = shared_source if policy.reuse == "worker" else DataKeySource
        return take(self.keys, dict(self.context), policy)


@dataclass(frozen=True)
class MessageReadKeys:
    """Which keys may open messages; configuration only, so it travels."""

    keys: tuple[KeyProvider, ...]
    context: tuple[tuple[str, str], ...] | AnyContext
    commitment_policy: CommitmentPolicy

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the gaps that elements fill, if there are templates."""
        return KeyChoice(self.keys, self.context).names

    def filled(self, values: Values) -> MessageReadKeys:
        """Return the same without gaps. Raises as `KeyChoice.filled`."""
        choice = KeyChoice(self.keys, self.context).filled(values)
        return replace(self, keys=choice.keys, context=choice.context)

    def decryptor(self) -> MessageDecryptor:
        """Return the process's decryptor."""
        context = self.context if isinstance(self.context, AnyContext) else dict(self.context)
        return cache.shared(self, lambda: MessageDecryptor(self.keys, context, self.commitment_policy))


class BundleMessages:
    """Encrypts the messages of a bundle. For one thread.

    The source counts each message, but the data key is the same for many, and so is what is made of it. Of a source
    that no other bundle has, small messages are counted by the hundred.
    """

    def __init__(self, keys: MessageWriteKeys) -> None:
        """Make no call yet."""
        self._keys = keys
        self._owns_source = keys.policy is None or keys.policy.reuse == "bundle"
        self._encryptor: MessageEncryptor | None = None
        self._wrapped_keys: object = None
        self._start()

    def encrypt(self, plaintext: bytes, place: bytes = b"") -> bytes:
        """Return the message of a record; it has no place.

        Raises:
            KeyAccessError, KmsUnavailableError: a new data key was due.
        """
        if self._pid != os.getpid():  # a fork left the encryptor without its key, and perhaps the source locked
            self._start()
        if self._leased and len(plaintext) <= LEASED_BYTES and time.monotonic() < self._expires:
            self._leased -= 1
        else:
            self._take(len(plaintext))
        return self._encryptor.encrypt(plaintext)  # type: ignore[union-attr]  # there is one after the first message

    def close(self) -> None:
        """Erase the keys, except the process's."""
        self._drop()
        if self._owns_source:
            self._source.close()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._source = self._keys.source()
        self._encryptor, self._leased, self._expires = None, 0, 0.0

    def _take(self, n_bytes: int) -> None:
        with self._source.take(n_bytes) as data_key:
            if self._encryptor is None or data_key.wrapped_keys is not self._wrapped_keys:
                self._drop()
                self._encryptor = MessageEncryptor(data_key, dict(self._keys.context))
                self._wrapped_keys = data_key.wrapped_keys
        if self._owns_source and n_bytes <= LEASED_BYTES:
            self._leased, self._expires = self._source.lease(_LEASED_MESSAGES)

    def _drop(self) -> None:
        if self._encryptor is not None:
            self._encryptor.close()
        self._encryptor, self._leased = None, 0
