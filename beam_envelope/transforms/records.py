"""EncryptRecords and DecryptRecords: whole elements, each as one envelope, and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, cast

import apache_beam as beam
from apache_beam import coders, typehints
from apache_beam.typehints.typehints import TupleConstraint

from beam_envelope.errors import AlreadyEncryptedError, FormatError, NotEncryptedError
from beam_envelope.formats.dataset_key import DATASET_KEY
from beam_envelope.formats.esdk import CommitmentPolicy
from beam_envelope.formats.keystore import KeyStore
from beam_envelope.keys.cache import DataKeyPolicy
from beam_envelope.keys.choice import ElementFields, KeyFields, Opened
from beam_envelope.keys.context import AnyContext
from beam_envelope.keys.uri import Key
from beam_envelope.settings import read_choice, write_choice
from beam_envelope.transforms.coding import (
    Aad,
    CoderLike,
    checked_aad,
    checked_coder,
    decode,
    encode,
    place_of,
    split_pair,
    type_of,
)
from beam_envelope.transforms.elements import (
    DEAD_LETTERS,
    ElementTransform,
    KeyUsingDoFn,
    ReadKeys,
    WriteKeys,
    failed_record,
    read_keys,
    write_keys,
)
from beam_envelope.transforms.messages import MessageReadKeys, MessageWriteKeys

RecordFormat: TypeAlias = Literal["compact", "aws-encryption-sdk"]
Place: TypeAlias = "bytes | Callable[[Any], bytes | str]"
Crypt: TypeAlias = "Callable[[bytes, bytes], bytes]"
Close: TypeAlias = "Callable[[], None] | None"
_MESSAGES: Final = "aws-encryption-sdk"
_FORMATS: Final = ("compact", _MESSAGES)
_NO_FIELDS: Final = ElementFields(())


class _Work:
    """What a bundle needs, and what it did."""

    __slots__ = ("chosen", "ciphertext", "close", "coding", "crypt", "failed", "plaintext", "records")

    def __init__(
        self,
        crypt: Crypt | None,
        coding: Callable[[Any], Any] | None,
        close: Close = None,
        chosen: Callable[[Any], Crypt] | None = None,
    ) -> None:
        self.crypt, self.coding, self.close, self.chosen = crypt, coding, close, chosen
        self.records = self.failed = self.plaintext = self.ciphertext = 0

    def counts(self, done: str) -> dict[str, int]:
        return {
            done: self.records,
            "records_failed": self.failed,
            "bytes_plaintext": self.plaintext,
            "bytes_ciphertext": self.ciphertext,
        }


@dataclass(frozen=True)
class _Form:
    """What elements look like.

    Attributes:
        coder: None for bytes, and on encryption text.
        place: what binds each record to its place, or the function of the message key that tells it.
        keyed: whether elements are pairs of message key and record.
    """

    coder: coders.Coder | None
    place: Place
    keyed: bool

    def hint(self, record: Any, elements: beam.PCollection[Any] | None = None) -> Any:
        """Return the type of elements whose records are of a type; with the message keys of a PCollection."""
        if not self.keyed:
            return record
        key_type = typehints.Any
        if elements is not None and isinstance(elements.element_type, TupleConstraint):
            key_type = elements.element_type.tuple_types[0]
        return typehints.Tuple[key_type, record]


def _work(
    fields: ElementFields, opened: Callable[[Any], tuple[Crypt, Close]], keys: Any, coding: Callable[[Any], Any] | None
) -> _Work:
    """Return the work of a bundle; of templates, what each choice of keys needs is opened when an element is of it."""
    if not fields.names:
        crypt, close = opened(keys)
        return _Work(crypt, coding, close)
    chosen: Opened[tuple[Crypt, Close]] = Opened(
        lambda values: opened(keys.filled(values)), lambda each: each[1] and each[1]()
    )
    return _Work(None, coding, chosen.close, lambda element: chosen(fields(element))[0])


class _EncryptDoFn(KeyUsingDoFn[_Work]):
    def __init__(
        self,
        keys: WriteKeys | MessageWriteKeys,
        form: _Form,
        record_id: Callable[[Any], Any] | None,
        *,
        siv: bool,
        fields: ElementFields = _NO_FIELDS,
    ) -> None:
        self._keys, self._fields, self._record_id, self._siv = keys, fields, record_id, siv
        self._coder, self._place, self._keyed = form.coder, form.place, form.keyed

    def open(self) -> _Work:
        return _work(self._fields, self._opened, self._keys, None if self._coder is None else self._coder.encode)

    def _opened(self, keys: WriteKeys | MessageWriteKeys) -> tuple[Crypt, Close]:
        if isinstance(keys, MessageWriteKeys):
            messages = keys.encryptor()
            return messages.encrypt, messages.close
        if self._siv:
            return keys.deterministic().encrypt, None
        encryptor = keys.encryptor()
        return encryptor.encrypt, lambda: keys.release(encryptor)

    def close(self, bundle: _Work) -> Mapping[str, int]:
        if bundle.close is not None:
            bundle.close()
        return bundle.counts("records_encrypted")

    def process(self, element: Any) -> Sequence[Any]:
        work, place = self.bundle, self._place
        message_key = None
        record = element
        try:
            if self._keyed:
                message_key, record = split_pair(element)
                if not isinstance(place, bytes):
                    place = place_of(message_key, place)
            crypt = work.crypt if work.chosen is None else work.chosen(element if self._fields.by_function else record)
            plaintext = record if work.coding is None and type(record) is bytes else encode(record, work.coding)
        except FormatError as error:
            return self._fail(element, error)
        try:  # apart from the above: a FormatError from here is about keys, not about this element
            envelope = crypt(plaintext, place)  # type: ignore[arg-type, misc]  # bytes by now, and there is one
        except AlreadyEncryptedError as error:
            return self._fail(element, error)
        work.records += 1
        work.plaintext += len(plaintext)
        work.ciphertext += len(envelope)
        return ((message_key, envelope),) if self._keyed else (envelope,)

    def _fail(self, element: Any, error: FormatError | AlreadyEncryptedError) -> Sequence[Any]:
        if not self.catch:
            raise error
        self.bundle.failed += 1
        name = ""
        if self._record_id is not None:
            try:
                name = str(self._record_id(element))
            except Exception:  # noqa: BLE001  # of the user's function; a random id then has to do
                name = ""
        return (failed_record(error, record_id=name),)


class _DecryptDoFn(KeyUsingDoFn[_Work]):
    def __init__(self, keys: ReadKeys | MessageReadKeys, form: _Form, fields: ElementFields = _NO_FIELDS) -> None:
        self._keys, self._fields = keys, fields
        self._coder, self._place, self._keyed = form.coder, form.place, form.keyed

    def open(self) -> _Work:
        return _work(self._fields, self._opened, self._keys, None if self._coder is None else self._coder.decode)

    @staticmethod
    def _opened(keys: ReadKeys | MessageReadKeys) -> tuple[Crypt, Close]:
        if isinstance(keys, MessageReadKeys):
            messages = keys.decryptor()
            return lambda message, _place: messages.decrypt(message, "this record"), None
        return keys.decryptor().decrypt, None

    def close(self, bundle: _Work) -> Mapping[str, int]:
        return bundle.counts("records_decrypted")

    def process(self, element: Any) -> Sequence[Any]:
        work, place = self.bundle, self._place
        message_key = None
        envelope = element
        try:
            if self._keyed:
                message_key, envelope = split_pair(element)
                if not isinstance(place, bytes):
                    place = place_of(message_key, place)
            if type(envelope) is not bytes:
                raise NotEncryptedError(f"envelopes are bytes; this element is a {type(envelope).__name__}")
            crypt = work.crypt if work.chosen is None else work.chosen(element)
            plaintext = crypt(envelope, place)  # type: ignore[arg-type, misc]  # bytes by now, and there is one
            record = plaintext if work.coding is None else decode(plaintext, work.coding)
        except DEAD_LETTERS as error:
            if not self.catch:
                raise
            work.failed += 1
            # What is no envelope may be anything, such as plaintext.
            sealed = type(envelope) is bytes and not isinstance(error, NotEncryptedError)
            return (failed_record(error, ciphertext=envelope if sealed else None),)
        work.records += 1
        work.plaintext += len(plaintext)
        work.ciphertext += len(envelope)
        return ((message_key, record),) if self._keyed else (record,)


class EncryptRecords(ElementTransform):
    """Encrypts elements: each becomes one envelope, bytes. Grouping, joining and storing need not open them.

    Input: bytes or str, or whatever `coder` encodes. Output: bytes; with `keyed`, pairs of message key and bytes.

    Args:
        key: the KMS key, as URI or provider, or several: any one of them opens the records. Or templates, which each
            record fills (`aws-kms://alias/data-{tenant}`; docs/key-choice.md).
        keys: the key store: the folder, on any Beam filesystem, that gets a small key file for each data key. Readers
            need it. `format="aws-encryption-sdk"` has none.
        context: the encryption context, which a reader has to give again. Nothing secret. Its values may be templates.
        coder: how elements become bytes: a Beam coder, the elements' type, or its name ("str", "int", ...). Without
            one, bytes are taken as they are and a str as UTF-8, which comes back as bytes.
        aad: what binds a record to its place, not secret: a constant, or with `keyed` a function of the message key. A
            reader has to give the same.
        keyed: elements are pairs of message key and record; only the record is encrypted.
        format: `compact`: 45 bytes more than the record. `aws-encryption-sdk`: larger messages that hold their wrapped
            data key, for records that leave alone; any AWS Encryption SDK reads them.
        policy: when to ask the KMS for a new data key: by default for each bundle, of unbounded input in each process.
        deterministic: equal records get equal envelopes, under one key for the dataset. Whoever sees the envelopes
            learns which are equal, and how often each occurs.
        dataset_key: with `deterministic`: the name of that key in the key store.
        record_id: names an element that fails in its `FailedRecord`; a function that returns nothing secret.
        key_fields: a function of the element that returns a dict of what fills the templates. Default: the fields of
            the record, which is a dict, named tuple, row or dataclass then.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form, or two do not go together. While it
            runs, see `formats.record.RecordEncryptor`.

    Example:
        >>> orders | EncryptRecords(key="aws-kms://alias/etl", keys="s3://sealed/keys/", context={"dataset": "orders"})
    """

    def __init__(  # noqa: PLR0913  # plain keyword arguments
        self,
        *,
        key: Key | Sequence[Key] | None = None,
        keys: str | os.PathLike[str] | KeyStore | None = None,
        context: Mapping[str, str] | None = None,
        coder: CoderLike = None,
        aad: Aad = None,
        keyed: bool = False,
        format: RecordFormat = "compact",  # noqa: A002  # the word for it
        policy: DataKeyPolicy | None = None,
        deterministic: bool = False,
        dataset_key: str = DATASET_KEY,
        record_id: Callable[[Any], Any] | None = None,
        key_fields: KeyFields = None,
    ) -> None:
        """Check the arguments; nothing is called yet."""
        super().__init__()
        _check_format(format, keys, aad)
        if deterministic and (format == _MESSAGES or policy is not None):
            msg = "deterministic=True has one key for the dataset, so neither policy= nor format='aws-encryption-sdk'"
            raise ValueError(msg)
        self._form = _Form(checked_coder(coder, deterministic=deterministic), checked_aad(aad, keyed=keyed), keyed)
        self._keys: WriteKeys | MessageWriteKeys
        if keys is None:
            choice = write_choice(key, context)
            self._keys = MessageWriteKeys(choice.keys, cast("tuple[tuple[str, str], ...]", choice.context), policy)
        else:
            self._keys = write_keys(key, keys, context, policy, dataset_key)
        self._siv, self._record_id = deterministic, record_id
        self._fields = ElementFields(self._keys.names, key_fields, record_id)

    def expand(self, elements: beam.PCollection[Any]) -> beam.PCollection[Any]:
        """Return the envelopes."""
        keys = self._keys.for_input(elements)
        dofn = _EncryptDoFn(keys, self._form, self._record_id, siv=self._siv, fields=self._fields)
        records = typehints.Union[bytes, str] if self._form.coder is None else typehints.Any
        dofn.with_input_types(self._form.hint(records))
        return self.apply("Encrypt", dofn, elements, self._form.hint(bytes, elements))

    def display_data(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown."""
        mode = "deterministic" if self._siv else "randomized"
        return {**_display(self._keys, self._form), "mode": mode}


class DecryptRecords(ElementTransform):
    """Decrypts the envelopes that `EncryptRecords` made. It asks the KMS once for each data key and process.

    Input: bytes; with `keyed`, pairs of message key and bytes. Output: bytes, or what `coder` decodes.

    Args:
        key: the KMS key, as URI or provider, or several, any of which may open a record; `AllowedKeys`;
            or templates.
        keys: the key store that the writer had.
        context: the encryption context that the records were written with, or `ANY_CONTEXT`.
        coder: how bytes become elements, as the writer had it; `str` for text.
        aad: what the writer gave.
        keyed: elements are pairs of message key and envelope.
        format: `compact` (randomised or deterministic: each envelope says which) or `aws-encryption-sdk`.
        commitment_policy: which AWS Encryption SDK messages are taken, by AWS's name for it: by default those that
            commit to their key.
        key_fields: needed with templates: a function of the element that returns a dict of what fills them, such as
            `lambda pair: {"tenant": pair[0]}` with `keyed`. An envelope by itself does not say.

    Raises:
        ValueError, TypeError, FormatError: as `EncryptRecords`. While it runs, see `formats.record.RecordDecryptor`.

    Example:
        >>> sealed | DecryptRecords(key="aws-kms://alias/etl", keys="s3://sealed/keys/", context={"dataset": "orders"})
    """

    def __init__(
        self,
        *,
        key: Key | Sequence[Key] | None = None,
        keys: str | os.PathLike[str] | KeyStore | None = None,
        context: Mapping[str, str] | AnyContext | None = None,
        coder: CoderLike = None,
        aad: Aad = None,
        keyed: bool = False,
        format: RecordFormat = "compact",  # noqa: A002
        commitment_policy: CommitmentPolicy = "require-encrypt-require-decrypt",
        key_fields: KeyFields = None,
    ) -> None:
        """Check the arguments; nothing is called yet."""
        super().__init__()
        _check_format(format, keys, aad)
        self._form = _Form(checked_coder(coder), checked_aad(aad, keyed=keyed), keyed)
        self._keys: ReadKeys | MessageReadKeys
        if keys is None:
            choice = read_choice(key, context)
            self._keys = MessageReadKeys(choice.keys, choice.context, commitment_policy)
            self._keys.decryptor()  # checks the policy
        else:
            self._keys = read_keys(key, keys, context)
        self._fields = ElementFields(self._keys.names, key_fields)
        if self._fields.names and key_fields is None:
            raise ValueError(
                f"an envelope does not say {', '.join(map(repr, self._fields.names))}, which the template needs: give "
                "key_fields=, a function of the element; or say which keys may open records with AllowedKeys"
            )

    def expand(self, elements: beam.PCollection[Any]) -> beam.PCollection[Any]:
        """Return the records."""
        dofn = _DecryptDoFn(self._keys, self._form, self._fields)
        dofn.with_input_types(self._form.hint(bytes))
        return self.apply("Decrypt", dofn, elements, self._form.hint(type_of(self._form.coder), elements))

    def display_data(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown."""
        return _display(self._keys, self._form)


def _check_format(format: str, keys: object, aad: Aad) -> None:  # noqa: A002
    if format not in _FORMATS:
        raise ValueError(f"format is one of {', '.join(_FORMATS)}, not {format!r}")
    if format == _MESSAGES:
        if keys is not None:
            raise ValueError("format='aws-encryption-sdk' has no key store: each message holds its wrapped data key")
        if aad is not None:
            raise ValueError(
                "format='aws-encryption-sdk' has no place for aad=: its messages are bound to their encryption context "
                "only. Put what all records share in context=, or use format='compact'"
            )
    elif keys is None:
        raise ValueError(
            "keys= is missing: a compact envelope only names its key, so without a key store nobody could ever open "
            "it. Give a folder, such as keys='s3://bucket/keys/', or format='aws-encryption-sdk'"
        )


def _display(keys: WriteKeys | ReadKeys | MessageWriteKeys | MessageReadKeys, form: _Form) -> dict[str, Any]:
    store = {"keys": keys.store.place} if isinstance(keys, (WriteKeys, ReadKeys)) else {}
    return {
        "key": ", ".join(map(str, keys.keys)),
        "context": "any" if isinstance(keys.context, AnyContext) else ", ".join(name for name, _ in keys.context),
        "format": "compact" if store else _MESSAGES,
        "keyed": form.keyed,
        **store,
    }
