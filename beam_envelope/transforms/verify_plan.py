"""What VerifyShards finds and how it checks one file, or one part of a large one, without Beam's runner."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Optional

import pyarrow as pa

from beam_envelope.errors import (
    EnvelopeError,
    KeyFileMissingError,
    TamperedError,
    TruncatedError,
)
from beam_envelope.formats.keyfile import (
    DERIVED_CIPHERS,
    MANIFEST_NAME,
    PARQUET_CIPHER,
    TEMPORARY_PREFIX,
    KeyFile,
    is_unfinished,
)
from beam_envelope.formats.parquet import missing_parquet_key_file, open_sealed_parquet
from beam_envelope.formats.parquet_reader import EncryptedParquetReader
from beam_envelope.formats.record import load_record_key
from beam_envelope.formats.shard_layout import CHUNK_BYTES, HEADER_BYTES, plaintext_size
from beam_envelope.io.keyfiles import read_key_file
from beam_envelope.io.manifest_reader import ManifestReader, check_shard_id
from beam_envelope.io.shards import open_shard_at
from beam_envelope.io.store import LocalStore, key_file_path, read_small, split_path, store_of
from beam_envelope.keys.context import AnyContext
from beam_envelope.keys.provider import KEY_ID_BYTES, KeyProvider
from beam_envelope.transforms.row_types import register_rows
from beam_envelope.transforms.verify_find import Found, printable_name, reason_of

SHARD: Final = "shard"
PARQUET: Final = "parquet"
RECORD_KEY: Final = "record key"
KEY_FILE: Final = "key file"
FILE: Final = "file"
UNFINISHED: Final = "unfinished"
MANIFEST: Final = "manifest"

RANGE_BYTES: Final = 64 << 20
_BLOCK_BYTES: Final = 1 << 20
_BATCH_ROWS: Final = 1 << 14
_KEY_ID: Final = re.compile(r"[0-9a-f]{32}")


class VerifiedFile(NamedTuple):
    """What VerifyShards says of each file; nothing in it is secret.

    Attributes:
        path: the file; of a key file that belongs to no file, the key file.
        kind: `shard`, `parquet`, `record key` (a key file of a key store), `key file` (one whose file is missing, or
            that cannot be read), `file` (one with no key file), `manifest` or `unfinished`; the last is not checked.
        ok: whether nothing is wrong with it.
        problem: what is, or "".
        plaintext_bytes: how many bytes are in it, where that was authenticated: of shards that are ok, but not of
            compressed ones that were checked quickly.
        records: how many rows are in it: of Parquet that is ok and was not checked quickly.
        key_id: of its data key, or the first of them; "" if its key file cannot be read.
    """

    path: str
    kind: str
    ok: bool
    problem: str
    plaintext_bytes: Optional[int]  # noqa: UP045  # Beam's schemas know this spelling
    records: Optional[int]  # noqa: UP045
    key_id: str


class Part(NamedTuple):
    """A piece of work: a file, a range of a shard's chunks or of a Parquet file's row groups, or what was found out.

    Attributes:
        path: the file, also of a key file whose file is not there.
        kind: as of `VerifiedFile`.
        problem: what is wrong with it already, or "".
        key_id: as of `VerifiedFile`.
        size: of the file.
        start: the first chunk or row group.
        end: the one behind the last; the last part of a shard goes to its end, wherever that is by then.
        number: of this part, from 0.
        total: how many parts the file has.
        key_file: its key file, so that a rotation at the same time does not matter.
    """

    path: str
    kind: str
    problem: str
    key_id: str
    size: int
    start: int
    end: int
    number: int
    total: int
    key_file: bytes


register_rows(VerifiedFile, Part)


def _result(
    part: Part, plaintext_bytes: int | None = None, records: int | None = None, problem: str = ""
) -> VerifiedFile:
    """Return what is said of a part. It is no method, since workers get objects of another class with its fields."""
    text = part.problem or problem
    path = key_file_path(part.path) if part.kind in {RECORD_KEY, KEY_FILE} else part.path
    return VerifiedFile(printable_name(path), part.kind, not text, text, plaintext_bytes, records, part.key_id)


@dataclass(frozen=True)
class Verifier:
    """What is checked, and with which keys. Configuration only, so it travels.

    Attributes:
        keys: the allowed KMS keys.
        context: the encryption context that the caller expects.
        quick: do not read the contents.
        range_bytes: about how much of a file is one part.
        manifest: holds what is found against the manifests.
    """

    keys: tuple[KeyProvider, ...]
    context: Mapping[str, str] | AnyContext
    manifest: ManifestReader
    quick: bool = False
    range_bytes: int = RANGE_BYTES

    def parts(self, path: str, found: Found) -> list[Part]:
        """Cut the work on one file into parts; what is wrong with it by now is in the one part then.

        Args:
            path: the file.
            found: what is known of it.

        Raises:
            KeyAccessError, KmsUnavailableError: from the KMS, which the row groups of Parquet are not counted without.
        """
        size, shard_id, problem = found
        name = split_path(path)[1]
        if is_unfinished(path) and (size is not None or not name.startswith(TEMPORARY_PREFIX)):
            there = key_file_path(path) if size is None else path
            return [Part(there, UNFINISHED, "", "", size or 0, 0, 0, 0, 1, b"")]
        if name == MANIFEST_NAME or problem:
            kind = MANIFEST if name == MANIFEST_NAME else SHARD
            if kind == SHARD and size is not None and not _has_key_file(path):
                kind = FILE
            return [Part(path, kind, problem, "", size or 0, 0, 0, 0, 1, b"")]
        draft = Part(path, KEY_FILE if size is None else FILE, "", "", size or 0, 0, 0, 0, 1, b"")
        try:
            raw = _read_key_file(path)
            draft = draft._replace(kind=KEY_FILE if size is None else SHARD, key_file=raw)
            parsed = KeyFile.from_bytes(raw, f"the key file of {path}")
            check_shard_id(path, parsed, shard_id)
            draft = draft._replace(key_id=parsed.data_keys[0].key_id.hex())
            draft = _identified(draft, parsed.cipher, seen=size is not None)
            ranges = list(self._ranges(draft)) or [(0, 0)]
        except (EnvelopeError, OSError) as error:
            return [draft._replace(problem=reason_of(error))]
        return [
            draft._replace(start=start, end=end, number=number, total=len(ranges))
            for number, (start, end) in enumerate(ranges)
        ]

    def check(self, part: Part, count: Callable[[int], object]) -> VerifiedFile:
        """Check one part.

        Args:
            part: from `parts`.
            count: is called with numbers of bytes, as they are authenticated.

        Raises:
            KeyAccessError, KmsUnavailableError: from the KMS.
        """
        if part.problem or part.kind in {UNFINISHED, MANIFEST}:
            return _result(part)
        checks = {SHARD: self._check_shard, PARQUET: self._check_parquet, RECORD_KEY: self._check_record_key}
        try:
            return checks[part.kind](part, count)
        except (EnvelopeError, OSError) as error:
            return _result(part, problem=reason_of(error))

    def _ranges(self, part: Part) -> Iterator[tuple[int, int]]:
        if part.kind == SHARD:
            # An empty last chunk is looked at by whoever reads the one before it.
            chunks = max(1, -(-plaintext_size(part.size, part.path) // CHUNK_BYTES))
            compressed = KeyFile.from_bytes(part.key_file, part.path).compression != "none"
            step = chunks if self.quick or compressed else max(1, self.range_bytes // CHUNK_BYTES)
        elif part.kind == PARQUET and not self.quick:
            with self._open_parquet(part) as reader:
                chunks = reader.num_row_groups
            step = max(1, chunks * self.range_bytes // max(1, part.size))
        else:
            return
        for start in range(0, chunks, step):
            yield start, min(start + step, chunks)

    def _check_shard(self, part: Part, count: Callable[[int], object]) -> VerifiedFile:
        key_file, shard = open_shard_at(part.path, self.keys, self.context, part.key_file)
        with shard:
            inner: Any = shard if key_file.compression == "none" else shard.raw._shard  # type: ignore[attr-defined]  # noqa: SLF001  # of the same package
            if self.quick:
                size = inner.seek(0, io.SEEK_END)  # authenticates the last chunk, and so the length
                return _result(part, size if inner is shard else None)
            if inner is not shard:
                return _result(part, _read_all(shard, inner.tell, count))
            return _result(part, _read_range(shard, part, count))

    def _check_parquet(self, part: Part, count: Callable[[int], object]) -> VerifiedFile:
        with self._open_parquet(part) as reader:
            reader.schema_of(None)  # opens the keys of all columns
            if self.quick:
                return _result(part)
            rows = 0
            groups = reader.num_row_groups
            for group in range(part.start, part.end):
                for batch in reader.iter_batches([group], batch_size=_BATCH_ROWS):
                    rows += batch.num_rows
                count(part.size * (group + 1) // groups - part.size * group // groups)
            return _result(part, records=rows)

    def _open_parquet(self, part: Part) -> EncryptedParquetReader:
        store = store_of(part.path)
        stream = pa.OSFile(part.path) if isinstance(store, LocalStore) else store.open(part.path)
        try:
            return open_sealed_parquet(stream, part.key_file, self.keys, self.context, part.path, own=True)
        except BaseException:
            stream.close()
            raise

    def _check_record_key(self, part: Part, count: Callable[[int], object]) -> VerifiedFile:
        del count
        what, name = key_file_path(part.path), split_path(part.path)[1]
        key_file = KeyFile.from_bytes(part.key_file, what)
        if _KEY_ID.fullmatch(name):
            key_id = bytes.fromhex(name)
        elif key_file.name == name and key_file.derivation is not None:
            key_id = key_file.derivation.commitment[:KEY_ID_BYTES]
        else:
            raise TamperedError(f"{what} holds the key named {key_file.name!r}: it was put in the place of another")
        load_record_key(part.key_file, self.keys, self.context, (key_id, key_file.cipher), what)
        return _result(part)


def _has_key_file(path: str) -> bool:
    try:
        return store_of(path).size(key_file_path(path)) is not None
    except OSError:
        return False


def _read_key_file(path: str) -> bytes:
    try:
        return read_key_file(key_file_path(path))
    except FileNotFoundError:
        raise missing_parquet_key_file(path, read_small(path, HEADER_BYTES)) from None


def _identified(draft: Part, cipher: str, *, seen: bool) -> Part:
    """Find what a key file belongs to."""
    path = draft.path
    if not seen:
        if cipher in DERIVED_CIPHERS:
            return draft._replace(kind=RECORD_KEY)
        size = store_of(path).size(path)  # a pattern may have named the key file alone
        if size is None:
            raise KeyFileMissingError(
                f"{path} is missing: there is only its key file. Restore it from a copy, or delete the key file if a "
                "job was stopped before it had written the rest"
            )
        draft = draft._replace(size=size)
    return draft._replace(kind=PARQUET if cipher == PARQUET_CIPHER else SHARD)


def merge(results: Iterable[tuple[int, int, VerifiedFile]]) -> VerifiedFile:
    """Return what is said of a file, from its parts: the index of each, how many there are, and its result.

    Raises:
        EnvelopeError: one of them is missing; the runner lost it.
    """
    by_index = {index: (count, result) for index, count, result in results}
    parts = [by_index[index] for index in sorted(by_index)]
    count, first = parts[0]
    if len(parts) != count:
        raise EnvelopeError(f"{len(parts)} of {count} parts of {first.path} were checked. Run the verification again")
    bad = [result for _, result in parts if not result.ok]
    if bad:
        more = f" (and more in {len(bad) - 1} other parts of it)" if len(bad) > 1 else ""
        return bad[0]._replace(problem=bad[0].problem + more)
    return first._replace(
        plaintext_bytes=_sum(result.plaintext_bytes for _, result in parts),
        records=_sum(result.records for _, result in parts),
    )


def _sum(numbers: Iterable[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _read_range(shard: io.BufferedReader, part: Part, count: Callable[[int], object]) -> int:
    """Read a part of an uncompressed shard; return how many bytes it has."""
    last = part.number == part.total - 1
    wanted = (part.end - part.start) * CHUNK_BYTES
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    shard.seek(part.start * CHUNK_BYTES)
    total = 0
    while last or total < wanted:
        n_bytes = shard.readinto(buffer if last else buffer[: wanted - total])
        if not n_bytes:
            break
        total += n_bytes
        count(n_bytes)
    if total < (plaintext_size(part.size) - part.start * CHUNK_BYTES if last else wanted):
        raise TruncatedError(f"{part.path} became shorter while it was read. Verify it again when nobody writes it")
    return total


def _read_all(shard: io.BufferedReader, tell: Callable[[], int], count: Callable[[int], object]) -> int:
    """Read a compressed shard; return how many bytes are in it. What is counted are those that are authenticated."""
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    total = done = 0
    while n_bytes := shard.readinto(buffer):
        total += n_bytes
        before, done = done, tell()
        count(done - before)
    return total
