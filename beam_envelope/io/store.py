"""One view of every place where files can be: `store_of(path)` for a local disk, S3, or any other Beam filesystem.

Beam's FileSystems has no way to drop a half-written file, follows no order between two files, and skips local files
that it cannot read; the stores here do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from apache_beam.io.filesystem import BeamIOError, CompressionTypes, FileMetadata, FileSystem
from apache_beam.io.filesystems import FileSystems

from beam_envelope.formats.keyfile import TEMPORARY_PREFIX, key_file_name
from beam_envelope.formats.output import Buffer, LocalOutput, Output, check_key_file
from beam_envelope.io.s3 import S3Store

_QUOTED: Final = re.compile(r"\[([*?\[])\]")  # a set of one such character: how a glob says that it means the character
_GLOB: Final = re.compile(rf"(?:[^*?\[]|{_QUOTED.pattern})*")
_NO_SUCH_FILE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
_BINARY: Final = "application/octet-stream"
_FEW: Final = 8


class Store(Protocol):
    """What every store can do. Paths are whole paths, `s3://bucket/key` and the like included."""

    def match(self, pattern: str) -> Iterable[FileMetadata]:
        """Return the files that match a glob (`*` within a folder, `**` across folders). Raises OSError."""

    def size(self, path: str) -> int | None:
        """Return a file's size in bytes, or None where there is no file. Raises OSError."""

    def find(self, path: str) -> FileMetadata | None:
        """Return a file with its size and, where the store tells it, its modification time. Raises OSError."""

    def is_folder(self, path: str) -> bool:
        """Whether the path is a folder, where the store has folders."""

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading: seekable, with `readinto`. Raises OSError."""

    def create(self, path: str, *, overwrite: bool, size_hint: int) -> Output:
        """Start a file of about `size_hint` bytes. Raises FileExistsError, OSError."""


def store_of(path: str) -> Store:
    """Return the store that a path is in."""
    scheme = FileSystems.get_scheme(path)
    if scheme is None:
        return LocalStore()
    return S3Store() if scheme == "s3" else BeamStore()


def quote_glob(path: str) -> str:
    """Return the glob that finds this one path, whatever characters are in it: `a[1].csv` becomes `a[[]1].csv`."""
    return re.sub(r"([*?\[])", r"[\1]", path)


def split_path(path: str) -> tuple[str, str]:
    """Split a path into its folder, with the separator at the end, and its name."""
    folder, separator, name = path.rpartition("/")
    return folder + separator, name


def split_glob(pattern: str) -> tuple[str, str]:
    """Split a glob into the folder that all its matches are below, as a path, and the glob of what is below that."""
    fixed = split_path(_GLOB.match(pattern)[0])[0]  # type: ignore[index]  # it matches at least the empty string
    return _QUOTED.sub(r"\1", fixed), pattern[len(fixed) :]


def key_file_path(path: str) -> str:
    """Return the path of the key file of a shard."""
    folder, name = split_path(path)
    return folder + key_file_name(name)


def glob_matcher(pattern: str) -> Callable[[str], bool]:
    """Return what tells whether a glob finds a place, as `same_place` names it, whatever the glob calls its folder."""
    folder, rest = split_glob(pattern)
    below, compiled = same_place(folder), _compiled(rest)
    return lambda place: place.startswith(below) and compiled.match(place[len(below) :]) is not None


def literal_path(pattern: str) -> str | None:
    """Return the one path that a glob can find, or None if it has a wildcard."""
    return None if _GLOB.fullmatch(pattern) is None else _QUOTED.sub(r"\1", pattern)


def same_place(path: str) -> str:
    """Return the one name of the place of a file: on a local disk, with all links in its folder's path resolved."""
    if FileSystems.get_scheme(path) is not None:
        return path
    folder, name = split_path(path)
    return os.path.join(os.path.realpath(folder or "."), name)


class Places:
    """`same_place` for many paths: the links of each folder are resolved once."""

    def __init__(self) -> None:
        """Know no folder yet."""
        self._folders: dict[str, str] = {}

    def __call__(self, path: str) -> str:
        """Return the place of a file."""
        folder, name = split_path(path)
        if folder not in self._folders:
            self._folders[folder] = split_path(same_place(path))[0]
        return self._folders[folder] + name


def same_places(paths: Iterable[str]) -> dict[str, str]:
    """Return `same_place` of each path; the links of each folder are resolved once."""
    place_of = Places()
    return {path: place_of(path) for path in paths}


def expand(pattern: str) -> tuple[str, list[FileMetadata]]:
    """Find the files that a user names: a glob, a file, or a folder, which stands for all that is below it.

    Returns:
        A glob for what the user named, and the files in order of their paths.

    Raises:
        FileNotFoundError: nothing matches.
        OSError: a folder cannot be listed or a file cannot be read.
    """
    store = store_of(pattern)
    file = None if pattern.endswith("/") else store.find(pattern)
    if file is not None:  # also a name that holds a glob's characters
        return quote_glob(pattern), [file]
    is_folder = pattern.endswith("/") or store.is_folder(pattern)
    glob = quote_glob(pattern.rstrip("/")) + "/**" if is_folder else pattern
    found = sorted(store.match(glob), key=lambda metadata: metadata.path) if _GLOB.fullmatch(glob) is None else []
    if not found:
        msg = "no file matches; quote a pattern so that the shell leaves it alone, and use ** to look into sub-folders"
        raise FileNotFoundError(errno.ENOENT, msg, pattern)
    return glob, found


def existing(paths: Iterable[str], folder: str) -> set[str]:
    """Return which of some paths below a folder exist, from one listing where that is cheaper. Raises OSError."""
    store = store_of(folder)
    if isinstance(store, LocalStore):
        return {path for path in paths if store.size(path) is not None}
    wanted = set(paths)
    if len(wanted) <= _FEW:
        return {path for path in wanted if store.size(path) is not None}
    return {metadata.path for metadata in store.match(f"{quote_glob(folder)}**") if metadata.path in wanted}


def read_small(path: str, limit: int) -> bytes:
    """Read at most `limit` bytes from the start of a file. Raises OSError."""
    with store_of(path).open(path) as stream:
        return stream.read(limit)


class LocalStore:
    """Files on a local disk. Links to files are followed, links to folders are not."""

    def match(self, pattern: str) -> Iterator[FileMetadata]:
        """Yield the matching files; unlike Beam, raise for a folder or a link that cannot be read."""
        root, rest = split_glob(pattern)
        # Only ** reaches into deeper folders, but Beam's ? and [...] match a slash as well.
        depth = None if re.search(r"\*\*|[?\[]", rest) else rest.count("/")
        compiled = _compiled(rest)
        for folder, folders, names in os.walk(root or ".", onerror=_raise):
            prefix = "" if not root and folder == "." else os.path.join(folder, "")  # keeps the text of the pattern
            prefix = prefix.removeprefix("./") if not root else prefix
            if depth is not None and prefix[len(root) :].count("/") >= depth:
                folders.clear()
            for name in names:
                path = prefix + name
                if compiled.match(path[len(root) :]):
                    yield self._regular_file(path)

    def size(self, path: str) -> int | None:
        """Return the size, or None where there is no file, or a folder."""
        file = self.find(path)
        return None if file is None else file.size_in_bytes

    def find(self, path: str) -> FileMetadata | None:
        """Return the file, or None where there is none, or a folder."""
        try:
            return None if self.is_folder(path) else self._regular_file(path)
        except OSError as error:
            if error.errno in _NO_SUCH_FILE:
                return None
            raise

    def is_folder(self, path: str) -> bool:
        """Whether it is a folder."""
        return os.path.isdir(path)  # False, not an error, for a name that is too long

    def open(self, path: str) -> BinaryIO:
        """Open without a buffer: callers read whole blocks."""
        return Path(path).open("rb", buffering=0)

    def create(self, path: str, *, overwrite: bool, size_hint: int) -> LocalOutput:
        """Start a file under a temporary name."""
        del size_hint
        return LocalOutput(path, overwrite=overwrite)

    @staticmethod
    def _regular_file(path: str) -> FileMetadata:
        try:
            status = Path(path).stat()
        except FileNotFoundError:
            if Path(path).is_symlink():
                raise OSError(errno.ENOLINK, "the link points to nothing; mend it or leave it out", path) from None
            raise
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file (a pipe, socket or device); leave it out", path)
        return FileMetadata(path, status.st_size, status.st_mtime)


class BeamStore:
    """Files of any other Beam filesystem (`gs://`, `hdfs://`, ...): written under a temporary name, then renamed."""

    def match(self, pattern: str) -> Iterable[FileMetadata]:
        """Return what Beam finds."""
        with _as_os_errors(pattern):
            return list(FileSystems.match([pattern])[0].metadata_list)

    def size(self, path: str) -> int | None:
        """Return what Beam says."""
        with _as_os_errors(path):
            filesystem = FileSystems.get_filesystem(path)
            return int(filesystem.size(path)) if filesystem.exists(path) else None

    def find(self, path: str) -> FileMetadata | None:
        """Return what Beam says."""
        with _as_os_errors(path):
            filesystem = FileSystems.get_filesystem(path)
            return filesystem.metadata(path) if filesystem.exists(path) else None

    def is_folder(self, path: str) -> bool:
        """Return False: a folder is named by a slash at the end."""
        del path
        return False

    def open(self, path: str) -> BinaryIO:
        """Open the bytes as they are: Beam would unpack a name that ends in .gz."""
        with _as_os_errors(path):
            stream: BinaryIO = FileSystems.open(path, _BINARY, CompressionTypes.UNCOMPRESSED)
            return stream

    def create(self, path: str, *, overwrite: bool, size_hint: int) -> BeamOutput:
        """Start a file under a temporary name."""
        del size_hint
        return BeamOutput(path, overwrite=overwrite)


class BeamOutput:
    """A file of any Beam filesystem. See `formats.output.Output`."""

    def __init__(self, path: str, *, overwrite: bool) -> None:
        """Create the temporary file."""
        self.name = path
        self._overwrite = overwrite
        self._key_file: bytes | None = None
        self._refuse_existing()
        self._temporary = split_path(path)[0] + TEMPORARY_PREFIX + uuid.uuid4().hex
        with _as_os_errors(path):
            self._stream: BinaryIO | None = FileSystems.create(self._temporary, _BINARY, CompressionTypes.UNCOMPRESSED)

    def begin(self, key_file: bytes) -> None:
        """Keep the key file for `commit`."""
        self._key_file = key_file

    def write(self, data: Buffer) -> None:
        """Pass `data` on."""
        with _as_os_errors(self.name):
            self._stream.write(data)  # type: ignore[union-attr]  # only after commit or abort is it None

    def commit(self) -> None:
        """Close, write the key file, rename."""
        stream, self._stream = self._stream, None
        with _as_os_errors(self.name):
            stream.close()  # type: ignore[union-attr]  # commit is called once
            self._refuse_existing()
            if self._overwrite and BeamStore().size(self.name) is not None:
                FileSystems.delete([self.name])
            if self._key_file is not None:
                self._write_key_file(self._key_file)
            FileSystems.rename([self._temporary], [self.name])
            if BeamStore().size(self.name) is None:
                raise OSError(errno.EIO, "the file is not there after it was renamed", self.name)
            if self._key_file is not None:
                found = read_small(key_file_path(self.name), len(self._key_file) + 1)
                check_key_file(found, self._key_file, self.name)

    def abort(self) -> None:
        """Remove the temporary file; what it holds is no whole shard and has no key file."""
        stream, self._stream = self._stream, None
        with contextlib.suppress(Exception):
            if stream is not None:
                stream.close()
        with contextlib.suppress(Exception):
            FileSystems.delete([self._temporary])

    def _write_key_file(self, data: bytes) -> None:
        target = key_file_path(self.name)
        temporary = split_path(self.name)[0] + TEMPORARY_PREFIX + uuid.uuid4().hex
        with FileSystems.create(temporary, "application/json", CompressionTypes.UNCOMPRESSED) as stream:
            stream.write(data)
        if BeamStore().size(target) is not None:
            FileSystems.delete([target])
        FileSystems.rename([temporary], [target])

    def _refuse_existing(self) -> None:
        if not self._overwrite and BeamStore().size(self.name) is not None:
            raise FileExistsError(errno.EEXIST, "the output exists; choose to skip or overwrite it", self.name)


def _compiled(glob: str) -> re.Pattern[str]:
    # Python warns of a [ inside of a set, which is how a glob quotes it.
    return re.compile(FileSystem.translate_pattern(glob).replace("[[]", r"\["))


def _raise(error: OSError) -> None:
    raise error


@contextlib.contextmanager
def _as_os_errors(path: str) -> Iterator[None]:
    try:
        yield
    except BeamIOError as error:
        details = "; ".join(str(cause) for cause in (error.exception_details or {}).values()) or str(error)
        raise OSError(errno.EIO, details, path) from error
