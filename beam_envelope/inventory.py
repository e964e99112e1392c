"""What is in a folder of shards: read from listings and key files alone, with no key and no call to a KMS.

What an auditor makes of it is in inventory_audit.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import islice
from typing import Any, Final

from beam_envelope.errors import EnvelopeError
from beam_envelope.formats.keyfile import (
    DERIVED_CIPHERS,
    KEY_FILE_PREFIX,
    KEY_FILE_SUFFIX,
    MANIFEST_NAME,
    MAX_KEY_FILE_BYTES,
    PARQUET_CIPHER,
    SHARD_CIPHER,
    KeyFile,
    WrappedDataKey,
    is_key_file,
    is_unfinished,
)
from beam_envelope.formats.shard_layout import plaintext_size
from beam_envelope.inventory_looks import LOST_PARQUET, look_at
from beam_envelope.io.store import expand, key_file_path, read_small, split_path, store_of
from beam_envelope.keys.ask import FOOTER_KEY, shown_name

SHARD: Final = "shard"
PARQUET: Final = "parquet"
FOOTER_PARQUET: Final = "parquet, keys in its footer"
RECORD_KEY: Final = "record key"
KEY_FILE: Final = "key file"
FILE: Final = "file"
UNFINISHED: Final = "unfinished"
MANIFEST: Final = "manifest"
MARKER: Final = "marker"

NO_KEY_FILE: Final = "no-key-file"
LOST_KEY_FILE: Final = "lost-key-file"
BAD_KEY_FILE: Final = "unreadable-key-file"
CLOSED_KEY_FILE: Final = "key-file-not-permitted"
TRUNCATED: Final = "truncated"
LONE_KEY_FILE: Final = "key-file-alone"
LEFT_OVER: Final = "unfinished"
"""What can be wrong with a file."""

_UNFINISHED: Final = "unfinished; delete it if no job is running"
_NO_KEY_FILE: Final = "no key file: not a shard, or nobody can open it"
_LOST_PARQUET: Final = "no key file: encrypted Parquet, which nobody can open without it"
_READERS: Final = 16  # key files are read in parallel: on S3, each read is mostly waiting
_BATCH: Final = 1000  # what is on its way at a time
_MAX_LOOKS: Final = 1000  # files without key file that are looked into, unless they are called Parquet
_LARGEST_MARKER: Final = 1 << 20
# What Hadoop, Spark, Databricks and S3A committers leave beside data.
_MARKER: Final = re.compile(r"_SUCCESS|\._SUCCESS\.crc|_(?:started|committed)_\d+")
_PARQUET_NAME: Final = re.compile(r"\.(?:parquet|parq|pq)\b")
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)


@dataclass(frozen=True)
class ShardEntry:
    """One file of a folder, as far as it can be told without a key. Times are ISO 8601 in UTC, or "" if unknown.

    Attributes:
        path: the file.
        stored_bytes: its size.
        plaintext_bytes: the size of what is in it, unless it is compressed or Parquet.
        kms_keys: the KMS keys any of which opens it; of encrypted Parquet, its footer, and columns without keys of
            their own. `parquet-footer:NAME` is the name in the footer of a file that needs no key file.
        column_kms_keys: of encrypted Parquet: for each other data key, the KMS keys any of which opens its columns.
            Which columns those are, the encrypted footer says.
        cipher: how it is encrypted.
        context: its encryption context; None if it is not known.
        compression: `none` or `zstd`.
        created: when it was written, as its key file says.
        problem: what is wrong with it, or "".
        kind: `shard`, `parquet`, `parquet, keys in its footer`, `record key` (a key file of a key store), `key file`
            (one whose file is missing), `file` (one with no key file), `unfinished`, `manifest` or `marker`
            (`_SUCCESS`).
        modified: when the store says that it was last written.
        key_file_modified: the same of its key file, which a rotation rewrites.
        looks: of a file with no key file, what its first bytes look like; a guess, or "" if nobody looked.
        finding: what `problem` is, in a word of the constants above, or "".
    """

    path: str
    stored_bytes: int
    plaintext_bytes: int | None = None
    kms_keys: tuple[str, ...] = ()
    context: dict[str, str] | None = None
    compression: str = ""
    created: str = ""
    cipher: str = SHARD_CIPHER
    column_kms_keys: tuple[tuple[str, ...], ...] = ()
    problem: str = ""
    kind: str = SHARD
    modified: str = ""
    key_file_modified: str = ""
    looks: str = ""
    finding: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    @property
    def wrapped(self) -> str:
        """When its data key was last wrapped, as far as is known: when its key file was last written.

        Where the store does not say, when it was created; without a key file, when it was last written itself.
        """
        if self.kind == FOOTER_PARQUET:
            return self.modified
        return self.key_file_modified or (self.created if _TIME.fullmatch(self.created) else "")

    def age_s(self) -> float | None:
        """Return the seconds since it was written."""
        try:
            written = datetime.strptime(self.created, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
        except ValueError:
            return None
        return (datetime.now(timezone.utc) - written).total_seconds()


def list_shards(patterns: Sequence[str]) -> list[ShardEntry]:
    """List the shards that patterns name, and what else lies there: files with no key file, key files with no shard.

    Raises:
        FileNotFoundError: nothing matches.
        OSError: from the store.
    """
    return [entry for entry in Inventory(patterns).entries() if entry.kind not in {MANIFEST, MARKER}]


class Inventory:
    """The files that patterns name. Paths, sizes and times are kept, and entries made as they are asked for.

    Args:
        patterns: folders, globs, shards or key files.
        key_file_times: find out when key files were written also where the patterns leave them out, at a request each.

    Raises:
        FileNotFoundError: nothing matches.
        OSError: from the store.
    """

    def __init__(self, patterns: Sequence[str], *, key_file_times: bool = False) -> None:
        """List."""
        self._times = key_file_times
        self._files: dict[str, tuple[int, float]] = {}
        for pattern in patterns:
            for found in expand(pattern)[1]:
                self._files[found.path] = (found.size_in_bytes, found.last_updated_in_seconds)

    def __len__(self) -> int:
        """Return how many files there are, key files too."""
        return len(self._files)

    def key_files(self) -> tuple[int, int]:
        """Return how many of them are key files, and their bytes."""
        sizes = [size for path, (size, _) in self._files.items() if is_key_file(split_path(path)[1])]
        return len(sizes), sum(sizes)

    def entries(self) -> Iterator[ShardEntry]:
        """Yield what is said of each file, in the order of paths; a key file and its shard are one. Raises OSError."""
        work = iter(self._quotas(sorted(self._files)))
        if not any("://" in path for path in self._files):
            # For a local disk, threads cost more than they give.
            yield from _known(map(self._entry, work))
            return
        with ThreadPoolExecutor(_READERS) as pool:
            while batch := list(islice(work, _BATCH)):
                yield from _known(pool.map(self._entry, batch))

    def _quotas(self, paths: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """Yield each path and whether it may be looked into: the same ones each time, and not too many."""
        left = _MAX_LOOKS
        for path in paths:
            may = left > 0 or _PARQUET_NAME.search(path) is not None
            if key_file_path(path) not in self._files and not is_key_file(split_path(path)[1]):
                left -= 1
            yield path, may

    def _entry(self, work: tuple[str, bool]) -> ShardEntry | None:
        path, may_look = work
        size, modified = self._files[path]
        name = split_path(path)[1]
        draft = ShardEntry(path, size, modified=_iso(modified))
        if is_unfinished(path):
            return replace(draft, kind=UNFINISHED, problem=_UNFINISHED, finding=LEFT_OVER)
        if name == MANIFEST_NAME:
            return replace(draft, kind=MANIFEST)
        if is_key_file(name):
            return self._key_file_entry(draft)
        return self._file_entry(draft, may_look=may_look)

    def _file_entry(self, draft: ShardEntry, *, may_look: bool) -> ShardEntry:
        key_file = key_file_path(draft.path)
        try:
            raw = read_small(key_file, MAX_KEY_FILE_BYTES + 1)
        except PermissionError as error:
            problem = f"its key file may not be read: {error.strerror or error}"
            return replace(draft, problem=problem, finding=CLOSED_KEY_FILE)
        except OSError as error:
            # Some Beam filesystems have an error of their own for a file that is not there.
            if not isinstance(error, FileNotFoundError) and store_of(key_file).size(key_file) is not None:
                raise
            if _MARKER.fullmatch(split_path(draft.path)[1]) and draft.stored_bytes <= _LARGEST_MARKER:
                return replace(draft, kind=MARKER)
            return _without_key_file(draft, may_look=may_look)
        return _with_key_file(replace(draft, key_file_modified=self._key_file_time(key_file)), raw)

    def _key_file_entry(self, draft: ShardEntry) -> ShardEntry | None:
        """Return what is said of a key file that is beside no file: of a record key, or left over."""
        folder, name = split_path(draft.path)
        shard = folder + name.removeprefix(KEY_FILE_PREFIX).removesuffix(KEY_FILE_SUFFIX)
        if shard in self._files:
            return None
        draft = replace(draft, key_file_modified=draft.modified)
        try:
            key_file = KeyFile.from_bytes(read_small(draft.path, MAX_KEY_FILE_BYTES + 1), draft.path)
        except (EnvelopeError, PermissionError):
            key_file = None
        if key_file is not None and key_file.cipher in DERIVED_CIPHERS:
            return replace(_filled(draft, key_file), kind=RECORD_KEY)
        if store_of(shard).size(shard) is not None:
            return None
        return replace(draft, kind=KEY_FILE, problem="a key file without its shard", finding=LONE_KEY_FILE)

    def _key_file_time(self, path: str) -> str:
        known = self._files.get(path)
        if known is not None:
            return _iso(known[1])
        found = store_of(path).find(path) if self._times else None
        return "" if found is None else _iso(found.last_updated_in_seconds)


def _known(entries: Iterable[ShardEntry | None]) -> Iterator[ShardEntry]:
    return (entry for entry in entries if entry is not None)


def _without_key_file(draft: ShardEntry, *, may_look: bool) -> ShardEntry:
    looks, footer_key = look_at(draft.path) if may_look else ("", None)
    if footer_key is not None:
        keys = (f"{FOOTER_KEY}{footer_key}",)
        return replace(draft, kms_keys=keys, cipher=PARQUET_CIPHER, kind=FOOTER_PARQUET)
    lost = looks == LOST_PARQUET
    problem, finding = (_LOST_PARQUET, LOST_KEY_FILE) if lost else (_NO_KEY_FILE, NO_KEY_FILE)
    return replace(draft, kind=FILE, problem=problem, finding=finding, looks=looks)


def _with_key_file(draft: ShardEntry, raw: bytes) -> ShardEntry:
    path = draft.path
    try:
        key_file = KeyFile.from_bytes(raw, f"the key file of {path}")
    except EnvelopeError as error:
        return replace(draft, problem=str(error), finding=BAD_KEY_FILE)
    if key_file.cipher in DERIVED_CIPHERS:
        problem = f"its key file is one for records ({key_file.cipher}), and opens no file"
        return replace(draft, problem=problem, finding=BAD_KEY_FILE)
    entry = _filled(draft, key_file)
    if key_file.cipher == PARQUET_CIPHER:
        return replace(entry, kind=PARQUET)
    try:
        held = plaintext_size(draft.stored_bytes, path)
    except EnvelopeError as error:
        return replace(entry, problem=str(error), finding=TRUNCATED)
    return replace(entry, plaintext_bytes=held) if key_file.compression == "none" else entry


def _filled(draft: ShardEntry, key_file: KeyFile) -> ShardEntry:
    """Return an entry with what a key file says."""
    return replace(
        draft,
        kms_keys=_kms_keys(key_file.data_keys[0]),
        context=dict(key_file.context),
        compression=key_file.compression,
        created=key_file.created,
        cipher=key_file.cipher,
        column_kms_keys=tuple(map(_kms_keys, key_file.data_keys[1:])),
    )


def _kms_keys(data_key: WrappedDataKey) -> tuple[str, ...]:
    return tuple(map(shown_name, data_key.wrapped_keys))


def _iso(seconds: float) -> str:
    """Return a store's time; 0 is Beam's word for none."""
    if not seconds:
        return ""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return ""
