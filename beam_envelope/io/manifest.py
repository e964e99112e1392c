"""Manifests on any Beam filesystem: found, and added to at the end of a write.

A manifest speaks for all files below its folder. Writers add to the nearest one at or above their output; where there
is none, they make one in it.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from apache_beam.io.filesystems import FileSystems

from beam_envelope.errors import FormatError, ManifestError
from beam_envelope.formats.keyfile import MANIFEST_NAME, MAX_KEY_FILE_BYTES, KeyFile
from beam_envelope.formats.manifest import MAX_MANIFEST_BYTES, Manifest, ManifestEntry
from beam_envelope.io.keyfiles import KeyFileReplacedError, find_key_files, replace_key_file, settle
from beam_envelope.io.store import (
    BeamStore,
    Places,
    existing,
    key_file_path,
    quote_glob,
    read_small,
    same_place,
    same_places,
    split_glob,
    split_path,
    store_of,
)
from beam_envelope.keys.cache import generate_data_key, unwrap
from beam_envelope.keys.context import AnyContext, match_context
from beam_envelope.keys.provider import KeyProvider

_TRIES: Final = 100
_WAIT_S: Final = 0.02


class WrittenShard(NamedTuple):
    """What a writer says of a shard, for the manifest.

    Attributes:
        path: where it is.
        entry: what is said of it; None: it was removed on purpose.
        anew: whether this job wrote it. One that was there already is listed only if no section names its path.
    """

    path: str
    entry: ManifestEntry | None
    anew: bool = True


def shard_on_store(path: str, *, anew: bool = True) -> WrittenShard:
    """Return what is to be said of a shard, from its key file and its size. Raises FormatError, OSError."""
    raw = read_small(key_file_path(path), MAX_KEY_FILE_BYTES + 1)
    size = store_of(path).size(path)
    entry = ManifestEntry(KeyFile.from_bytes(raw, f"the key file of {path}").shard_id.hex, size or 0)
    return WrittenShard(path, entry, anew)


def add_to_manifest(
    folder: str, shards: Iterable[WrittenShard], keys: Sequence[KeyProvider], context: Mapping[str, str]
) -> str | None:
    """Add shards to the manifest of a folder: in one step, whatever other jobs add at the same time.

    Nothing is changed, and the KMS not asked, where the manifest says all of it already: a second try is safe.

    Args:
        folder: the output folder of the job, with a slash at its end; all shards are below it.
        shards: what was written.
        keys: the KMS keys that wrap the section's data key.
        context: its encryption context.

    Returns:
        The path of the manifest, or None if there is nothing to say and no manifest.

    Raises:
        ManifestError: others changed it again and again meanwhile.
        KeyAccessError, KmsUnavailableError: from the KMS.
        FormatError, OSError: what is there is no manifest; from the store.
    """
    written = list(shards) if isinstance(shards, Iterator) else shards  # each try goes through them anew
    data_key = None
    try:
        for attempt in range(_TRIES):
            path, raw = nearest(folder) or (canonical(folder) + MANIFEST_NAME, None)
            manifest = Manifest() if raw is None else Manifest.from_bytes(raw, path)
            changes = _changes(manifest, written, split_path(path)[0])
            if not changes:
                return None if raw is None else path
            data_key = data_key or generate_data_key(keys, context)
            if _swap(path, raw, manifest.with_section(data_key, context, changes).to_bytes()):
                return path
            time.sleep(random.uniform(0, _WAIT_S * min(attempt + 1, 50)))  # noqa: S311  # it only spreads
    finally:
        if data_key is not None:
            data_key.close()
    raise ManifestError(f"{path} was changed by others {_TRIES} times while this job added to it. Run it again")


def compact_manifest(path: str, keys: Sequence[KeyProvider], context: Mapping[str, str]) -> int:
    """Put one section in the place of all, so that readers ask the KMS once, and drop what was removed on purpose.

    Returns:
        How many sections there were.

    Raises:
        ManifestError: a section was forged, or others changed it again and again meanwhile.
        WrongKeyError, ContextMismatchError: a section is under another key or context, so it stays alone.
        FormatError, KeyAccessError, KmsUnavailableError, OSError: from reading and writing it, and from the KMS.
    """
    for _ in range(_TRIES):
        raw = read_manifest(path)
        manifest = Manifest.from_bytes(raw, path)
        for number in range(len(manifest.sections)):
            verify_section(manifest, number, keys, context, path)
        shards = {name: entry for name, entry in manifest.entries().items() if entry is not None}
        with generate_data_key(keys, context) as data_key:
            if _swap(path, raw, Manifest().with_section(data_key, context, shards).to_bytes()):
                return len(manifest.sections)
    raise ManifestError(f"{path} was changed by others {_TRIES} times meanwhile. Run it again")


def verify_section(
    manifest: Manifest, number: int, keys: Sequence[KeyProvider], context: Mapping[str, str] | AnyContext, path: str
) -> None:
    """Authenticate one section of the manifest at a path.

    Raises:
        ManifestError: it was forged.
        WrongKeyError, ContextMismatchError: it is under another key or context.
        TamperedError, KeyAccessError, KmsUnavailableError: from the KMS.
    """
    section = manifest.sections[number]
    what = f"section {number + 1} of {path}"
    match_context(context, section.context, what)
    data_key = section.data_key
    with unwrap(keys, data_key.wrapped_keys, section.context, data_key.key_id, what) as opened:
        section.verify(opened, what)


def find_to_rotate(pattern: str) -> tuple[list[str], list[str]]:
    """Find the key files and the manifests that a rotation of what a user names concerns.

    Returns:
        The key files and manifests that match, with the manifests of which every shard matches; and the manifests that
        list other shards too, which stay as they are.

    Raises:
        FileNotFoundError: nothing matches.
        OSError: from the store.
    """
    paths = find_key_files(pattern, manifests=True)
    as_given = split_glob(pattern)[0]
    below = canonical(as_given)
    known = set(same_places(paths).values())
    inner = {
        parent + MANIFEST_NAME
        for folder in {split_path(place)[0] for place in known}
        for parent in parents(folder, below)
    }
    found = {path: read_manifest(path) for path in sorted(existing(sorted(inner - known), below))}
    above = nearest(below)
    found |= {} if above is None or above[0] in known else {above[0]: above[1]}
    others: list[str] = []
    for place, raw in found.items():
        path = as_given + place[len(below) :] if place.startswith(below) else place
        try:
            entries = Manifest.from_bytes(raw, path).entries()
        except (FormatError, ManifestError):
            entries = {}  # the rotation tells of it
        folder = split_path(place)[0]
        shards = (folder + name for name, entry in entries.items() if entry is not None)
        whole = known.issuperset(map(key_file_path, shards))
        (paths if whole else others).append(path)
    return paths, others


def listed_ids(folder: str) -> dict[str, str]:
    """Return the places that the manifest at or above a folder lists, and the shard id of each; not authenticated.

    Raises:
        FormatError, OSError: what is there is no manifest; from the store.
    """
    found = nearest(folder)
    if found is None:
        return {}
    path, raw = found
    above = split_path(path)[0]
    entries = Manifest.from_bytes(raw, path).entries()
    return {above + name: entry.shard_id for name, entry in entries.items() if entry is not None}


def _changes(manifest: Manifest, written: Iterable[WrittenShard], folder: str) -> dict[str, ManifestEntry | None]:
    known = manifest.entries()
    changes: dict[str, ManifestEntry | None] = {}
    place_of = Places()
    for shard in written:
        place = place_of(shard.path)
        if not place.startswith(folder):
            raise ManifestError(f"{shard.path} is not below {folder}, whose manifest was to list it")
        name = place[len(folder) :]
        if name.startswith("/") or ".." in name.split("/"):
            raise ManifestError(f"{shard.path} has a name that no manifest takes. Write without // and .. in paths")
        said = known.get(name)
        if said != shard.entry and (shard.anew or said is None):
            changes[name] = shard.entry
    return changes


def _swap(path: str, old: bytes | None, new: bytes) -> bool:
    """Replace a manifest, or make it; return whether nobody else did so meanwhile. Raises OSError."""
    if len(new) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{path} would be larger than {MAX_MANIFEST_BYTES} bytes. Write into another folder")
    if old is not None:
        try:
            replace_key_file(path, old, new)
        except (KeyFileReplacedError, FileNotFoundError):
            return False
        settle([path])
        return True
    try:
        output = store_of(path).create(path, overwrite=False, size_hint=len(new))
    except FileExistsError:
        return False
    try:
        output.write(new)
        output.commit()
    except FileExistsError:
        output.abort()
        return False
    except BaseException:
        output.abort()
        raise
    return True


def nearest(folder: str) -> tuple[str, bytes] | None:
    """Return the manifest at or above a folder, and its bytes. Raises OSError."""
    for parent in parents(canonical(folder), ""):
        try:
            return parent + MANIFEST_NAME, read_manifest(parent + MANIFEST_NAME)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError:
            if _is_listed(parent + MANIFEST_NAME):
                raise
    return None


def _is_listed(path: str) -> bool:
    """Whether a listing shows a file: S3 denies what is not there, too, to those who may not list."""
    try:
        return any(True for _ in store_of(path).match(quote_glob(path)))
    except PermissionError:
        return False


def read_manifest(path: str) -> bytes:
    """Return the bytes of a manifest. Raises OSError."""
    store = store_of(path)
    if isinstance(store, BeamStore) and store.size(path) is None:  # whose filesystems say each in its own way
        raise FileNotFoundError(errno.ENOENT, "there is no manifest", path)
    return read_small(path, MAX_MANIFEST_BYTES + 1)


def canonical(folder: str) -> str:
    """Return the one name of a folder, with a slash at its end."""
    return split_path(same_place(f"{folder}{MANIFEST_NAME}"))[0]


def parents(folder: str, below: str) -> Iterator[str]:
    """Yield a folder and those above it, as long as they are below another one; of a bucket, not what is above."""
    scheme = FileSystems.get_scheme(folder)
    root = "/" if scheme is None else folder[: folder.find("/", len(scheme) + 3) + 1]
    while folder.startswith(root) and len(folder) > len(below):
        yield folder
        if folder == root:
            return
        folder = split_path(folder[:-1])[0]
