"""Columns of cells: plaintexts become envelopes under one key, and back, with no Python code per cell but the cipher.

docs/format.md, 9.2. Tables and their metadata are in table.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from cryptography.exceptions import InvalidTag

from beam_envelope.errors import FormatError, TamperedError, TruncatedError
from beam_envelope.formats import cell
from beam_envelope.formats.binary_array import Numbers, cut, data_of, fixed, join, offsets_of, payloads, valid_of
from beam_envelope.formats.cell_values import ONE_CELL, Failures, fail
from beam_envelope.formats.keyfile import RAW_CELL_CIPHER
from beam_envelope.formats.record import RecordDecryptor, RecordEncryptor, check_envelope
from beam_envelope.formats.record_key import (
    CIPHER_OF_SUITE,
    MIN_BYTES,
    NONCE_BYTES,
    PREFIX_BYTES,
    TAG_BYTES,
    RecordKey,
)
from beam_envelope.keys.cache import DataKeyPolicy
from beam_envelope.keys.provider import KEY_ID_BYTES

BLOCK_ROWS: Final = 1 << 14  # what a block needs stays in the cache of a core
BLOCK_BYTES: Final = 1 << 26
_LOW: Final = (1 << 64) - 1

# -------------------------------------------------------------------------------------------------- encrypt


def encrypt_cells(
    head: bytes, bodies: pa.Array, encryptor: RecordEncryptor, place: bytes, policy: DataKeyPolicy
) -> tuple[pa.Array, pa.Array]:
    """Encrypt a column, each cell on its own.

    Args:
        head: what the plaintext of each cell begins with.
        bodies: large_binary, what follows; null stays null.
        encryptor: of compact envelopes or of raw cells.
        place: what binds a cell to its column.
        policy: that of the encryptor.

    Returns:
        The encrypted cells, large_binary; and the key id of each in hexadecimal, a dictionary of strings.

    Raises:
        As `RecordEncryptor.encrypt`.
    """
    cells = join(pa.scalar(head, pa.large_binary()), bodies)
    present, sealed, runs = cells.drop_null(), [], []
    ids: list[str] = []
    for start, end in _blocks(offsets_of(present), policy.max_records, policy.max_bytes):
        block = present.slice(start, end - start)
        key, first = encryptor.reserve(end - start, int(offsets_of(block)[-1] - offsets_of(block)[0]))
        sealed.append(_encrypt_block(block, key, nonces(key, first, end - start), key.aad + place))
        if not ids or ids[-1] != key.key_id.hex():
            ids.append(key.key_id.hex())
        runs.append(np.full(end - start, len(ids) - 1, np.int32))
    numbers = np.zeros(len(cells), np.int32)
    valid = valid_of(cells)
    numbers[slice(None) if valid is None else valid] = np.concatenate([*runs, np.zeros(0, np.int32)])
    indices = pa.array(numbers, mask=None if valid is None else ~valid)
    key_ids = pa.DictionaryArray.from_arrays(indices, pa.array(ids, pa.string()))
    return _with_nulls(_concat(sealed), valid), key_ids


def encrypt_equal_cells(head: bytes, bodies: pa.Array, key: RecordKey, place: bytes) -> pa.Array:
    """Encrypt a column deterministically, each distinct cell once. Returns envelopes; for the rest see above."""
    encoded = bodies.dictionary_encode()
    aad, encrypt = [key.aad + place], key.siv.encrypt
    sealed = [encrypt(head + body, aad) for body in _slices(encoded.dictionary)]
    envelopes = join(pa.scalar(key.prefix, pa.large_binary()), _collect(sealed))
    return envelopes.take(encoded.indices)


def nonces(key: RecordKey, first: int, n: int) -> Numbers:
    """Return the nonces of n records, a row each: 96 bits, big-endian, `base_nonce ^ (first + i)`."""
    rows = np.empty((n, NONCE_BYTES), np.uint8)
    rows[:, :4] = np.frombuffer((key.base_nonce >> 64).to_bytes(4, "big"), np.uint8)
    low = np.arange(first, first + n, dtype=np.uint64) ^ np.uint64(key.base_nonce & _LOW)
    rows[:, 4:] = low.astype(">u8").view(np.uint8).reshape(n, 8)
    return rows


def _encrypt_block(block: pa.Array, key: RecordKey, nonce_rows: Numbers, aad: bytes) -> pa.Array:
    sealed = list(map(key.gcm.encrypt, _nonce_list(nonce_rows), _slices(block), itertools.repeat(aad)))
    heads = np.empty((len(block), len(key.prefix) + NONCE_BYTES), np.uint8)
    heads[:, : len(key.prefix)] = np.frombuffer(key.prefix, np.uint8)
    heads[:, len(key.prefix) :] = nonce_rows
    return join(fixed(heads), _collect(sealed, np.diff(offsets_of(block)) + TAG_BYTES))


def _blocks(offsets: Numbers, max_rows: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks that fit under one key and into memory; a larger cell goes alone."""
    rows, size, start = min(max_rows, BLOCK_ROWS), min(max_bytes, BLOCK_BYTES), 0
    while start < len(offsets) - 1:
        fits = int(np.searchsorted(offsets, offsets[start] + size, "right")) - 1
        end = max(start + 1, min(fits, start + rows, len(offsets) - 1))
        yield start, end
        start = end


def _nonce_list(rows: Numbers) -> list[bytes]:
    found: list[bytes] = (
        rows.view(f"V{NONCE_BYTES}").reshape(-1).tolist()
    )  # V, not S, which would drop zeros at the end
    return found


def _slices(array: pa.Array, skip: int = 0) -> list[bytes]:
    """Return the values of a large_binary array without nulls, from a byte on; much faster than to_pylist."""
    offsets = offsets_of(array)
    data = data_of(array)[offsets[0] : offsets[-1]].tobytes()
    starts, ends = (offsets[:-1] - offsets[0] + skip).tolist(), (offsets[1:] - offsets[0]).tolist()
    return [data[start:end] for start, end in zip(starts, ends, strict=True)]


def _collect(values: list[Any], lengths: Numbers | None = None) -> pa.Array:
    """Return bytes, whose lengths may be known, as a large_binary array; null for None."""
    valid = None
    if lengths is None:
        if None in values:
            valid = np.array([value is not None for value in values], bool)
            values = [value or b"" for value in values]
        lengths = np.fromiter(map(len, values), np.int64, len(values))
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return payloads(len(values), offsets, pa.py_buffer(b"".join(values)), valid)


def _concat(arrays: list[pa.Array]) -> pa.Array:
    if not arrays:
        return pa.array([], pa.large_binary())
    return arrays[0] if len(arrays) == 1 else pa.concat_arrays(arrays)


def _with_nulls(array: pa.Array, valid: Numbers | None) -> pa.Array:
    """Return an array with a null at each row that is not valid; the data stays where it is."""
    if valid is None:
        return array
    offsets = offsets_of(array)
    kept = valid.copy()
    kept[valid] = np.asarray(array.is_valid())
    return payloads(len(valid), offsets[np.concatenate([[0], np.cumsum(valid)])], data_of(array), kept)


# -------------------------------------------------------------------------------------------------- decrypt

Opener: TypeAlias = Callable[[bytes], tuple[RecordKey, int]]
"""From what names a key, to the key and the length of what stands before the nonce; it raises as `decrypt_cells`."""


def decrypt_cells(
    envelopes: pa.Array, decryptor: RecordDecryptor, places: tuple[bytes, bytes], failures: Failures | None = None
) -> pa.Array:
    """Decrypt a column of envelopes.

    Args:
        envelopes: large_binary.
        decryptor: finds the keys.
        places: what binds the cells to their column; and, if they are deterministic, to their scope.
        failures: takes the errors of single cells, whose plaintext is then null; None: the first one is raised.

    Returns:
        The cells, large_binary.

    Raises:
        As `RecordDecryptor.decrypt`.
    """

    def open_key(head: bytes) -> tuple[RecordKey, int]:
        if len(head) < PREFIX_BYTES:
            check_envelope(head)
        suite = head[:1]
        if suite not in CIPHER_OF_SUITE:
            check_envelope(head)
        return decryptor.key(head[1:], CIPHER_OF_SUITE[suite]), MIN_BYTES[suite]

    for first in envelopes.drop_null()[:1]:
        head = first.as_py()[:PREFIX_BYTES]
        if len(head) == PREFIX_BYTES and pc.all(pc.starts_with(envelopes, pattern=head)).as_py():  # as is usual
            names = pa.DictionaryArray.from_arrays(
                np.zeros(len(envelopes), np.int32), pa.array([head], pa.large_binary())
            )
            return _decrypt(envelopes, names, open_key, places, failures)
    return _decrypt(envelopes, cut(envelopes, 0, PREFIX_BYTES).dictionary_encode(), open_key, places, failures)


def decrypt_raw_cells(
    cells: pa.Array, key_ids: pa.Array, decryptor: RecordDecryptor, place: bytes, failures: Failures | None = None
) -> pa.Array:
    """Decrypt a column of raw cells. `key_ids` names their keys in hexadecimal; for the rest see `decrypt_cells`."""

    def open_key(name: bytes) -> tuple[RecordKey, int]:
        try:
            key_id = bytes.fromhex(name.decode())
        except ValueError:
            key_id = b""
        if len(key_id) != KEY_ID_BYTES:
            raise FormatError("the key id beside a cell is missing, or is not 32 hexadecimal digits")
        return decryptor.key(key_id, RAW_CELL_CIPHER), NONCE_BYTES + TAG_BYTES

    names = cell.encode(key_ids).fill_null(b"")
    return _decrypt(cells, names.dictionary_encode(), open_key, (place, place), failures)


def _decrypt(
    envelopes: pa.Array, names: pa.Array, open_key: Opener, places: tuple[bytes, bytes], failures: Failures | None
) -> pa.Array:
    valid = valid_of(envelopes)
    numbers = np.arange(len(envelopes)) if valid is None else np.flatnonzero(valid)
    present = envelopes.drop_null()
    which = np.asarray(names.indices if valid is None else names.indices.filter(pa.array(valid)))
    order = np.argsort(which, kind="stable")
    bounds = np.searchsorted(which[order], np.arange(len(names.dictionary) + 1))
    opened = []
    for name, (start, end) in zip(_slices(names.dictionary), itertools.pairwise(bounds.tolist()), strict=True):
        if start == end:
            continue
        rows = order[start:end]
        group = present if len(rows) == len(present) else present.take(pa.array(rows))
        errors: Failures = {}
        try:
            key, least = open_key(name)
            opened.append(_decrypt_group(group, key, least, key.aad + places[key.deterministic], errors))
        except ONE_CELL as error:
            errors = dict.fromkeys(range(len(rows)), error)
            opened.append(pa.nulls(len(rows), pa.large_binary()))
        if errors and failures is None:
            raise next(iter(errors.values()))
        if failures is not None:
            failures.update({int(numbers[rows[row]]): error for row, error in errors.items()})
    cells = _concat(opened)
    if len(opened) > 1:
        cells = cells.take(pa.array(np.argsort(order)))
    return _with_nulls(cells, valid)


def _decrypt_group(group: pa.Array, key: RecordKey, least: int, aad: bytes, errors: Failures) -> pa.Array:
    """Decrypt cells of one key. Rows that fail are null, and in `errors`."""
    short = np.flatnonzero(np.diff(offsets_of(group)) < least)
    if len(short):
        cut_short = TruncatedError(f"a cell has fewer bytes than the {least} that each has at least. It was cut short")
        group = fail(group, short, cut_short, errors)
    if key.deterministic:
        encoded, aads = group.dictionary_encode(), [aad]
        sealed = _slices(encoded.dictionary, len(key.prefix))
        cells = _collect([_open_one(key.siv.decrypt, one, aads) for one in sealed]).take(encoded.indices)
    else:
        present = group.drop_null()
        blocks = [
            _decrypt_block(present.slice(start, end - start), key, aad)
            for start, end in _blocks(offsets_of(present), BLOCK_ROWS, BLOCK_BYTES)
        ]
        cells = _with_nulls(_concat(blocks), valid_of(group))
    if cells.null_count > len(short):
        error = TamperedError(
            f"a cell, under the key {key.key_id.hex()}, was changed after it was written, or comes from another place: "
            "another column or scope"
        )
        bad = np.setdiff1d(np.flatnonzero(np.asarray(cells.is_null())), short)
        errors.update(dict.fromkeys(bad.tolist(), error))
    return cells


def _decrypt_block(block: pa.Array, key: RecordKey, aad: bytes) -> pa.Array:
    """Decrypt cells without nulls; those that are not authentic become null."""
    at = len(key.prefix)
    offsets, data = offsets_of(block), data_of(block)
    windows = np.lib.stride_tricks.sliding_window_view(data, NONCE_BYTES)
    nonce_list = _nonce_list(windows[offsets[:-1] + at])
    sealed, lengths = _slices(block, at + NONCE_BYTES), np.diff(offsets) - (at + NONCE_BYTES + TAG_BYTES)
    try:
        return _collect(list(map(key.gcm.decrypt, nonce_list, sealed, itertools.repeat(aad))), lengths)
    except (InvalidTag, ValueError):  # one of them; which?
        return _collect(
            [_open_one(key.gcm.decrypt, nonce, one, aad) for nonce, one in zip(nonce_list, sealed, strict=True)]
        )


def _open_one(decrypt: Callable[..., bytes], *arguments: Any) -> bytes | None:
    try:
        return decrypt(*arguments)
    except (InvalidTag, ValueError):
        return None
