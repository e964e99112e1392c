"""`envelope+file://`, `envelope+s3://`, ...: Beam filesystems whose files are shards of the filesystem inside.

Every Beam IO works on them: what it writes is encrypted, what it reads is opened, and sizes are those of the plaintext,
computed from listings. Key files are hidden, and move, copy and go with their shards.

They wrap, and do not subclass, Beam's filesystems: a subclass of LocalFileSystem would make every local path ambiguous.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Final

from apache_beam.io.filesystem import BeamIOError, CompressedFile, CompressionTypes, FileMetadata, FileSystem
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions

from beam_envelope.errors import FormatError, ManifestError, TruncatedError
from beam_envelope.formats.keyfile import MAX_KEY_FILE_BYTES, is_internal
from beam_envelope.formats.shard_layout import plaintext_size
from beam_envelope.formats.shard_writer import ShardWriter
from beam_envelope.io.manifest_reader import check_shard_id
from beam_envelope.io.options import Settings, current_settings
from beam_envelope.io.shards import open_shard_at
from beam_envelope.io.store import LocalStore, key_file_path, quote_glob, read_small, store_of
from beam_envelope.keys.cache import generate_data_key

PREFIX: Final = "envelope+"
_LOCAL: Final = "envelope+file://"


def register_filesystem(options: PipelineOptions) -> PipelineOptions:
    """Make the filesystems known on the workers of every runner, through Beam's `--beam_plugins`.

    In this process they are known from the import of this module on.

    Args:
        options: the pipeline's options; changed in place.

    Returns:
        The same options.
    """
    setup = options.view_as(SetupOptions)
    if __name__ not in (setup.beam_plugins or []):
        setup.beam_plugins = [*(setup.beam_plugins or []), __name__]
    return options


class EncryptedPath(str):
    """An envelope path whose pickle imports this module, so that a worker that opens it knows the filesystems.

    Beam's `--beam_plugins` does that wherever pipeline options reach the workers. They do not reach a pool of external
    workers (`worker_pool_main`) without a boot program; there, give this to Beam's IOs in place of the text.

    Args:
        path: a path with or without its `envelope+`.

    Example:
        >>> lines | beam.io.WriteToText(EncryptedPath("s3://sealed/part"))
    """

    __slots__ = ()

    def __new__(cls, path: str) -> EncryptedPath:
        """Return the envelope path."""
        return super().__new__(cls, outer_path(inner_path(path)))

    def __str__(self) -> str:
        """Return the path itself: Beam's IOs keep `str(path)`, which would be pickled without its class."""
        return self


class SettingsMimeType(str):
    """A MIME type that carries settings to `create`: the one thing that Beam passes on from a destination's sink."""

    __slots__ = ("settings",)
    settings: Settings

    def __new__(cls, mime_type: str, settings: Settings) -> SettingsMimeType:
        """Return the MIME type with the settings."""
        ours = super().__new__(cls, mime_type)
        ours.settings = settings
        return ours


def inner_path(path: str) -> str:
    """Return the path in the filesystem inside: `envelope+s3://b/k` is `s3://b/k`, `envelope+file:///a` is `/a`."""
    return path.removeprefix(_LOCAL) if path.startswith(_LOCAL) else path.removeprefix(PREFIX)


def outer_path(path: str) -> str:
    """Return the envelope path of a path: the inverse of `inner_path`."""
    return f"{PREFIX}{path}" if FileSystems.get_scheme(path) is not None else f"{_LOCAL}{path}"


class EnvelopeFileSystem(FileSystem):
    """What all envelope filesystems share. Beam makes a new one for each call, so it holds nothing but options."""

    def __init__(self, pipeline_options: PipelineOptions | Mapping[str, Any] | None) -> None:
        """Keep the options; nothing is read from them before a file is opened."""
        super().__init__(pipeline_options)
        self._options = pipeline_options

    @classmethod
    def scheme(cls) -> str:
        """Return a scheme that no path has: Beam asks abstract classes too."""
        return "envelope-abstract"

    def join(self, basepath: str, *paths: str) -> str:
        """Join as the filesystem inside does."""
        return outer_path(_inside(basepath).join(inner_path(basepath), *paths))

    def split(self, path: str) -> tuple[str, str]:
        """Split as the filesystem inside does."""
        head, tail = _inside(path).split(inner_path(path))
        return outer_path(head), tail

    def mkdirs(self, path: str) -> None:
        """Make folders. Raises OSError if the last is there already."""
        _inside(path).mkdirs(inner_path(path))

    def has_dirs(self) -> bool:
        """Whether the filesystem inside has folders."""
        return bool(FileSystems.get_filesystem(inner_path(f"{self.scheme()}://x/y")).has_dirs())

    def create(
        self,
        path: str,
        mime_type: str = "application/octet-stream",
        compression_type: str = CompressionTypes.AUTO,
    ) -> BinaryIO:
        """Open a new shard for writing. Only `close` finishes it; its key file is durable before it is visible.

        A name that ends in .gz and the like is compressed before it is encrypted, as Beam does with plain files.

        Raises:
            KeyAccessError, KmsUnavailableError: from the KMS.
            ValueError: no key is set.
            OSError: from the store.
        """
        settings = getattr(mime_type, "settings", None) or current_settings(self._options)
        inner = inner_path(path)
        output = store_of(inner).create(inner, overwrite=True, size_hint=0)
        try:
            with generate_data_key(settings.keys, settings.context) as data_key:
                writer = ShardWriter(output, data_key, settings.context, compression="none", name="")
        except BaseException:
            output.abort()
            raise
        return _compressed(writer, path, compression_type)

    def open(
        self,
        path: str,
        mime_type: str = "application/octet-stream",
        compression_type: str = CompressionTypes.AUTO,
    ) -> BinaryIO:
        """Open a shard for reading. Raises as `beam_envelope.open_shard`."""
        settings = current_settings(self._options)
        key_file, shard = open_shard_at(inner_path(path), settings.keys, settings.expected_context)
        try:
            check_shard_id(path, key_file, settings.shard_id)
        except ManifestError:
            shard.close()
            raise
        if key_file.compression != "none":
            shard.close()
            msg = (
                f"{path} was compressed before it was encrypted, so its listed size is not that of its plaintext, and "
                "Beam would read a part of it. Read it with DecryptFiles or open_shard"
            )
            raise FormatError(msg)
        return _compressed(shard, path, compression_type)

    def copy(self, source_file_names: Sequence[str], destination_file_names: Sequence[str]) -> None:
        """Copy shards with their key files. Raises BeamIOError."""
        _each("Copy", _copy, source_file_names, destination_file_names)

    def rename(self, source_file_names: Sequence[str], destination_file_names: Sequence[str]) -> None:
        """Rename shards with their key files, within one scheme. Raises BeamIOError."""
        _each("Rename", _rename, source_file_names, destination_file_names)

    def exists(self, path: str) -> bool:
        """Whether there is a shard or a folder of that name."""
        inner = inner_path(path)
        return store_of(inner).size(inner) is not None or _inside(path).exists(inner)

    def size(self, path: str) -> int:
        """Return the size of the plaintext. Raises BeamIOError where there is no such file."""
        return int(self.metadata(path).size_in_bytes)

    def last_updated(self, path: str) -> float:
        """Return when the shard was written, in seconds since 1970."""
        return float(_inside(path).last_updated(inner_path(path)))

    def checksum(self, path: str) -> str:
        """Return the checksum of the ciphertext, as the filesystem inside has it."""
        return str(_inside(path).checksum(inner_path(path)))

    def metadata(self, path: str) -> FileMetadata:
        """Return path, size of the plaintext, and time. Raises BeamIOError where there is no such file."""
        inside = _inside(path).metadata(inner_path(path))
        return FileMetadata(path, _plaintext_size(inside.size_in_bytes), inside.last_updated_in_seconds)

    def delete(self, paths: Sequence[str]) -> None:
        """Delete shards with their key files, and folders with all that is in them. Raises BeamIOError."""
        failures: dict[str, Exception] = {}
        for path in paths:
            inner = inner_path(path)
            try:
                if store_of(inner).is_folder(inner) and isinstance(store_of(inner), LocalStore):
                    shutil.rmtree(inner)
                    continue
                found = [metadata.path for metadata in self.match([path])[0].metadata_list]
                if not found:
                    failures[path] = FileNotFoundError(f"no files found to delete under {path}")
                for shard in found:
                    _delete(inner_path(shard))
            except (OSError, BeamIOError) as error:
                failures[path] = error
        if failures:
            raise BeamIOError("Delete operation failed", failures)

    def report_lineage(self, path: str, lineage: Any) -> None:
        """Report the path inside."""
        _inside(path).report_lineage(inner_path(path), lineage)

    def _url_dirname(self, url_or_path: str) -> str:
        return outer_path(_inside(url_or_path)._url_dirname(inner_path(url_or_path)))  # noqa: SLF001  # as Beam's match does

    def _list(self, dir_or_prefix: str) -> Iterator[FileMetadata]:
        inner = inner_path(dir_or_prefix)
        store = store_of(inner)
        if isinstance(store, LocalStore):
            if not store.is_folder(inner):
                return
            inner = inner.rstrip("/") + "/"
        for metadata in store.match(f"{quote_glob(inner)}**"):
            if not any(map(is_internal, metadata.path[len(inner) :].split("/"))):  # nor in an unfinished folder
                size = _plaintext_size(metadata.size_in_bytes)
                yield FileMetadata(outer_path(metadata.path), size, metadata.last_updated_in_seconds)


class EnvelopeLocalFileSystem(EnvelopeFileSystem):
    """Shards on a local disk: `envelope+file:///folder/name` or, relative, `envelope+file://folder/name`."""

    @classmethod
    def scheme(cls) -> str:
        """Return `envelope+file`."""
        return "envelope+file"


class EnvelopeS3FileSystem(EnvelopeFileSystem):
    """Shards on S3: `envelope+s3://bucket/name`."""

    @classmethod
    def scheme(cls) -> str:
        """Return `envelope+s3`."""
        return "envelope+s3"


class EnvelopeGCSFileSystem(EnvelopeFileSystem):
    """Shards on Google Cloud Storage: `envelope+gs://bucket/name`."""

    @classmethod
    def scheme(cls) -> str:
        """Return `envelope+gs`."""
        return "envelope+gs"


class EnvelopeHadoopFileSystem(EnvelopeFileSystem):
    """Shards on HDFS: `envelope+hdfs://name`."""

    @classmethod
    def scheme(cls) -> str:
        """Return `envelope+hdfs`."""
        return "envelope+hdfs"


def _inside(path: str) -> FileSystem:
    return FileSystems.get_filesystem(inner_path(path))


def _plaintext_size(stored_bytes: int) -> int:
    """Return the plaintext's size; of a file that cannot be a shard, its own: opening it says what is wrong."""
    try:
        return plaintext_size(stored_bytes)
    except TruncatedError:
        return stored_bytes


def _compressed(stream: Any, path: str, compression_type: str) -> Any:  # Beam's handles have no common type
    kind = FileSystem._get_compression_type(path, compression_type)  # noqa: SLF001  # as every Beam filesystem does
    return stream if kind == CompressionTypes.UNCOMPRESSED else CompressedFile(stream, compression_type=kind)


def _each(
    verb: str, operation: Callable[[str, str], None], sources: Sequence[str], destinations: Sequence[str]
) -> None:
    if len(sources) != len(destinations):
        raise BeamIOError(f"{verb} operation failed: {len(sources)} sources for {len(destinations)} destinations")
    failures: dict[Any, Exception] = {}
    for source, destination in zip(sources, destinations, strict=True):
        try:
            if FileSystems.get_scheme(source) != FileSystems.get_scheme(destination):
                msg = (
                    f"{source} cannot become {destination}: between schemes, ciphertext would take a plain name or "
                    "plaintext an encrypted one. Use EncryptFiles or DecryptFiles"
                )
                raise ValueError(msg)  # noqa: TRY301  # one place that collects
            operation(inner_path(source), inner_path(destination))
        except (OSError, BeamIOError, ValueError) as error:
            failures[source, destination] = error
    if failures:
        raise BeamIOError(f"{verb} operation failed", failures)


def _copy(source: str, destination: str) -> None:
    _place_key_file(source, destination)
    FileSystems.get_filesystem(source).copy([source], [destination])


def _rename(source: str, destination: str) -> None:
    _place_key_file(source, destination)
    filesystem = FileSystems.get_filesystem(source)
    filesystem.rename([source], [destination])
    filesystem.delete([key_file_path(source)])


def _place_key_file(source: str, destination: str) -> None:
    """Put a shard's key file beside its new name, before the shard has that name."""
    key_file = read_small(key_file_path(source), MAX_KEY_FILE_BYTES)
    store = store_of(destination)
    if store.size(destination) is not None:
        _delete(destination)  # at no time may a shard stand beside the key file of another
    output = store.create(key_file_path(destination), overwrite=True, size_hint=len(key_file))
    try:
        output.write(key_file)
        output.commit()
    except BaseException:
        output.abort()
        raise


def _delete(shard: str) -> None:
    """Delete a shard, then its key file: a key file alone does no harm."""
    filesystem = FileSystems.get_filesystem(shard)
    filesystem.delete([shard])
    if store_of(shard).size(key_file_path(shard)) is not None:
        filesystem.delete([key_file_path(shard)])
