"""EncryptFields and DecryptFields: chosen fields of dicts, rows, named tuples and dataclasses, each one cell."""

from __future__ import annotations

import binascii
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal, Optional, TypeAlias, cast, get_args

import apache_beam as beam
from apache_beam import typehints
from apache_beam.utils.timestamp import Duration, Timestamp

from beam_envelope.errors import EnvelopeError, FormatError, NotEncryptedError
from beam_envelope.formats.arrow_scalar import INT64
from beam_envelope.formats.dataset_key import DATASET_KEY
from beam_envelope.formats.keystore import KeyStore
from beam_envelope.formats.record import RecordDecryptor, RecordEncryptor, cell_place, refuse_envelope
from beam_envelope.formats.record_key import DETERMINISTIC_SUITE
from beam_envelope.formats.value import decode_value, encode_value, register_type
from beam_envelope.keys.cache import DataKeyPolicy
from beam_envelope.keys.choice import ElementFields, KeyFields, Opened
from beam_envelope.keys.context import AnyContext
from beam_envelope.keys.uri import Key
from beam_envelope.transforms.cell_text import BASE64_OF_PREFIX, cell_of, from_base64
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
from beam_envelope.transforms.paths import (
    Change,
    FieldError,
    FieldsPlan,
    Missing,
    Path,
    parse_path,
    parse_paths,
    parse_scopes,
    tree_of,
)
from beam_envelope.transforms.schemas import (
    TYPE_NAMES,
    check_fields,
    is_row,
    maker,
    output_type,
    row_type,
    type_at,
    without_null,
)

Encoding: TypeAlias = Literal["binary", "base64"]
Opening: TypeAlias = "tuple[Change, RecordEncryptor | None]"

_NO_FIELDS: Final = ElementFields(())


def _of_micros(kind: Callable[..., Any], payload: bytes) -> Any:
    return kind(micros=INT64.unpack(payload)[0])


# The times of Beam's own schemas.
for _code, _kind in (("@bt", Timestamp), ("@bd", Duration)):
    register_type(_code, _kind, lambda value: INT64.pack(value.micros), partial(_of_micros, _kind))


class EncryptFields(ElementTransform):
    """Encrypts fields of dicts, rows, named tuples and dataclasses; all else in the elements stays as it is.

    Dicts stay dicts, the others become `beam.Row`s. A schema stays a schema: an encrypted field becomes
    Optional[bytes], or Optional[str] with base64. None stays None.

    Args:
        fields: the paths of the fields: "email", "address.street", "items[*].card", "tags[*]"; docs/fields.md.
        key: the KMS key, as URI or provider, or several: any one of them opens the fields. Or templates, which each
            element fills (`aws-kms://alias/data-{tenant}`; docs/key-choice.md).
        keys: the key store: the folder that the key files go to.
        context: the encryption context, which a reader has to give again. Nothing secret. Its values may be templates.
        deterministic: those of `fields` whose equal values become equal ciphertexts, so that they can be joined and
            grouped; or a mapping from them to the name of a scope, within which that is so across fields and datasets.
        dataset_key: the name of the key for these.
        encoding: "binary" for bytes, or "base64" for text.
        missing: what to do when a dict lacks a field: "error", or "skip" it.
        policy: when to take a new data key.
        record_id: a function that returns what dead letters call an element, and nothing secret; else they get a UUID.
        key_fields: a function of the element that returns a dict of what fills the templates. Default: its fields.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form; while the pipeline is built,
            ValueError also for a field that the schema of the elements does not have. While it runs, see
            `formats.record.RecordEncryptor`, and FormatError for values that cannot be encrypted.

    Example:
        >>> people | EncryptFields(["email"], key="aws-kms://alias/etl", keys="s3://bucket/keys/")
    """

    def __init__(  # noqa: PLR0913  # plain keyword arguments
        self,
        fields: Sequence[str],
        *,
        key: Key | Sequence[Key] | None = None,
        keys: str | os.PathLike[str] | KeyStore,
        context: Mapping[str, str] | None = None,
        deterministic: Iterable[str] | Mapping[str, str] = (),
        dataset_key: str = DATASET_KEY,
        encoding: Encoding = "binary",
        missing: Missing = "error",
        policy: DataKeyPolicy | None = None,
        record_id: Callable[[Any], str] | None = None,
        key_fields: KeyFields = None,
    ) -> None:
        """Check the arguments; nothing is called yet."""
        super().__init__()
        if encoding not in get_args(Encoding):
            msg = f"encoding is 'binary' or 'base64', not {encoding!r}"
            raise ValueError(msg)
        self._plan = FieldsPlan(parse_paths(fields), parse_scopes(deterministic), missing)
        self._keys = write_keys(key, keys, context, policy, dataset_key)
        self._encoding: Encoding = encoding
        self._record_id = record_id
        self._fields = _key_fields(self._plan, self._keys.names, key_fields, record_id)

    def expand(self, elements: beam.PCollection[Any]) -> beam.PCollection[Any]:
        """Return the PCollection of elements with encrypted fields."""
        kind = elements.element_type
        for path in self._plan.paths:
            if row_type(kind) is not None and is_row(type_at(kind, path.steps)):
                msg = f"the field {path} is a row, which has no form as one value: name the fields in it"
                raise ValueError(msg)
        cell = _nullable(bytes if self._encoding == "binary" else str)
        produced = output_type(kind, tree_of(self._plan.paths), lambda _: cell)
        dofn = _EncryptDoFn(self._plan, self._keys.for_input(elements), self._encoding, self._record_id, self._fields)
        return self.apply("Encrypt", dofn, elements, produced)

    def display_data(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown."""
        shown = _shown(self._plan, self._keys)
        return {**shown, "encoding": self._encoding, "context": ", ".join(name for name, _ in self._keys.context)}


class DecryptFields(ElementTransform):
    """Decrypts what `EncryptFields` encrypted: each value comes back with its type.

    Args:
        fields: the paths, or a mapping from them to the types of their values, which go into the output's schema:
            Python types, or "string", "integer", "number", "boolean", "bytes". Without types, it has Any there.
        key: the KMS key, as URI or provider, or several, any of which may open a field; `AllowedKeys`; or templates.
        keys: the key store.
        context: the encryption context that the fields were written with, or `ANY_CONTEXT`.
        deterministic: the mapping from fields to scopes that they were written with, if one was.
        element_type: a NamedTuple or dataclass to make of each element, in place of a dict or `beam.Row`.
        missing: what to do when a dict lacks a field: "error", or "skip" it.
        record_id: a function that returns what dead letters call an element; else they get a UUID.
        key_fields: a function of the element that returns a dict of what fills the templates. Default: its fields.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form, or the schema lacks a field. While it
            runs, see `formats.record.RecordDecryptor`.

    Example:
        >>> sealed | DecryptFields({"email": str}, key="aws-kms://alias/etl", keys="s3://bucket/keys/")
    """

    def __init__(
        self,
        fields: Sequence[str] | Mapping[str, Any],
        *,
        key: Key | Sequence[Key] | None = None,
        keys: str | os.PathLike[str] | KeyStore,
        context: Mapping[str, str] | AnyContext | None = None,
        deterministic: Iterable[str] | Mapping[str, str] = (),
        element_type: type | None = None,
        missing: Missing = "error",
        record_id: Callable[[Any], str] | None = None,
        key_fields: KeyFields = None,
    ) -> None:
        """Check the arguments; nothing is called yet."""
        super().__init__()
        self._plan = FieldsPlan(parse_paths(fields), parse_scopes(deterministic), missing)
        types = fields if isinstance(fields, Mapping) else {}
        self._types = {str(parse_path(text)): _type(text, kind) for text, kind in types.items()}
        self._keys = read_keys(key, keys, context)
        self._element_type = element_type
        self._record_id = record_id
        self._fields = _key_fields(self._plan, self._keys.names, key_fields, record_id)
        if element_type is not None:
            check_fields(element_type, Any)

    def expand(self, elements: beam.PCollection[Any]) -> beam.PCollection[Any]:
        """Return the PCollection of elements with their values."""
        kind = elements.element_type
        produced = output_type(kind, tree_of(self._plan.paths), lambda path: self._types.get(str(path), Any))
        if self._element_type is not None:
            check_fields(self._element_type, kind)
            produced = self._element_type
        dofn = _DecryptDoFn(self._plan, self._keys, self._element_type, self._record_id, self._fields)
        return self.apply("Decrypt", dofn, elements, produced)

    def display_data(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown."""
        context = self._keys.context
        names = "any" if isinstance(context, AnyContext) else ", ".join(name for name, _ in context)
        return {**_shown(self._plan, self._keys), "context": names}


def _key_fields(
    plan: FieldsPlan, names: Sequence[str], key_fields: KeyFields, record_id: Callable[[Any], str] | None
) -> ElementFields:
    """Return what takes from elements what fills templates. Raises ValueError: it is encrypted itself."""
    if key_fields is None and (both := sorted({str(path.steps[0]) for path in plan.paths}.intersection(names))):
        raise ValueError(f"the field {both[0]!r} fills the template of the key or context, so it cannot be encrypted")
    return ElementFields(names, key_fields, record_id)


def _type(path: str, kind: Any) -> Any:
    if isinstance(kind, str):
        if kind not in TYPE_NAMES:
            msg = f"the type of {path} is a Python type, or one of {', '.join(TYPE_NAMES)}, not {kind!r}"
            raise ValueError(msg)
        return _nullable(TYPE_NAMES[kind])
    present, nullable = without_null(kind)
    return _nullable(present) if nullable else kind  # of `str | None`, Beam's schemas make Any


def _nullable(kind: Any) -> Any:
    return Optional[kind]  # noqa: UP045  # Beam knows this form


def _shown(plan: FieldsPlan, keys: WriteKeys | ReadKeys) -> dict[str, Any]:
    return {
        "fields": ", ".join(map(str, plan.paths)),
        "deterministic": ", ".join(plan.scopes),
        "key": ", ".join(map(str, keys.keys)),
        "keys": keys.store.place,
        "missing": plan.missing,
    }


# ------------------------------------------------------------------------------------------------------ the work


class _Bundle:
    """What a bundle needs and did."""

    __slots__ = ("bytes_ciphertext", "bytes_plaintext", "cells", "change", "chosen", "failed", "records")

    def __init__(
        self, opened: Callable[[_Bundle, Any], Opening], keys: Any, release: Callable[[Opening], None]
    ) -> None:
        """Open what the keys are for; of templates, what each choice of keys needs when an element is of it."""
        self.chosen: Opened[Opening] = Opened(lambda values: opened(self, keys.filled(values)), release)
        self.change = None if keys.names else self.chosen(())[0]
        self.records = self.failed = self.cells = self.bytes_plaintext = self.bytes_ciphertext = 0

    def counts(self, done: str) -> dict[str, int]:
        counts = {f"records_{done}": self.records, f"cells_{done}": self.cells, "records_failed": self.failed}
        counts |= {"bytes_plaintext": self.bytes_plaintext, "bytes_ciphertext": self.bytes_ciphertext}
        return {name: count for name, count in counts.items() if count}


@typehints.with_input_types(Any)
@typehints.with_output_types(Any)
class _FieldsDoFn(KeyUsingDoFn[_Bundle]):
    """Changes one element after another."""

    def __init__(self, plan: FieldsPlan, record_id: Callable[[Any], str] | None, fields: ElementFields) -> None:
        self._plan, self._record_id, self._fields = plan, record_id, fields

    def process(self, element: Any) -> list[Any]:
        bundle = self.bundle
        try:
            changed = (bundle.change or self._chosen(element))(element)
        except FieldError as error:
            failure = error
        else:
            bundle.records += 1
            return [changed]
        if not self.catch:
            raise failure.error
        bundle.failed += 1
        name = "" if self._record_id is None else str(self._record_id(element))
        return [failed_record(failure.error, record_id=name, field=failure.path, ciphertext=failure.cell)]

    def _chosen(self, element: Any) -> Change:
        """Return what changes an element, under the keys that it chooses. Raises FieldError."""
        try:
            return self.bundle.chosen(self._fields(element))[0]
        except FormatError as error:
            raise FieldError("", error) from None


class _EncryptDoFn(_FieldsDoFn):
    def __init__(
        self,
        plan: FieldsPlan,
        keys: WriteKeys,
        encoding: Encoding,
        record_id: Callable[[Any], str] | None,
        fields: ElementFields = _NO_FIELDS,
    ) -> None:
        super().__init__(plan, record_id, fields)
        self._keys, self._encoding = keys, encoding

    def open(self) -> _Bundle:
        return _Bundle(self._opened, self._keys, lambda opening: self._keys.release(cast("Any", opening[1])))

    def close(self, bundle: _Bundle) -> Mapping[str, int]:
        bundle.chosen.close()
        return bundle.counts("encrypted")

    def _opened(self, bundle: _Bundle, keys: WriteKeys) -> Opening:
        encryptor = keys.encryptor()
        return self._plan.compiled(lambda path: self._encrypt(path, bundle, keys, encryptor)), encryptor

    def _encrypt(self, path: Path, bundle: _Bundle, keys: WriteKeys, encryptor: Any) -> Change:
        as_text = self._encoding == "base64"
        place = cell_place(str(path))
        if str(path) in self._plan.scopes:
            encryptor, place = keys.deterministic(), cell_place(self._plan.scope_of(path))
        encrypt = encryptor.encrypt

        def apply(value: Any) -> bytes | str | None:
            if value is None:
                return None
            try:
                if type(value) is bytes:
                    refuse_envelope(value)
                elif type(value) is str and value[:1] == "+":  # as the base64 of envelopes begins
                    refuse_envelope(from_base64(value[:BASE64_OF_PREFIX]) or b"")
                plaintext = encode_value(value)
                cell: bytes = encrypt(plaintext, place)
            except DEAD_LETTERS as error:
                failure = error
            else:
                bundle.cells += 1
                bundle.bytes_plaintext += len(plaintext)
                bundle.bytes_ciphertext += len(cell)
                return binascii.b2a_base64(cell, newline=False).decode() if as_text else cell
            raise FieldError(path, failure)

        return apply


class _DecryptDoFn(_FieldsDoFn):
    def __init__(
        self,
        plan: FieldsPlan,
        keys: ReadKeys,
        element_type: type | None,
        record_id: Callable[[Any], str] | None,
        fields: ElementFields = _NO_FIELDS,
    ) -> None:
        super().__init__(plan, record_id, fields)
        self._keys, self._element_type = keys, element_type

    def open(self) -> _Bundle:
        return _Bundle(self._opened, self._keys, lambda _: None)  # decryptors are the process's

    def _opened(self, bundle: _Bundle, keys: ReadKeys) -> Opening:
        decryptor = keys.decryptor()
        change = self._plan.compiled(lambda path: self._decrypt(path, decryptor, bundle))
        make = None if self._element_type is None else maker(self._element_type)
        return change if make is None else lambda element: make(change(element)), None

    def close(self, bundle: _Bundle) -> Mapping[str, int]:
        return bundle.counts("decrypted")

    def _decrypt(self, path: Path, decryptor: RecordDecryptor, bundle: _Bundle) -> Change:
        place, scope = cell_place(str(path)), cell_place(self._plan.scope_of(path))
        decrypt = decryptor.decrypt

        def apply(value: Any) -> Any:
            if value is None:
                return None
            cell = value if type(value) is bytes else None
            failure: EnvelopeError
            try:
                if cell is None:
                    cell = cell_of(value)
                plaintext = decrypt(cell, scope if cell[:1] == DETERMINISTIC_SUITE else place)
                opened = decode_value(plaintext)
            except DEAD_LETTERS as error:
                failure = error
            else:
                bundle.cells += 1
                bundle.bytes_plaintext += len(plaintext)
                bundle.bytes_ciphertext += len(cell)
                return opened
            # A cell that is none may be plaintext, which must not get into a dead letter.
            raise FieldError(path, failure, None if isinstance(failure, NotEncryptedError) else cell)

        return apply
