"""Which file becomes which: the tasks of EncryptFiles and DecryptFiles, worked out without Beam's runner."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias, cast

from apache_beam.io.filesystem import FileMetadata

from beam_envelope.arguments import IF_EXISTS
from beam_envelope.errors import ManifestError
from beam_envelope.formats.keyfile import is_internal, is_unfinished
from beam_envelope.formats.shard import refuse_encrypted
from beam_envelope.io.manifest_reader import ManifestReader, may_be_listed
from beam_envelope.io.store import (
    Places,
    existing,
    expand,
    glob_matcher,
    key_file_path,
    quote_glob,
    split_glob,
    split_path,
)
from beam_envelope.transforms.lines import parts
from beam_envelope.transforms.row_types import register_rows

IfExists: TypeAlias = Literal["error", "skip", "overwrite"]
_COMPRESSED_NAMES: Final = (".gz", ".bz2", ".zst", ".xz", ".zip", ".parquet", ".orc", ".avro")


class EncryptedFile(NamedTuple):
    """What EncryptFiles says of each shard; `skipped` if it was there already, `shard_id` as its key file has it."""

    source: str
    shard: str
    key_file: str
    plaintext_bytes: int
    ciphertext_bytes: int
    key_id: str
    skipped: bool
    shard_id: str = ""


class DecryptedFile(NamedTuple):
    """What DecryptFiles says of each file; `skipped` if it was there already."""

    shard: str
    output: str
    plaintext_bytes: int
    ciphertext_bytes: int
    key_id: str
    skipped: bool


class FailedFile(NamedTuple):
    """What an error handler gets: no data, only which file, the class of the error and its message."""

    source: str
    error: str
    message: str


class Task(NamedTuple):
    """One file, or part of a file, to read, and where the result goes.

    A shard that a manifest lists comes with the `shard_id` that it has to have, as hexadecimal digits; one that is to
    be skipped if it is there as well.
    """

    source: str
    size: int
    target: str
    start: int
    end: int
    shard_id: str = ""


register_rows(EncryptedFile, DecryptedFile, FailedFile)


@dataclass(frozen=True)
class EncryptPlan:
    """Which shards become of which files: settings of `EncryptFiles`, usable without Beam."""

    output: str
    if_exists: IfExists = "error"
    part_bytes: int | None = None
    relative_to: str | None = None

    def tasks(self, source: str | FileMetadata, failures: dict[str, ManifestError] | None = None) -> Iterator[Task]:
        """Return the checked tasks of a file, folder, or glob. There are no `failures`: no manifest lists plain files.

        Raises:
            FileNotFoundError: nothing matches.
            AlreadyEncryptedError: a file is ours already.
            FileExistsError: a shard exists, and `if_exists` is "error".
            ValueError: a shard would be found by the pattern that found its source, or a name cannot be kept.
            OSError: from the store.
        """
        del failures
        pattern, found = _found(source)
        base = self.relative_to or split_glob(pattern)[0]
        key_files = existing((key_file_path(metadata.path) for metadata in found), split_glob(pattern)[0])
        is_input = glob_matcher(pattern)
        place_of = Places()
        sources: list[FileMetadata] = []
        for metadata in found:
            path = metadata.path
            refuse_encrypted(path, has_key_file=key_file_path(path) in key_files)
            named = self.named(path, base)
            if named is None:
                continue
            target = _below(self.output, base, named)
            if is_input(place_of(target)):
                msg = (
                    f"{path} would become {target}, which the input pattern {pattern} finds as well: a second run "
                    "would encrypt shards. Choose an output folder outside the pattern"
                )
                raise ValueError(msg)
            if self.part_bytes is not None and target.lower().endswith(_COMPRESSED_NAMES):
                msg = f"split_lines cannot split {path}: it has no lines. Leave split_lines out, or unpack it first"
                raise ValueError(msg)
            sources.append(metadata)
        if not sources:
            msg = "only files that belong to no dataset match: their names, or those of folders, begin with _ or a dot"
            raise FileNotFoundError(errno.ENOENT, msg, pattern)
        _refuse_existing(self._tasks(sources, base), self.output, self.if_exists)
        return self._tasks(sources, base)

    def _tasks(self, sources: Iterable[FileMetadata], base: str) -> Iterator[Task]:
        for source in sources:
            target = _below(self.output, base, cast("str", self.named(source.path, base)))
            for part, start, end in self._parts(target, source.size_in_bytes):
                yield Task(source.path, source.size_in_bytes, part, start, end)

    def named(self, path: str, base: str) -> str | None:  # plans of other formats use them
        """Return the path whose relative form the output gets, or None to pass a source over. `base` is above both."""
        return path

    def _parts(self, target: str, size: int) -> Iterator[tuple[str, int, int]]:
        if self.part_bytes is None:
            yield target, 0, size
            return
        folder, name = split_path(target)
        stem, dot, suffix = name.partition(".")
        ranges = parts(size, self.part_bytes)
        for index, (start, end) in enumerate(ranges):
            yield f"{folder}{stem}-{index:05}-of-{len(ranges):05}{dot}{suffix}", start, end


@dataclass(frozen=True)
class DecryptPlan:
    """Which files become of which shards: settings of `DecryptFiles`, usable without Beam."""

    output: str
    if_exists: IfExists = "error"
    relative_to: str | None = None
    manifest: ManifestReader | None = None

    def tasks(self, source: str | FileMetadata, failures: dict[str, ManifestError] | None = None) -> Iterator[Task]:
        """Return a checked task for each shard of a glob or folder; key files and unfinished files are left out.

        Args:
            source: what the user named.
            failures: takes what the manifest says against single shards, by their paths, instead of raising it.

        Raises:
            FileNotFoundError: no shard matches.
            ManifestError, and what else `ManifestReader.check` raises.
            FileExistsError: an output exists, and `if_exists` is "error".
            ValueError: an output would be its own shard.
            OSError: from the store.
        """
        pattern, found = _found(source)
        base = self.relative_to or split_glob(pattern)[0]
        shards = [
            metadata
            for metadata in found
            if not is_internal(split_path(metadata.path)[1]) and not is_unfinished(metadata.path)
        ]
        shard_ids: Mapping[str, str] = {}
        listed = [metadata.path for metadata in found if may_be_listed(metadata.path)]
        if self.manifest is not None and listed:
            shard_ids = self.manifest.check(pattern, listed, failures)
        if not shards:
            raise FileNotFoundError(errno.ENOENT, "only key files and unfinished files match, no shard", pattern)
        if failures:
            shards = [metadata for metadata in shards if metadata.path not in failures]
        place_of = Places()
        for metadata in shards:
            if place_of(_below(self.output, base, metadata.path)) == place_of(metadata.path):
                msg = f"{metadata.path} would be decrypted onto itself. Choose another output folder"
                raise ValueError(msg)
        _refuse_existing(self._tasks(shards, base, shard_ids), self.output, self.if_exists)
        return self._tasks(shards, base, shard_ids)

    def _tasks(self, shards: Iterable[FileMetadata], base: str, shard_ids: Mapping[str, str]) -> Iterator[Task]:
        for shard in shards:
            path, size = shard.path, shard.size_in_bytes
            yield Task(path, size, _below(self.output, base, path), 0, size, shard_ids.get(path, ""))


def unique_task(target: str, tasks: Iterable[Task]) -> Task:
    """Return the one task that makes a target.

    Raises:
        ValueError: two sources would make the same file.
    """
    distinct = sorted(set(tasks))
    if len(distinct) > 1:
        msg = (
            f"{distinct[0].source} and {distinct[1].source} would both become {target}. "
            "Give relative_to= (--relative-to), a folder above both, or run one job for each"
        )
        raise ValueError(msg)
    return distinct[0]


def _found(source: str | FileMetadata) -> tuple[str, list[FileMetadata]]:
    return (quote_glob(source.path), [source]) if isinstance(source, FileMetadata) else expand(source)


def _below(output: str, base: str, path: str) -> str:
    if not path.startswith(base):
        msg = f"{path} is not below {base}; relative_to= (--relative-to) must name a folder above every source"
        raise ValueError(msg)
    relative = path[len(base) :]
    if ".." in relative.split("/"):  # on an object store, anyone who may write can make such a name
        msg = f"{path} would leave the output folder {output}, because of the .. in its name. Rename it or leave it out"
        raise ValueError(msg)
    try:
        (output + path).encode()
    except UnicodeEncodeError:
        msg = f"the name of {path!r} is not valid UTF-8; rename the file"
        raise ValueError(msg) from None
    return output + relative


def as_folder(path: str) -> str:
    """Return a folder's path with a slash at its end."""
    return path if path.endswith("/") else f"{path}/"


def checked_if_exists(if_exists: str) -> IfExists:
    """Return `if_exists` if it is one of the choices. Raises ValueError."""
    for choice in IF_EXISTS:
        if if_exists == choice:
            return choice
    msg = f"if_exists is one of {', '.join(IF_EXISTS)}, not {if_exists!r}"
    raise ValueError(msg)


def _refuse_existing(tasks: Iterable[Task], output: str, if_exists: IfExists) -> None:
    number = 0

    def targets() -> Iterator[str]:
        nonlocal number
        for number, task in enumerate(tasks, 1):  # noqa: B007  # read below
            yield task.target

    if if_exists == "error" and (found := existing(targets(), output)):
        more = f" ({len(found)} of {number} do)" if number > 1 else ""
        raise FileExistsError(errno.EEXIST, f"the output exists{more}; choose to skip or overwrite it", min(found))
