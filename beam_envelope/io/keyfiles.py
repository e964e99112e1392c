"""Key files on any Beam filesystem: found by pattern, and replaced whole, without touching what they open."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from apache_beam.io.filesystem import CompressionTypes, FileSystem
from apache_beam.io.filesystems import FileSystems

from beam_envelope.errors import EnvelopeError
from beam_envelope.formats.keyfile import (
    KEY_FILE_PREFIX,
    KEY_FILE_SUFFIX,
    MANIFEST_NAME,
    MAX_KEY_FILE_BYTES,
    TEMPORARY_PREFIX,
    is_key_file,
)
from beam_envelope.formats.output import alone_in, sync_directory
from beam_envelope.io.s3 import S3Store, replace_object
from beam_envelope.io.store import (
    BeamStore,
    LocalStore,
    key_file_path,
    quote_glob,
    read_small,
    split_glob,
    split_path,
    store_of,
)

_JSON: Final = "application/json"
_MAGIC: Final = re.compile(r"[*?\[]")
_ANY_KEY_FILE: Final = "_*.json"  # of key files and manifests


class KeyFileReplacedError(EnvelopeError):
    """Somebody else replaced a key file since it was read. Read it again."""


def find_key_files(pattern: str, *, manifests: bool = False) -> list[str]:
    """Return the key files that a user names, in order: by a glob, a folder, a shard or a key file.

    A glob finds a key file if it matches the key file or the shard beside it. Only names are looked at: what the key
    files belong to may be unreadable, or somewhere else. With `manifests`, those that match are among them.

    Raises:
        FileNotFoundError: nothing matches.
        OSError: from the store.
    """
    store, name = store_of(pattern), split_path(pattern)[1]
    literal = not _MAGIC.search(pattern)
    if literal and (is_key_file(name) or (manifests and name == MANIFEST_NAME)):
        return [pattern]
    if name and store.is_folder(pattern):
        pattern = f"{pattern}/"
    elif name and (literal or store.size(key_file_path(pattern)) is not None):
        return [key_file_path(pattern)]  # of a shard, also one whose name holds a glob's characters
    if pattern.endswith("/"):
        glob, wanted = f"{quote_glob(pattern)}**{_ANY_KEY_FILE}", _compiled(f"{quote_glob(pattern)}**")
    else:
        fixed, rest = split_glob(pattern)
        # Only ** reaches into deeper folders, but Beam's ? and [...] match a slash as well.
        deep = re.search(r"\*\*|[?\[]", rest)
        glob = f"{quote_glob(fixed)}**{_ANY_KEY_FILE}" if deep else split_path(pattern)[0] + _ANY_KEY_FILE
        wanted = _compiled(pattern)
    found = [metadata.path for metadata in store.match(glob)]
    found = [path for path in found if _is_wanted(path, wanted, manifests=manifests)]
    if not found:
        msg = "no key file is there; quote a pattern so that the shell leaves it alone, and use ** for sub-folders"
        raise FileNotFoundError(errno.ENOENT, msg, pattern)
    return sorted(found)


def read_key_file(path: str) -> bytes:
    """Return the bytes of a key file. Raises OSError."""
    return read_small(path, MAX_KEY_FILE_BYTES + 1)


def replace_key_file(path: str, old: bytes, new: bytes) -> None:
    """Replace a key file: a reader sees the old one or the new one, whole, also if this process is killed.

    On a local disk, a power cut may bring the old one back until `settle` was called.

    On a filesystem of Beam's that is neither local nor S3 nor Google Cloud Storage, such as `hdfs://`, the file is
    away for a moment, and a kill in it leaves the new one under a `_TMP_` name.

    Raises:
        KeyFileReplacedError: somebody else replaced it since it was read as `old`.
        FileNotFoundError: it went away.
        OSError: from the store.
    """
    store = store_of(path)
    if isinstance(store, LocalStore):
        _replace_on_disk(path, old, new)
    elif isinstance(store, S3Store):
        try:
            replace_object(path, old, new)
        except FileExistsError:
            # A request that boto3 sent twice finds its own work.
            _check_unchanged(path, read_small(path, len(new) + 1), new)
    else:
        _check_unchanged(path, read_small(path, len(old) + 1), old)
        _replace_in_beam(path, new)


def settle(paths: Iterable[str]) -> None:
    """Make the replacement of key files on a local disk last, also through a power cut. Raises OSError."""
    for folder in {os.path.dirname(os.path.realpath(path)) for path in paths if isinstance(store_of(path), LocalStore)}:
        sync_directory(Path(folder))


def _compiled(glob: str) -> re.Pattern[str]:
    # Python warns of a [ inside of a set, which is how a glob quotes it.
    return re.compile(FileSystem.translate_pattern(glob).replace("[[]", r"\["))


def _is_wanted(path: str, wanted: re.Pattern[str], *, manifests: bool) -> bool:
    folder, name = split_path(path)
    if not is_key_file(name):
        return manifests and name == MANIFEST_NAME and wanted.match(path) is not None
    shard = folder + name.removeprefix(KEY_FILE_PREFIX).removesuffix(KEY_FILE_SUFFIX)
    return wanted.match(path) is not None or wanted.match(shard) is not None


def _replace_on_disk(path: str, old: bytes, new: bytes) -> None:
    target = os.path.realpath(path) if os.path.islink(path) else path  # a link stays one
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    try:
        _write_like(os.stat(target), temporary, new)
        # Those who write shards rename a key file under this lock.
        with alone_in(Path(folder)):
            _check_unchanged(path, Path(folder, name).read_bytes(), old)
            os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write_like(status: os.stat_result, path: str, data: bytes) -> None:
    """Write a new file to the disk; owner and mode are those of `status`, as far as this user may: readers need it."""
    with open(path, "xb", buffering=0) as stream:
        stream.write(data)
        if os.name == "posix":
            ours = os.fstat(stream.fileno())
            if (ours.st_uid, ours.st_gid) != (status.st_uid, status.st_gid):
                with contextlib.suppress(PermissionError):
                    os.fchown(stream.fileno(), status.st_uid, status.st_gid)
            if ours.st_mode != status.st_mode:
                os.fchmod(stream.fileno(), status.st_mode & 0o777)
        os.fsync(stream.fileno())


def _replace_in_beam(path: str, new: bytes) -> None:
    temporary = path if path.startswith("gs://") else split_path(path)[0] + TEMPORARY_PREFIX + uuid.uuid4().hex
    with FileSystems.create(temporary, _JSON, CompressionTypes.UNCOMPRESSED) as stream:
        stream.write(new)
    _check_size(temporary, len(new))
    if temporary != path:
        FileSystems.delete([path])
        FileSystems.rename([temporary], [path])
        _check_size(path, len(new))


def _check_size(path: str, size: int) -> None:
    if BeamStore().size(path) != size:
        raise OSError(errno.EIO, "the key file has the wrong size after it was written", path)


def _check_unchanged(path: str, found: bytes, old: bytes) -> None:
    if found != old:
        raise KeyFileReplacedError(
            f"{path} was replaced by somebody else, again and again, while this job was about to rotate it. Run the "
            "rotation again, with no other job on these files"
        )
