"""`envelope::s3://bucket/part.csv`: an fsspec filesystem whose files are the shards of the filesystem inside.

Paths are those of the filesystem inside. Sizes are those of the plaintext, computed from listings. Key files are
hidden, and move, copy and go with their shards. docs/fsspec.md is the guide.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Mapping, Sequence
from functools import partial
from glob import has_magic
from typing import Any, Final

from fsspec import filesystem
from fsspec.core import get_compression
from fsspec.implementations.chained import ChainedFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFile
from fsspec.utils import stringify_path

from beam_envelope.errors import FormatError, TruncatedError
from beam_envelope.formats.keyfile import MAX_KEY_FILE_BYTES, KeyFile, is_internal
from beam_envelope.formats.output import LocalOutput, Output
from beam_envelope.formats.shard import missing_key_file, open_sealed
from beam_envelope.formats.shard_layout import CHUNK_BYTES, HEADER_BYTES, plaintext_size
from beam_envelope.formats.shard_writer import ShardWriter
from beam_envelope.fsspec.output import FsspecOutput, HeldWriter, key_file_path, name_of, publish, rename
from beam_envelope.keys.cache import generate_data_key
from beam_envelope.keys.context import AnyContext
from beam_envelope.keys.uri import Key
from beam_envelope.settings import settings_of

_NO_KEY: Final = (
    "no key is set for envelope:: paths: give key='aws-kms://alias/NAME' as a storage option, or set BEAM_ENVELOPE_KEY"
)


class EnvelopeFsspecFileSystem(ChainedFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Shards of another fsspec filesystem, as the files that they encrypt.

    Args:
        fs: the filesystem inside; or, as URLs give it:
        target_protocol, target_options: what to make it from.
        key: the KMS key, as URI or provider, or several: all of them wrap the data key of what is written, any of them
            may open what is read. Default: BEAM_ENVELOPE_KEY.
        context: the encryption context, to write and to be expected. Nothing secret. Default: BEAM_ENVELOPE_CONTEXT.
        any_context: read shards of any context. Default: BEAM_ENVELOPE_ANY_CONTEXT.
        zstd: compress what is written, and read compressed shards too. No listing tells a compressed shard from
            another, so all sizes are then unknown (None).

    Raises:
        (on open) as `beam_envelope.open_shard` and `create_shard`.

    Example:
        >>> pandas.read_csv("envelope::s3://bucket/part.csv", storage_options={"key": "aws-kms://alias/etl"})
    """

    protocol = "envelope"
    _strip_tokenize_options = ("fo",)  # the path of one URL: it must not make another instance of each

    def __init__(
        self,
        fs: Any = None,
        fo: str = "",
        target_protocol: str = "file",
        target_options: Mapping[str, Any] | None = None,
        *,
        key: Key | Sequence[Key] | None = None,
        context: Mapping[str, str] | AnyContext | None = None,
        any_context: bool | None = None,
        zstd: bool = False,
        **storage_options: Any,
    ) -> None:
        """Keep the options; neither keys nor the environment are looked at before a file is opened."""
        super().__init__(**storage_options)
        self.fs = filesystem(target_protocol, **(target_options or {})) if fs is None else fs
        self.zstd = zstd
        context, any_context = ({}, True) if isinstance(context, AnyContext) else (context, any_context)
        self._settings = partial(settings_of, key=key, context=context, any_context=any_context, missing=_NO_KEY)
        self._local = isinstance(self.fs, LocalFileSystem)
        # fsspec asks the class for a URL's own part, and instances for the path.
        self._strip_protocol = self._inside  # type: ignore[method-assign]

    # ------------------------------------------------------------------ paths and listings

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        path = stringify_path(path)
        return path.removeprefix("envelope://").removeprefix("envelope::") if isinstance(path, str) else path

    def _inside(self, path: Any) -> Any:
        """Return the path in the filesystem inside."""
        if isinstance(path, list):
            return [self._inside(one) for one in path]
        return self.fs._strip_protocol(type(self)._strip_protocol(path))  # noqa: SLF001  # fsspec's own protocol

    def _parent(self, path: str) -> Any:  # a classmethod there, but ours depends on self.fs
        return self.fs._parent(self._inside(path))  # noqa: SLF001  # as above

    def _entry(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Return an entry of a listing with the plaintext's size; what cannot be a shard keeps its own."""
        if entry.get("type") != "file" or entry.get("size") is None:
            return entry
        if self.zstd:
            return {**entry, "size": None}
        with contextlib.suppress(TruncatedError):
            return {**entry, "size": plaintext_size(entry["size"])}
        return entry

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """List a folder as the filesystem inside does, without key files and unfinished files."""
        path = self._seen(path)
        entries = [
            entry
            for entry in self.fs.ls(path, detail=True, **kwargs)
            if not is_internal(name_of(entry["name"].rstrip("/")))
        ]
        return [self._entry(entry) for entry in entries] if detail else sorted(entry["name"] for entry in entries)

    def find(
        self,
        path: str,
        maxdepth: int | None = None,
        withdirs: bool = False,
        detail: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Find all shards below a folder, in as many requests as the filesystem inside needs for its files."""
        path = self._inside(path)
        found = self.fs.find(path, maxdepth=maxdepth, withdirs=withdirs, detail=True, **kwargs)
        seen = {name: info for name, info in found.items() if not _is_hidden(name.removeprefix(path) or name_of(name))}
        return {name: self._entry(info or self.fs.info(name)) for name, info in seen.items()} if detail else list(seen)

    def du(
        self,
        path: str,
        total: bool = True,
        maxdepth: int | None = None,
        withdirs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the bytes of plaintext below a folder, from a listing."""
        found = self.find(path, maxdepth=maxdepth, withdirs=withdirs, detail=True, **kwargs)
        sizes = {name: info["size"] for name, info in found.items()}
        return sum(sizes.values()) if total else sizes

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Return the entry of a shard or folder. Raises FileNotFoundError."""
        return self._entry(self.fs.info(self._seen(path), **kwargs))

    def isdir(self, path: str) -> bool:
        """Whether it is a folder."""
        return bool(self.fs.isdir(self._inside(path)))

    def created(self, path: str) -> Any:
        """Return when the shard was created."""
        return self.fs.created(self._seen(path))

    def modified(self, path: str) -> Any:
        """Return when the shard was written."""
        return self.fs.modified(self._seen(path))

    def checksum(self, path: str) -> Any:
        """Return the checksum of the ciphertext. Each writing gives another."""
        return self.fs.checksum(self._seen(path))

    def ukey(self, path: str) -> Any:
        """Return what changes when the shard is written again."""
        return self.fs.ukey(self._seen(path))

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget listings."""
        self.fs.invalidate_cache(path if path is None else self._inside(path))
        super().invalidate_cache(path)

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        """Make a folder."""
        self.fs.mkdir(self._inside(path), create_parents=create_parents, **kwargs)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder and those above it."""
        self.fs.makedirs(self._inside(path), exist_ok=exist_ok)

    def rmdir(self, path: str) -> None:
        """Remove an empty folder."""
        self.fs.rmdir(self._inside(path))

    # ------------------------------------------------------------------ reading and writing

    def open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        cache_options: Mapping[str, Any] | None = None,
        compression: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Open a shard. See fsspec; options that are not known here go to the filesystem inside.

        Raises:
            ValueError: `compression` on writing: fsspec's compressors do not close the file below them, so the shard
                would never be finished. `fsspec.open` and pandas, which close both, may compress.
        """
        if "r" not in mode and get_compression(path, compression) is not None:
            msg = f"to write {path} with compression, use fsspec.open('envelope::...', compression=...)"
            raise ValueError(msg)
        return super().open(path, mode, block_size, cache_options, compression, **kwargs)

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> io.BufferedIOBase:
        kwargs.pop("size", None)  # what a caller knows is the plaintext's; the filesystem inside would believe it
        options = {"block_size": block_size, "cache_options": cache_options, **kwargs}
        options = {name: value for name, value in options.items() if value is not None}
        if mode == "rb":
            return self._open_shard(self._seen(path), options)
        if mode in {"wb", "xb"}:
            return self._create_shard(path, exclusive=mode == "xb", hold=not autocommit, options=options)
        msg = f"{path} cannot be opened with mode {mode!r}: a shard is read ('rb') or written anew ('wb', 'xb')"
        raise io.UnsupportedOperation(msg)

    def _open_shard(self, path: str, options: dict[str, Any]) -> io.BufferedIOBase:
        settings = self._settings()
        raw = self._read_key_file(path)
        compressed = KeyFile.from_bytes(raw, f"the key file of {path}").compression != "none"
        if compressed and not self.zstd:
            msg = (
                f"{path} was compressed before it was encrypted, so its listed size is not that of its plaintext, and "
                "readers that trust it would read a part. Give the storage option zstd=True, which leaves sizes open"
            )
            raise FormatError(msg)
        stream = self.fs.open(path, "rb", **options)
        in_memory = isinstance(stream, MemoryFile)
        if in_memory:
            stream = io.BytesIO(stream.getvalue())  # memory:// hands the same handle, with one position, to all
        try:
            stored_bytes = stream.seek(0, io.SEEK_END)
            shard = open_sealed(stream, raw, settings.keys, settings.expected_context, path, own=not in_memory)
        except BaseException:
            stream.close()
            raise
        size = None if compressed else plaintext_size(stored_bytes, path)
        if size is not None and size % CHUNK_BYTES == 0:
            # Readers that ask for `size` bytes never come to an empty last chunk, which alone proves that this is the
            # end: a shard cut at a chunk's border would read as a whole.
            shard.seek(0, io.SEEK_END)
            shard.seek(0)
        shard.size = size  # type: ignore[attr-defined]  # where fsspec's own code looks for it
        return shard

    def _create_shard(self, path: str, *, exclusive: bool, hold: bool, options: dict[str, Any]) -> ShardWriter:
        path = self._inside(path)
        if is_internal(name_of(path)):
            msg = f"{path} is a name that is kept for key files and unfinished files. Choose another"
            raise ValueError(msg)
        settings = self._settings()
        output: Output = (
            LocalOutput(path, overwrite=not exclusive)
            if self._local
            else FsspecOutput(self.fs, path, overwrite=not exclusive, options=options)
        )
        kind = HeldWriter if hold else ShardWriter
        try:
            with generate_data_key(settings.keys, settings.context) as data_key:
                compression = "zstd" if self.zstd else "none"
                return kind(output, data_key, settings.context, compression=compression, name=name_of(path))
        except BaseException:
            output.abort()
            raise

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> Any:
        """Return a shard's plaintext, or a range of it: then only the chunks that it touches are fetched."""
        if start is not None or end is not None:
            kwargs.setdefault("cache_type", "none")  # reading ahead would fetch what nobody asked for
        return super().cat_file(path, start, end, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """Write a shard at once."""
        with self.open(path, "xb" if mode == "create" else "wb", **kwargs) as shard:
            shard.write(value)

    # ------------------------------------------------------------------ copy, move, remove

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy a shard with its key file, without opening it; of a folder, make the new one."""
        source, target = self._seen(path1), self._inside(path2)
        if self.fs.info(source)["type"] == "directory":
            self.makedirs(target, exist_ok=True)
        elif not self._same(source, target):
            put = partial(self.fs.cp_file, source, target, **kwargs)
            publish(self.fs, target, self._read_key_file(source), put, overwrite=True)

    def mv(
        self,
        path1: Any,
        path2: Any,
        recursive: bool = False,
        maxdepth: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Move shards with their key files; one shard is renamed where the filesystem inside can."""
        if isinstance(path1, list) or not self.isfile(path1) or str(path2).endswith("/") or self.isdir(path2):
            super().mv(path1, path2, recursive=recursive, maxdepth=maxdepth, **kwargs)
            return
        source, target = self._inside(path1), self._inside(path2)
        if not self._same(source, target):
            publish(
                self.fs, target, self._read_key_file(source), partial(rename, self.fs, source, target), overwrite=True
            )
            self._rm_key_file(source)

    def rm_file(self, path: str) -> None:
        """Remove a shard, then its key file."""
        path = self._seen(path)
        self.fs.rm_file(path)
        self._rm_key_file(path)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove shards with their key files, and folders with all that is in them.

        With `maxdepth`, the folders stay.
        """
        for found in reversed(self.expand_path(path)):
            if not recursive or not self.isdir(found):
                (self.fs.rm if self.isdir(found) else self.rm_file)(found)
            elif maxdepth is not None:
                for shard in self.find(found, maxdepth=maxdepth):
                    self.rm_file(shard)
            else:
                _remove(self.fs, self.find(found))  # before their key files, should this end halfway
                if self.fs.exists(found):
                    self.fs.rm(found, recursive=True)

    def _seen(self, path: str) -> str:
        """Return the path in the filesystem inside, of what listings show."""
        path = self._inside(path)
        if is_internal(name_of(path)):
            raise FileNotFoundError(errno.ENOENT, "key files and unfinished files cannot be seen from here", path)
        return path

    def _same(self, source: str, target: str) -> bool:
        """Whether two paths are one file, which making room for the target would destroy."""
        return source == target or (self._local and os.path.exists(target) and os.path.samefile(source, target))

    def _read_key_file(self, path: str) -> bytes:
        try:
            return bytes(self.fs.cat_file(key_file_path(path), end=MAX_KEY_FILE_BYTES + 1))
        except FileNotFoundError:
            head = self.fs.cat_file(path, end=HEADER_BYTES)  # where there is no shard either, says so
            raise missing_key_file(path, head) from None

    def _rm_key_file(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(key_file_path(path))


def _remove(fs: Any, paths: list[str]) -> None:
    """Remove files, all in one call where their names let it take them for what they are."""
    for path in filter(has_magic, paths):
        fs.rm_file(path)
    if rest := [path for path in paths if not has_magic(path)]:
        fs.rm(rest)


def _is_hidden(path: str) -> bool:
    return any(is_internal(name) for name in path.split("/"))
