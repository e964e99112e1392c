"""Chosen columns of Arrow tables and record batches, encrypted and decrypted. docs/format.md, 9.2.

The type of a column is kept twice: in each cell, authenticated; and in the metadata of its field, with what no cell
holds: nullability, names inside of lists, dictionaries, extensions, and the metadata that was there before.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_envelope.errors import (
    AlreadyEncryptedError,
    ContextMismatchError,
    EnvelopeError,
    FormatError,
    NotEncryptedError,
)
from beam_envelope.formats import cell, column, raw_cell
from beam_envelope.formats.arrow_path import KEY_ID_SUFFIX, Column, Place, Table, replace_column
from beam_envelope.formats.binary_array import narrow, offsets_of
from beam_envelope.formats.cell_type import value_type
from beam_envelope.formats.cell_values import ONE_CELL, Failures, decode_each, from_cells, to_cells
from beam_envelope.formats.dataset_key import DeterministicEncryptor
from beam_envelope.formats.record import RecordDecryptor, RecordEncryptor, cell_place, refuse_envelope
from beam_envelope.formats.record_key import DETERMINISTIC_SUITE
from beam_envelope.keys.cache import DataKeyPolicy

Layout: TypeAlias = Literal["compact", "raw"]

METADATA_KEY: Final = b"beam_envelope"
_VERSION: Final = 1
_MAX_BINARY: Final = 2**31 - 1
_KEY_ID_TYPE: Final = pa.dictionary(pa.int32(), pa.string())


class FailedCell(NamedTuple):
    """A cell that could not be decrypted.

    Attributes:
        row: its number in the table.
        column: the path of its column.
        error: why.
        ciphertext: what is there.
    """

    row: int
    column: str
    error: EnvelopeError
    ciphertext: bytes


@dataclass
class Counts:
    """What was done: cells that are not null, and their bytes before and after."""

    of: Counter[str] = field(default_factory=Counter)

    def add(self, cells: str, n: int, plaintext_bytes: int, ciphertext_bytes: int) -> None:
        """Count the cells of a column."""
        self.of[cells] += n
        self.of["bytes_plaintext"] += plaintext_bytes
        self.of["bytes_ciphertext"] += ciphertext_bytes


def encrypt_columns(
    table: Table,
    columns: Iterable[str],
    encryptor: RecordEncryptor,
    *,
    deterministic: Mapping[str, str] | None = None,
    dataset_key: DeterministicEncryptor | None = None,
    layout: Layout = "compact",
    policy: DataKeyPolicy | None = None,
    counts: Counts | None = None,
) -> Table:
    """Encrypt columns of a table, each cell on its own; null stays null.

    Args:
        table: a table or record batch.
        columns: their names; `address.street` is a child of a struct.
        encryptor: of compact envelopes; for raw cells, of the cipher `cell-aes-256-gcm`.
        deterministic: which of them are encrypted deterministically, and the scope of each: equal values in columns of
            one scope become equal cells.
        dataset_key: what does that.
        layout: `compact`: binary columns of envelopes; `raw`: of nonce, ciphertext and tag, which SQL engines read, and
            beside each column, `<name>_key_id` says which key opens it.
        policy: that of the encryptor, if it is not the default.
        counts: is added to.

    Returns:
        A new table, or record batch.

    Raises:
        AlreadyEncryptedError: a column is encrypted already.
        TypeError, ValueError: there is no such column, or there are two; or its values cannot be encrypted, or not in
            this layout.
        KeyAccessError, KmsUnavailableError, OSError: a new key was due, and the KMS or the key store failed.
    """
    job = _Encrypt(
        encryptor, dict(deterministic or {}), dataset_key, layout, policy or DataKeyPolicy(), counts or Counts()
    )
    for path in columns:
        table = replace_column(table, path, job)
    return table


@dataclass
class _Encrypt:
    encryptor: RecordEncryptor
    deterministic: dict[str, str]
    dataset_key: DeterministicEncryptor | None
    layout: Layout
    policy: DataKeyPolicy
    counts: Counts

    def __call__(self, place: Place, values: pa.Array, key_ids: pa.Array | None) -> tuple[list[Column], bool]:
        path, before, _ = place
        if METADATA_KEY in (before.metadata or {}):
            raise AlreadyEncryptedError(f"the column {path!r} is encrypted already. Decrypt it first, or leave it out")
        if self.layout == "raw" and key_ids is not None:
            raise ValueError(f"there is a column {path + KEY_ID_SUFFIX!r} already, where the key ids go. Rename it")
        head, bodies = self._cells(path, values)
        n, scope = len(bodies) - bodies.null_count, self.deterministic.get(path)
        ids = pa.nulls(len(bodies), _KEY_ID_TYPE)
        if n == 0:
            sealed = bodies
        elif scope is not None and self.dataset_key is not None:
            sealed = column.encrypt_equal_cells(head, bodies, self.dataset_key.key(), cell_place(scope))
        else:
            where = path.encode() if self.layout == "raw" else cell_place(path)
            sealed, ids = column.encrypt_cells(head, bodies, self.encryptor, where, self.policy)
        self.counts.add("cells_encrypted", n, _size(bodies) + n * len(head), _size(sealed))
        note = _Note(self.layout, scope is not None, scope or path, before).write()
        columns: list[Column] = [(pa.field(before.name, pa.binary(), before.nullable, note), _narrow(sealed))]
        if self.layout == "raw":
            columns.append((pa.field(before.name + KEY_ID_SUFFIX, _KEY_ID_TYPE, before.nullable), [ids]))
        return columns, False

    def _cells(self, path: str, values: pa.Array) -> tuple[bytes, pa.Array]:
        try:
            if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
                for first in values.drop_null()[:1]:
                    refuse_envelope(first.as_py())
            return (b"", raw_cell.to_raw(values)) if self.layout == "raw" else to_cells(values)
        except (TypeError, ValueError, AlreadyEncryptedError) as error:
            raise type(error)(f"the column {path!r} cannot be encrypted: {error}") from None


def _size(array: pa.Array) -> int:
    """Return how many bytes the values of a large_binary array have."""
    return int(pc.sum(pc.binary_length(array)).as_py() or 0)


def _narrow(sealed: pa.Array) -> list[pa.Array]:
    """Return large_binary as chunks of binary, whose type does not depend on the data."""
    offsets, start, chunks = offsets_of(sealed), 0, []
    while start < len(sealed):
        end = int(np.searchsorted(offsets, offsets[start] + _MAX_BINARY, "right")) - 1
        chunks.append(narrow(sealed.slice(start, end - start), pa.binary()))
        start = end
    return chunks or [pa.array([], pa.binary())]


def decrypt_columns(
    table: Table,
    columns: Iterable[str] | Mapping[str, pa.DataType],
    decryptor: RecordDecryptor,
    *,
    deterministic: Mapping[str, str] | None = None,
    failures: list[FailedCell] | None = None,
    counts: Counts | None = None,
) -> Table:
    """Decrypt columns of a table. Each comes back as it was; where its field's metadata got lost, as its cells say.

    Args:
        table: a table or record batch.
        columns: their names; or a mapping from name to type, for columns whose metadata got lost.
        decryptor: finds the keys.
        deterministic: the scopes of deterministic columns that were not encrypted under their own name.
        failures: takes the cells that cannot be decrypted, the first of each row, and the row is left out of the
            result; None: the first one is raised. Errors of the KMS are raised.
        counts: is added to.

    Returns:
        A new table, or record batch.

    Raises:
        NotEncryptedError, TruncatedError, FormatError, TamperedError: cells are none of ours, or were changed or moved.
        ContextMismatchError, WrongKeyError, KeyFileMissingError: the context, key or key store is not the writer's; or
            a column was encrypted under a scope that was not given.
        KeyAccessError, KmsUnavailableError: from the KMS.
        ValueError: there is no such column, or there are two.
    """
    types = dict(columns) if isinstance(columns, Mapping) else {}
    job = _Decrypt(decryptor, types, dict(deterministic or {}), None if failures is None else {}, counts or Counts())
    for path in columns:
        table = replace_column(table, path, job)
    if job.failed:
        good = np.ones(table.num_rows, bool)
        good[list(job.failed)] = False
        table = table.filter(pa.array(good))
        cast("list[FailedCell]", failures).extend(job.failed[row] for row in sorted(job.failed))
    return table


@dataclass
class _Decrypt:
    decryptor: RecordDecryptor
    types: dict[str, pa.DataType]
    deterministic: dict[str, str]
    failed: dict[int, FailedCell] | None
    counts: Counts

    def __call__(self, place: Place, values: pa.Array, key_ids: pa.Array | None) -> tuple[list[Column], bool]:
        path, now, row = place
        note = _Note.read(now, path)
        raw = key_ids is not None if note is None else note.layout == "raw"
        before = now.remove_metadata() if note is None else note.field.with_name(now.name)
        sealed = _envelopes(path, values)
        kind = self.types.get(path, None if note is None else before.type)
        errors: Failures | None = None if self.failed is None else {}
        try:
            if raw:
                chunks = self._open_raw(path, sealed, key_ids, kind or pa.binary(), errors)
            else:
                chunks = self._open(path, sealed, note, kind, errors)
        except ONE_CELL as error:
            raise type(error)(f"the column {path!r}: {error}") from None
        for number, failure in (errors or {}).items():
            failed = FailedCell(row + number, path, failure, sealed[number].as_py())
            cast("dict[int, FailedCell]", self.failed).setdefault(failed.row, failed)
        if not pa.types.is_null(chunks[0].type):
            self.types.setdefault(path, chunks[0].type)  # of the next chunks
        return [(before.with_type(chunks[0].type), chunks)], raw

    def _open(
        self, path: str, sealed: pa.Array, note: _Note | None, kind: pa.DataType | None, errors: Failures | None
    ) -> list[pa.Array]:
        scope = self.deterministic.get(path, path)
        if note is not None and note.deterministic and note.scope != scope:
            raise ContextMismatchError(
                f"it says that it was encrypted under the scope {note.scope!r}, but is read under {scope!r}. If that "
                f"is right, give deterministic={{{path!r}: {note.scope!r}}}"
            )
        places = cell_place(path), cell_place(scope)

        def decode(part: pa.Array, failures: Failures | None) -> pa.Array:
            return from_cells(part, kind, failures)

        if not _is_deterministic(sealed):
            cells = column.decrypt_cells(sealed, self.decryptor, places, errors)
            self.counts.add("cells_decrypted", len(cells) - cells.null_count, _size(cells), _size(sealed))
            return _in_parts(decode, cells, errors)
        encoded = sealed.dictionary_encode()
        bad: Failures | None = None if errors is None else {}
        cells = column.decrypt_cells(encoded.dictionary, self.decryptor, places, bad)
        self._count_equal(encoded, cells, sealed)
        if kind is None or not _can_take(kind):
            chunks = _in_parts(decode, cells.take(encoded.indices), errors)
        else:
            chunks = [decode(cells, bad).take(encoded.indices)]
        if errors is not None and bad:
            number = encoded.indices.fill_null(-1).to_numpy()
            errors.update({row: bad[number[row]] for row in np.flatnonzero(np.isin(number, list(bad))).tolist()})
        return chunks

    def _count_equal(self, encoded: pa.DictionaryArray, cells: pa.Array, sealed: pa.Array) -> None:
        times = np.bincount(encoded.indices.drop_null().to_numpy(), minlength=len(cells))
        n = int(times[np.asarray(cells.is_valid())].sum())
        self.counts.add("cells_decrypted", n, int(times @ np.diff(offsets_of(cells))), _size(sealed))

    def _open_raw(
        self, path: str, sealed: pa.Array, key_ids: pa.Array | None, kind: pa.DataType, errors: Failures | None
    ) -> list[pa.Array]:
        if key_ids is None:
            raise FormatError(f"the column {path + KEY_ID_SUFFIX!r} that says which keys open it is missing")
        cells = column.decrypt_raw_cells(sealed, key_ids, self.decryptor, path.encode(), errors)
        self.counts.add("cells_decrypted", len(cells) - cells.null_count, _size(cells), _size(sealed))

        def decode(part: pa.Array, failures: Failures | None) -> pa.Array:
            return decode_each(lambda values: raw_cell.from_raw(values, kind), part, failures)

        return _in_parts(decode, cells, errors)


def _is_deterministic(sealed: pa.Array) -> bool:
    return any(first.as_py()[:1] == DETERMINISTIC_SUITE for first in sealed.drop_null()[:1])


def _can_take(kind: pa.DataType) -> bool:
    """Whether pyarrow can put values of a type where they belong faster than payloads can be decoded."""
    types = pa.types
    view = types.is_string_view(kind) or types.is_binary_view(kind)
    return types.is_primitive(kind) or (cell.is_text(kind) and not view)


def _envelopes(path: str, values: pa.Array) -> pa.Array:
    """Return a column of envelopes as large_binary, however it was stored."""
    kind = value_type(values.type)
    if pa.types.is_null(kind) or pa.types.is_fixed_size_binary(kind) or (cell.is_text(kind) and "binary" in str(kind)):
        return cell.encode(values)
    raise NotEncryptedError(f"the column {path!r} is of type {values.type}; encrypted cells are binary")


def _in_parts(
    decode: Callable[[pa.Array, Failures | None], pa.Array], cells: pa.Array, errors: Failures | None
) -> list[pa.Array]:
    """Decode into one array, or, where the type cannot hold so much in one, into several."""
    try:
        return [decode(cells, errors)]
    except cell.TooLargeError:
        if len(cells) == 1:
            raise
    middle = len(cells) // 2
    late: Failures | None = None if errors is None else {}
    parts = _in_parts(decode, cells[:middle], errors) + _in_parts(decode, cells[middle:], late)
    if errors is not None and late:
        errors.update({middle + row: error for row, error in late.items()})
    return parts


# ----------------------------------------------------------------------------------------------- metadata


@dataclass(frozen=True)
class _Note:
    """What the metadata of an encrypted column's field says."""

    layout: str
    deterministic: bool
    scope: str
    field: pa.Field

    def write(self) -> dict[bytes, bytes]:
        schema = base64.b64encode(pa.schema([self.field]).serialize().to_pybytes()).decode()
        note = {
            "version": _VERSION, "layout": self.layout, "deterministic": self.deterministic, "scope": self.scope,
            "field": schema,
        }  # fmt: skip
        return {METADATA_KEY: json.dumps(note).encode()}

    @classmethod
    def read(cls, now: pa.Field, path: str) -> _Note | None:
        raw = (now.metadata or {}).get(METADATA_KEY)
        if raw is None:
            return None
        try:
            note = json.loads(raw)
            (before,) = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(note["field"], validate=True)))
            read = cls(note["layout"], note["deterministic"], note["scope"], before)
            known = note["version"] == _VERSION and read.layout in {"compact", "raw"} and isinstance(read.scope, str)
        except (ValueError, TypeError, KeyError, OSError, RecursionError, pa.ArrowException):
            known = False
        if not known:
            raise FormatError(f"the metadata of the column {path!r} have a form, or a version, that is not known here")
        return read
