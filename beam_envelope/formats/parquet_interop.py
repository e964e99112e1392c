"""Parquet files whose keys the KMS itself wrapped, in the footer: for and from software that knows no key file.

This is the form of Parquet's key tools (`PKMT1` key material). What is written has double wrapping: for each KMS key
one random key encryption key of 128 bits (pyarrow makes no longer ones), which wraps the keys of footer and columns.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pyarrow.parquet.encryption as pe

from beam_envelope.errors import EnvelopeError, FormatError, KeyAccessError, TamperedError, WrongKeyError
from beam_envelope.formats.parquet_footer import FOOTER_KEY, KeyMaterial, first_row_group, read_footer
from beam_envelope.formats.parquet_keys import ColumnKeys
from beam_envelope.formats.parquet_source import Source
from beam_envelope.formats.parquet_unwrap import Keys
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.provider import DATA_KEY_SIZES, DataKey, KeyProvider, WrappedKey

_KEY_NAME: Final = re.compile(r"alias/[\w/-]+|[0-9A-Za-z-]+", re.ASCII)
_KEY_ID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|mrk-[0-9a-f]+", re.ASCII)
_OUR_NAME: Final = re.compile(r"k\d+", re.ASCII)
_OUR_TOKEN_BYTES: Final = 60
_UNIQUE_KEYS: Final = 1


def master_key_names(column_keys: ColumnKeys, context: Mapping[str, str]) -> list[str]:
    """Return for each of `column_keys.groups` the name that Parquet's key tools pass to the KMS.

    It is `alias/NAME` or the key's bare id: they cannot carry an ARN, which has colons.

    Raises:
        ValueError: these keys, or this context, cannot be said in a file with `interop=True`.
    """
    if context:
        raise ValueError(
            "interop=True goes without an encryption context: readers with a plain KmsClient have none to give. Leave "
            "out context=, or interop=True"
        )
    names: list[str] = []
    for group in column_keys.groups:
        if len(group) > _UNIQUE_KEYS:
            raise ValueError(
                f"interop=True takes one KMS key for the footer and one for each column, not any of several "
                f"({', '.join(map(str, group))}). Name one; columns= with different keys needs key=, for the footer"
            )
        name = _bare_name(_aws(group[0]).key_id)
        if _KEY_NAME.fullmatch(name) is None:
            raise ValueError(f"the KMS key {group[0]} has no name that Parquet libraries carry. Give it an alias")
        if name in names:
            raise ValueError(
                f"interop=True: two KMS keys are both called {name} without their account and region, which Parquet "
                "libraries cannot carry. Give one of them another alias"
            )
        names.append(name)
    return names


class WrappingClient(pe.KmsClient):  # type: ignore[misc]  # pyarrow has no types
    """What pyarrow takes for a KMS while it writes: has the KMS wrap each key encryption key.

    Attributes:
        wrapped: how many keys were wrapped.
    """

    def __init__(self, keys: Mapping[str, KeyProvider]) -> None:
        super().__init__()
        self._keys = dict(keys)
        self.wrapped = 0

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
        """Return KMS's ciphertext in base64, as a plain KmsClient does. Raises KeyAccessError, KmsUnavailableError."""
        with DataKey(key_bytes) as data_key:
            wrapped = self._keys[master_key_identifier].wrap(data_key, {})
        self.wrapped += 1
        return base64.b64encode(wrapped.wrapped).decode()


class KmsWrappedKeys(Keys):
    """The keys in the footer of one file that is read.

    The caller's keys decide which KMS key is asked; the name in the file only says which of them comes first.
    """

    def __init__(self, source: Source, keys: Sequence[KeyProvider], context: Mapping[str, str], what: str) -> None:
        """Unwrap the footer's key and look which key each column is under.

        Raises:
            NotEncryptedError, TruncatedError, TamperedError, FormatError: as `read_footer`.
            WrongKeyError, KeyAccessError, KmsUnavailableError: from the KMS.
            ValueError: a key is not of AWS KMS.
        """
        client = _UnwrappedClient(what)
        self._bare_keys = [_BareKms.of(key) for key in keys]
        super().__init__(self._bare_keys, context, what, client)
        self._tokens = client.tokens
        self._numbers: dict[tuple[str, str], int] = {}
        footer = read_footer(source, what)
        if in_key_file(footer.material):
            raise FormatError(
                f"{what} has its keys in a key file, not wrapped by a KMS in its footer. Open it without interop=True"
            )
        self._number(footer.material)
        self._unwrap(0)
        footer_key = footer.material.own_key(client.unwrapped(footer.material), what)
        columns = first_row_group(footer.open(footer_key, what), what)
        self._columns = [
            None if column is None else 0 if column == FOOTER_KEY else self._number(KeyMaterial.parse(column, what))
            for column in columns
        ]

    def assign(self, entry: bytes | None, leaves: Sequence[str]) -> dict[str, int | None]:
        """Take it from the key metadata of the columns. Raises FormatError."""
        del entry  # nothing wrote one here
        if not self._columns:  # no row group, so nothing to read
            return dict.fromkeys(leaves, 0)
        if len(self._columns) != len(leaves):
            raise FormatError(f"a row group of {self._what} lacks columns. Write it again")
        return dict(zip(leaves, self._columns, strict=True))

    def _number(self, material: KeyMaterial) -> int:
        """Return the number of what the KMS wrapped: several columns can be under one such key."""
        token = (material.master_key, material.token)
        if token not in self._numbers:
            self._numbers[token] = len(self._tokens)
            self._tokens.append(token)
            blob = _decode(material.token)
            self._wrapped.append((None, (WrappedKey(AwsKms.provider, material.master_key, blob),)))
        return self._numbers[token]

    def _unwrap(self, number: int) -> None:
        """Ask the key of that name first; another one only if that did not wrap it, or there is none."""
        form = self._wrapped[number][1][0]
        named = [key for key in self._bare_keys if key.is_called(form.kms_key)]
        others = [key for key in self._bare_keys if key not in named and key.may_open(form)]
        try:
            self._ask(named or self._bare_keys, number)
        except WrongKeyError:
            if not named or not others:
                raise
            self._ask(others, number)


def in_key_file(material: KeyMaterial) -> bool:
    """Whether a file has its keys in a key file: docs/format.md, the default form."""
    ours = _OUR_NAME.fullmatch(material.master_key) is not None and material.wrapped_kek is None
    return ours and len(_decode(material.token)) == _OUR_TOKEN_BYTES


class _UnwrappedClient(pe.KmsClient):  # type: ignore[misc]  # pyarrow has no types
    """What pyarrow takes for a KMS while it reads: knows what was unwrapped before, and makes no call.

    Attributes:
        failure: the error that the last `unwrap_key` raised.
        tokens: names of KMS keys, and what each wrapped.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what
        self.failure: EnvelopeError | None = None
        self.tokens: list[tuple[str, str]] = []
        self._open: dict[tuple[str, str], bytes] = {}

    def add(self, number: int, data_key: DataKey) -> None:
        """Take a key, which may be closed afterwards."""
        self._open[self.tokens[number]] = bytes(data_key.material)

    def unwrapped(self, material: KeyMaterial) -> bytes:
        """Return what the KMS unwrapped."""
        return self._open[material.master_key, material.token]

    def unwrap_key(self, wrapped_key: str, master_key_identifier: str) -> bytes:
        """Return a key that is open. Raises KeyAccessError."""
        found = self._open.get((master_key_identifier, wrapped_key))
        if found is None:
            msg = f"{self._what} has a column under the KMS key {master_key_identifier}, which is not open here"
            self.failure = KeyAccessError(msg)
            raise self.failure
        return found


class _BareKms(AwsKms):
    """An AWS KMS key that opens what names no ARN: Parquet's key tools keep a name and KMS's ciphertext, no more."""

    @classmethod
    def of(cls, key: KeyProvider) -> _BareKms:
        aws = _aws(key)
        return cls(aws.key_id, aws.region, aws.profile, aws.endpoint_url)

    def is_called(self, name: str) -> bool:
        """Whether a name in a file is that of this key."""
        return _bare_name(self.key_id) == _bare_name(name)

    def may_open(self, wrapped: WrappedKey) -> bool:
        """Rule out the key ids of other keys; an alias, or a name that the writer made up, may mean any."""
        ours, theirs = _bare_name(self.key_id), _bare_name(wrapped.kms_key)
        both_ids = _KEY_ID.fullmatch(ours) is not None and _KEY_ID.fullmatch(theirs) is not None
        return bool(wrapped.wrapped) and (ours == theirs or not both_ids)

    def unwrap(self, wrapped: WrappedKey, context: Mapping[str, str]) -> DataKey:
        """Call Decrypt with this key's id pinned."""
        try:
            answer: dict[str, Any] = self._call(
                "Decrypt", KeyId=self.key_id, CiphertextBlob=wrapped.wrapped, EncryptionContext=dict(context)
            )
        except WrongKeyError:
            raise WrongKeyError(f"KMS key {self.key_id} did not wrap the key under {wrapped.kms_key}") from None
        except TamperedError:
            raise TamperedError(
                f"KMS key {self.key_id} does not open the key under {wrapped.kms_key}: the file was changed, another "
                "KMS wrapped it, or the encryption context is another: give that which the writer gave to KMS"
            ) from None
        if len(answer["Plaintext"]) not in DATA_KEY_SIZES:
            raise TamperedError(f"what {self.key_id} decrypted has {len(answer['Plaintext'])} bytes, so it is no key")
        return DataKey(answer["Plaintext"], [WrappedKey(self.provider, answer["KeyId"], wrapped.wrapped)])


def _aws(key: KeyProvider) -> AwsKms:
    if not isinstance(key, AwsKms):
        msg = f"interop=True is for keys of AWS KMS, whose ciphertext a plain KmsClient passes on; not {key}"
        raise ValueError(msg)  # noqa: TRY004  # it is of the right type elsewhere
    return key


def _bare_name(name: str) -> str:
    """Return `alias/NAME` or the key id in an ARN; any other name as it is."""
    return name.rpartition(":")[2].removeprefix("key/") if name.startswith("arn:") else name


def _decode(token: str) -> bytes:
    """Return the KMS's ciphertext, or nothing: then no key of AWS KMS may have wrapped it."""
    try:
        return base64.b64decode(token, validate=True)
    except (binascii.Error, ValueError):
        return b""
