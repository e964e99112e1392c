"""What the transforms over elements share: their keys, their error handling and their counts.

Used by records.py, fields.py and columns.py; what an element looks like is theirs.
"""

from __future__ import annotations

import abc
import hashlib
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, NamedTuple, TypeVar

import apache_beam as beam

from beam_envelope.errors import DATA_ERRORS, EnvelopeError
from beam_envelope.formats.dataset_key import DATASET_KEY, DeterministicEncryptor, checked_key_name
from beam_envelope.formats.keyfile import RECORD_CIPHER
from beam_envelope.formats.keystore import KeyStore
from beam_envelope.formats.record import RecordDecryptor, RecordEncryptor
from beam_envelope.io.keystore import open_key_store
from beam_envelope.keys import cache
from beam_envelope.keys.cache import DataKeyPolicy
from beam_envelope.keys.choice import KeyChoice, Values
from beam_envelope.keys.context import AnyContext
from beam_envelope.keys.provider import KeyProvider
from beam_envelope.keys.uri import Key
from beam_envelope.settings import read_choice, write_choice
from beam_envelope.transforms.metrics import Progress
from beam_envelope.transforms.row_types import register_rows
from beam_envelope.transforms.runner_limits import check_on_dask

Bundle = TypeVar("Bundle")
FAILED: Final = "failed"

DEAD_LETTERS: Final = DATA_ERRORS
"""What goes to an error handler, where there is one."""


class FailedRecord(NamedTuple):
    """What an error handler gets of an element: nothing that was not encrypted.

    Attributes:
        record_id: what `record_id=` made of the element, or a random UUID.
        error: the class of the error.
        message: what happened, without data.
        field: the path of the field or column; empty for whole records.
        ciphertext: on decryption, the envelope that could not be opened.
    """

    record_id: str
    error: str
    message: str
    field: str
    ciphertext: bytes | None


register_rows(FailedRecord)


def failed_record(
    error: EnvelopeError, *, record_id: str = "", field: str = "", ciphertext: bytes | None = None
) -> Any:
    """Return the tagged output for an element that failed."""
    failed = FailedRecord(record_id or str(uuid.uuid4()), type(error).__name__, str(error), field, ciphertext)
    return beam.pvalue.TaggedOutput(FAILED, failed)


@dataclass(frozen=True)
class WriteKeys:
    """Which keys an encrypting transform uses; configuration only, so it travels.

    Attributes:
        keys: the KMS keys, templates among them.
        store: the key store.
        context: the encryption context, as pairs, whose values may have gaps.
        policy: when to take a new data key; None until the input is known: "bundle" for bounded input, else "worker".
        dataset_key: the name of the key for deterministic encryption.
        cipher: of the randomised envelopes.
    """

    keys: tuple[KeyProvider, ...]
    store: KeyStore
    context: tuple[tuple[str, str], ...]
    policy: DataKeyPolicy | None
    dataset_key: str = DATASET_KEY
    cipher: str = RECORD_CIPHER

    def for_input(self, elements: beam.PCollection[Any]) -> WriteKeys:
        """Return the same with a policy that fits the input: an unbounded one has bundles of a single element."""
        if self.policy is not None:
            return self
        return replace(self, policy=DataKeyPolicy("bundle" if elements.is_bounded else "worker"))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the gaps that elements fill, if there are templates."""
        return KeyChoice(self.keys, self.context).names

    def filled(self, values: Values) -> WriteKeys:
        """Return the same without gaps; each choice has a dataset key of its own. Raises as `KeyChoice.filled`."""
        if not values:
            return self
        choice = KeyChoice(self.keys, self.context).filled(values)
        context: Any = choice.context  # a writer's is never ANY_CONTEXT
        name = _chosen_name(self.dataset_key, dict(zip(self.names, values, strict=True)))
        return replace(self, keys=choice.keys, context=context, dataset_key=name)

    def encryptor(self) -> RecordEncryptor:
        """Return the encryptor of a bundle: its own, or the process's."""
        policy = self.policy or DataKeyPolicy()

        def make() -> RecordEncryptor:
            return RecordEncryptor(self.keys, self.store, dict(self.context), policy, self.cipher)

        return cache.shared(("encryptor", self), make) if policy.reuse == "worker" else make()

    def release(self, encryptor: RecordEncryptor) -> None:
        """Take back the encryptor of a bundle at its end: its own loses its key, the process's lives on."""
        if self.policy is None or self.policy.reuse == "bundle":
            encryptor.close()

    def deterministic(self) -> DeterministicEncryptor:
        """Return the process's encryptor under the dataset key."""

        def make() -> DeterministicEncryptor:
            return DeterministicEncryptor(self.keys, self.store, dict(self.context), self.dataset_key)

        return cache.shared(("deterministic", self), make)


@dataclass(frozen=True)
class ReadKeys:
    """Which keys a decrypting transform may use; configuration only, so it travels."""

    keys: tuple[KeyProvider, ...]
    store: KeyStore
    context: tuple[tuple[str, str], ...] | AnyContext

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the gaps that elements fill, if there are templates."""
        return KeyChoice(self.keys, self.context).names

    def filled(self, values: Values) -> ReadKeys:
        """Return the same without gaps. Raises as `KeyChoice.filled`."""
        choice = KeyChoice(self.keys, self.context).filled(values)
        return replace(self, keys=choice.keys, context=choice.context)

    def decryptor(self) -> RecordDecryptor:
        """Return the process's decryptor."""
        context = self.context if isinstance(self.context, AnyContext) else dict(self.context)
        return cache.shared(("decryptor", self), lambda: RecordDecryptor(self.keys, self.store, context))


def write_keys(
    key: Key | Sequence[Key] | None,
    keys: str | os.PathLike[str] | KeyStore,
    context: Mapping[str, str] | None,
    policy: DataKeyPolicy | None,
    dataset_key: str = DATASET_KEY,
    cipher: str = RECORD_CIPHER,
) -> WriteKeys:
    """Check the arguments that all encrypting transforms have.

    Raises:
        ValueError, TypeError, FormatError: one is not of the right form.
    """
    choice = write_choice(key, context)
    pairs: Any = choice.context  # a writer's is never ANY_CONTEXT
    if choice.names:
        checked_key_name(_chosen_name(dataset_key, {}))
    return WriteKeys(choice.keys, open_key_store(keys), pairs, policy, checked_key_name(dataset_key), cipher)


def read_keys(
    key: Key | Sequence[Key] | None,
    keys: str | os.PathLike[str] | KeyStore,
    context: Mapping[str, str] | AnyContext | None,
) -> ReadKeys:
    """Check the arguments that all decrypting transforms have. Raises as `write_keys`."""
    choice = read_choice(key, context)
    return ReadKeys(choice.keys, open_key_store(keys), choice.context)


def _chosen_name(dataset_key: str, values: Mapping[str, str]) -> str:
    """Return the name of the dataset key of a choice: the same in every job, and none that says the values."""
    text = "/".join(f"{name}={values[name]}" for name in sorted(values))  # no value has a slash
    return f"{dataset_key}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


class KeyUsingDoFn(beam.DoFn, Generic[Bundle]):
    """A DoFn that holds keys from the first to the last element of a bundle, and counts what it did.

    All that belongs to a bundle is in `self.bundle`, and never travels.

    Attributes:
        catch: whether elements that fail go to an error handler.
    """

    catch = False
    bundle: Bundle

    @abc.abstractmethod
    def open(self) -> Bundle:
        """Return what a bundle needs: encryptors or decryptors, and counters."""

    @abc.abstractmethod
    def close(self, bundle: Bundle) -> Mapping[str, int]:
        """Drop it, and return what was done, by the name of the counter."""

    def start_bundle(self) -> None:
        """Open."""
        self._progress = Progress()
        self.bundle = self.open()

    def finish_bundle(self) -> None:
        """Close, and report."""
        with self._progress:
            for name, count in self.close(self.bundle).items():
                self._progress.add(name, count)
        del self.bundle

    def teardown(self) -> None:
        """Drop what a bundle that failed has left."""
        self.__dict__.pop("bundle", None)
        if (progress := self.__dict__.pop("_progress", None)) is not None:
            progress.drop()

    def __getstate__(self) -> dict[str, Any]:
        """Leave what belongs to a bundle behind: only configuration travels."""
        return {name: value for name, value in self.__dict__.items() if name not in {"bundle", "_progress"}}


class ElementTransform(beam.PTransform["beam.PCollection[Any]", "beam.PCollection[Any]"]):
    """A transform of one DoFn over elements, with an error handler."""

    def __init__(self) -> None:
        """Have no handler."""
        super().__init__()
        self._handler: Any = None

    def with_error_handler(self, handler: Any) -> ElementTransform:  # Beam's ErrorHandler, or None
        """Send elements that fail to a Beam error handler, as `FailedRecord`s; errors of the KMS still fail."""
        self._handler = handler
        return self

    def apply(
        self, label: str, dofn: KeyUsingDoFn[Any], elements: beam.PCollection[Any], output_type: Any
    ) -> beam.PCollection[Any]:
        """Return the results; only with an error handler has the step a second output, which not every runner has."""
        check_on_dask(elements, type(self).__name__, self._handler)
        dofn.catch = self._handler is not None
        step = beam.ParDo(dofn)
        if self._handler is None:
            return elements | label >> step.with_output_types(output_type)
        outputs = elements | label >> step.with_outputs(FAILED, main="done")
        outputs.done.element_type = output_type
        outputs[FAILED].element_type = FailedRecord
        self._handler.add_error_pcollection(outputs[FAILED])
        return outputs.done
