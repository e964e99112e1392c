"""The keys of an encrypted Parquet file: which column is under which data key, and how Parquet's own keys are wrapped.

Parquet encrypts each column with a key of its own. Each of those is wrapped here, in this process, under a key derived
from one of the file's data keys; only the data keys are wrapped by a KMS, in the key file. Bytes: docs/format.md, 10.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, TypeVar

import pyarrow.parquet.encryption as pe
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from beam_envelope.errors import (
    EnvelopeError,
    FormatError,
    KeyAccessError,
    TamperedError,
    WrongKeyError,
)
from beam_envelope.formats.keyfile import MAX_DATA_KEYS, MAX_WRAPPED_KEYS
from beam_envelope.formats.parquet_columns import Paths
from beam_envelope.keys import cache
from beam_envelope.keys.cache import DataKeyPolicy
from beam_envelope.keys.choice import Values, context_gaps, fill_context
from beam_envelope.keys.provider import DataKey, KeyProvider
from beam_envelope.keys.uri import Key, fill_key, key_gaps, open_keys

COLUMNS_ENTRY: Final = "beam-envelope.columns"
"""The entry of the Parquet footer's key-value metadata that says which column is under which data key."""
_LABEL: Final = b"beam-envelope/parquet@v1\x00"
_WRAPPING_KEY_BYTES: Final = 32
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_REST: Final = "rest"
_COLUMNS: Final = "columns"
_PLAIN: Final = "plain"


@dataclass(frozen=True)
class ColumnKeys:
    """Which KMS keys a file's data keys are under, and which columns each is for. Hashable; pickles cleanly.

    Attributes:
        groups: for each data key the KMS keys, any of which opens it. The first is the footer's.
        named: names of columns, each with the number of its data key.
        rest: the number of the data key of all other columns, or None: they are plain.
    """

    groups: tuple[tuple[KeyProvider, ...], ...]
    named: tuple[tuple[str, int], ...]
    rest: int | None

    @classmethod
    def of(
        cls,
        key: Key | Sequence[Key] | None,
        columns: Mapping[str, Key | Sequence[Key]] | None,
        *,
        templates: bool = False,
    ) -> ColumnKeys:
        """Return what `create_parquet` makes of its arguments. The caller fills templates, where they are allowed.

        Raises:
            ValueError, TypeError, FormatError: an argument is not of the right form.
        """
        opened = partial(open_keys, templates=templates, lists=False)
        named = {name: opened(keys) for name, keys in (columns or {}).items()}
        distinct: dict[frozenset[KeyProvider], tuple[KeyProvider, ...]] = {}
        for keys in named.values():
            distinct.setdefault(frozenset(keys), keys)
        if key is not None:
            footer = opened(key)
        elif not named:
            raise ValueError("no key was given; pass key='aws-kms://alias/...', or columns= with a key for each")
        else:
            footer = tuple(dict.fromkeys(provider for keys in named.values() for provider in keys))
            if len(footer) > MAX_WRAPPED_KEYS:
                raise ValueError(
                    f"the columns are under {len(footer)} KMS keys, each of which would have to open the footer; "
                    f"{MAX_WRAPPED_KEYS} can. Pass key= as well: a KMS key for the footer that all readers may use"
                )
        others = [keys for group, keys in distinct.items() if group != frozenset(footer)]
        groups = (footer, *others)
        if len(groups) > MAX_DATA_KEYS:
            raise ValueError(f"the columns are under {len(groups)} sets of KMS keys; a file can have {MAX_DATA_KEYS}")
        numbers = {frozenset(group): number for number, group in enumerate(groups)}
        return cls(
            groups,
            tuple((name, numbers[frozenset(keys)]) for name, keys in named.items()),
            None if key is None else 0,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the gaps of templates among the keys, each once."""
        return key_gaps([key for group in self.groups for key in group])

    def filled(self, named: Mapping[str, str]) -> ColumnKeys:
        """Return the same without gaps. Raises as `fill_key`."""
        if not named:
            return self
        groups = tuple(tuple(dict.fromkeys(fill_key(key, named) for key in group)) for group in self.groups)
        return replace(self, groups=groups)

    def assign(self, leaves: Sequence[str]) -> dict[str, int | None]:
        """Return for each leaf the number of its data key, or None if it is plain.

        Raises:
            ValueError: a name is unknown, or two names of different keys mean the same column, or a column's name is
                one that cannot be encrypted alone.
        """
        paths = Paths(leaves)
        assigned: dict[str, int | None] = {}
        for name, number in self.named:
            for leaf in paths.below(name):
                if assigned.setdefault(leaf, number) != number:
                    raise ValueError(f"the column {leaf} is named twice, for different KMS keys. Name it once")
        assigned = {leaf: assigned.get(leaf, self.rest) for leaf in leaves}
        if not is_uniform(assigned):
            _check_names(leaves, assigned)
        return assigned

    def generate(self, context: Mapping[str, str]) -> list[DataKey]:
        """Have the KMSs generate the data keys; the taker closes them.

        Raises:
            KeyAccessError, KmsUnavailableError: from the KMS.
        """
        data_keys: list[DataKey] = []
        try:
            data_keys.extend(cache.generate_data_key(group, context) for group in self.groups)
        except BaseException:
            for data_key in data_keys:
                data_key.close()
            raise
        return data_keys


_Chosen = TypeVar("_Chosen", bound="ColumnChoice")


@dataclass(frozen=True)
class ColumnChoice:
    """The KMS keys of columns and the encryption context, with or without gaps. Configuration only, so it travels.

    Attributes:
        column_keys: which columns are under which KMS keys.
        context: the encryption context.
        policy: when to ask the KMS for new data keys.
    """

    column_keys: ColumnKeys
    context: Mapping[str, str]
    policy: DataKeyPolicy

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the gaps, each once; none where there are no templates."""
        return tuple(dict.fromkeys((*self.column_keys.names, *context_gaps(tuple(self.context.items())))))

    def filled(self: _Chosen, values: Values) -> _Chosen:  # noqa: PYI019  # typing.Self came with Python 3.11
        """Return the same without gaps; the values are in the order of `names`. Raises as `KeyChoice.filled`."""
        if not values:
            return self
        named = dict(zip(self.names, values, strict=True))
        context: Any = fill_context(tuple(self.context.items()), named)
        return replace(self, column_keys=self.column_keys.filled(named), context=dict(context))


def is_uniform(assigned: Mapping[str, int | None]) -> bool:
    """Whether everything is under the footer's data key: then Parquet has one key for the whole file."""
    return all(number == 0 for number in assigned.values())


def _check_names(leaves: Sequence[str], assigned: Mapping[str, int | None]) -> None:
    """Refuse what Parquet libraries cannot say: they pass columns as text, `key: column, column; key: ...`."""
    if len(assigned) < len(leaves):
        raise ValueError(
            "two columns have the same name, so they cannot have different keys. Rename one, or encrypt the whole file "
            "under one key (key= without columns=)"
        )
    for leaf, number in assigned.items():
        if number is not None and (set(leaf) & set(":,;") or leaf != leaf.strip() or not leaf):
            raise ValueError(
                f"the column {leaf!r} cannot have a key of its own: Parquet libraries take no ':', ',' or ';' in its "
                "name, nor spaces around it. Rename it, or encrypt the whole file under one key (key= without columns=)"
            )


def key_name(number: int) -> str:
    """Return the name of a data key inside of Parquet."""
    return f"k{number}"


def encode_columns(assigned: Mapping[str, int | None]) -> bytes | None:
    """Return the entry for the Parquet footer, or None if everything is under the footer's data key."""
    if is_uniform(assigned):
        return None
    columns: dict[str, list[str]] = {}
    for leaf, number in assigned.items():
        columns.setdefault(_PLAIN if number is None else key_name(number), []).append(leaf)
    # The largest of the lists is left out: it is the rest.
    rest = max(columns, key=lambda name: len(columns[name]))
    del columns[rest]
    return json.dumps({_COLUMNS: columns, _REST: rest}, ensure_ascii=False).encode()


def decode_columns(entry: bytes | None, leaves: Sequence[str], count: int, what: str) -> dict[str, int | None]:
    """Return what `encode_columns` was given. The footer that it comes from is authentic.

    Args:
        entry: the entry, if there is one.
        leaves: all leaves of the file.
        count: how many data keys there are.
        what: the file, for the message.

    Raises:
        FormatError: it says nothing that makes sense.
    """
    assigned: dict[str, int | None] = dict.fromkeys(leaves, 0)
    if entry is None:
        return assigned
    numbers: dict[str, int | None] = {key_name(number): number for number in range(count)}
    numbers[_PLAIN] = None
    try:
        document: Any = json.loads(entry)
        assigned = dict.fromkeys(leaves, numbers[document[_REST]])
        named = {leaf: numbers[name] for name, columns in document[_COLUMNS].items() for leaf in columns}
        unknown = named.keys() - assigned.keys()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        unknown = {""}
    if unknown:
        msg = f"the footer of {what} does not say which columns are under which key ({COLUMNS_ENTRY}). Write it again"
        raise FormatError(msg)
    return assigned | named


class LocalClient(pe.KmsClient):  # type: ignore[misc]  # pyarrow has no types
    """What pyarrow takes for a KMS: wraps Parquet's keys under the data keys, in this process and at once.

    One for each file: pyarrow can deadlock where two threads share one.

    Attributes:
        failure: the error that the last `unwrap_key` raised: it tells more than what pyarrow makes of it.
        wrapped: how many keys were wrapped.
    """

    def __init__(self, binding: bytes, what: str) -> None:
        super().__init__()
        self._binding, self._what = binding, what
        self._ciphers: dict[str, AESGCM] = {}
        self.failure: EnvelopeError | None = None
        self.wrapped = 0

    def add(self, number: int, data_key: DataKey) -> None:
        """Take a data key, which may be closed afterwards."""
        kdf = HKDFExpand(hashes.SHA512(), _WRAPPING_KEY_BYTES, _LABEL + self._binding)
        self._ciphers[key_name(number)] = AESGCM(kdf.derive(data_key.material))

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
        """Wrap one of Parquet's keys."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._ciphers[master_key_identifier].encrypt(nonce, key_bytes, self._aad(master_key_identifier))
        self.wrapped += 1
        return base64.b64encode(nonce + sealed).decode()

    def unwrap_key(self, wrapped_key: str, master_key_identifier: str) -> bytes:
        """Unwrap one of Parquet's keys. Raises WrongKeyError, TamperedError, KeyAccessError."""
        try:
            return self._unwrap(wrapped_key, master_key_identifier)
        except EnvelopeError as error:
            self.failure = error
            raise

    def _unwrap(self, wrapped_key: str, name: str) -> bytes:
        cipher = self._ciphers.get(name)
        if cipher is None:
            raise KeyAccessError(f"{self._what} has a column under the data key {name!r}, which is not open here")
        try:
            token = base64.b64decode(wrapped_key, validate=True)
        except (binascii.Error, ValueError):
            token = b""
        if len(token) != _NONCE_BYTES + _KEY_BYTES + _TAG_BYTES:
            raise TamperedError(f"{self._what} was changed after it was written: a key in it has the wrong form")
        try:
            return cipher.decrypt(token[:_NONCE_BYTES], token[_NONCE_BYTES:], self._aad(name))
        except InvalidTag:
            msg = (
                f"{self._what} and its key file do not belong together: one of them was swapped or changed after "
                "it was written. Restore both from one copy"
            )
            raise WrongKeyError(msg) from None

    def _aad(self, name: str) -> bytes:
        return self._binding + name.encode()
