"""The keys of self-contained records (AWS Encryption SDK messages), which have no key store."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import apache_beam as beam

from beam_envelope.formats.esdk import CommitmentPolicy, MessageDecryptor, MessageEncryptor
from beam_envelope.keys import cache
from beam_envelope.keys.cache import DataKeyPolicy, DataKeySource, shared_source
from beam_envelope.keys.choice import KeyChoice, Values
from beam_envelope.keys.context import AnyContext
from beam_envelope.keys.provider import KeyProvider


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

    The source counts each message, but the data key is the same for many, and so is what is made of it.
    """

    def __init__(self, keys: MessageWriteKeys) -> None:
        """Make no call yet."""
        self._keys = keys
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
        with self._source.take(len(plaintext)) as data_key:
            if self._encryptor is None or data_key.wrapped_keys is not self._wrapped_keys:
                self._drop()
                self._encryptor = MessageEncryptor(data_key, dict(self._keys.context))
                self._wrapped_keys = data_key.wrapped_keys
        return self._encryptor.encrypt(plaintext)

    def close(self) -> None:
        """Erase the keys, except the process's."""
        self._drop()
        if self._keys.policy is None or self._keys.policy.reuse == "bundle":
            self._source.close()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._source = self._keys.source()
        self._encryptor = None

    def _drop(self) -> None:
        if self._encryptor is not None:
            self._encryptor.close()
        self._encryptor = None
