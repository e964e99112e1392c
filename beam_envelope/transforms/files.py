"""EncryptFiles and DecryptFiles: whole files, any format, byte for byte, on any Beam filesystem."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Final, cast

from apache_beam import typehints

from beam_envelope.errors import (
    ContextMismatchError,
    FormatError,
    TruncatedError,
)
from beam_envelope.formats.keyfile import COMPRESSIONS, MAX_KEY_FILE_BYTES, KeyFile
from beam_envelope.formats.manifest import ManifestEntry
from beam_envelope.formats.output import Output
from beam_envelope.formats.shard_layout import plaintext_size, shard_size
from beam_envelope.formats.shard_writer import ShardWriter
from beam_envelope.io.manifest import WrittenShard
from beam_envelope.io.manifest_reader import ManifestMode, ManifestReader, check_shard_id, checked_mode
from beam_envelope.io.options import Settings
from beam_envelope.io.shards import open_shard_at
from beam_envelope.io.store import key_file_path, read_small, split_path, store_of
from beam_envelope.keys.cache import DataKeyPolicy
from beam_envelope.keys.choice import ChosenSources, KeyChoice, PathFields
from beam_envelope.keys.context import AnyContext
from beam_envelope.keys.uri import Key
from beam_envelope.settings import read_choice, write_choice
from beam_envelope.transforms.file_work import FileDoFn, FilesTransform
from beam_envelope.transforms.lines import blocks, line_bounds, parse_size, read_header
from beam_envelope.transforms.metrics import Progress
from beam_envelope.transforms.plan import (
    DecryptedFile,
    DecryptPlan,
    EncryptedFile,
    EncryptPlan,
    IfExists,
    Task,
    as_folder,
    checked_if_exists,
)

_BLOCK_BYTES: Final = 1 << 20


class EncryptFiles(FilesTransform):
    """Encrypts files: each becomes a shard of the same name below `output`, with a key file beside it.

    Input: file patterns, paths, folders or Beam's `FileMetadata`. Paths are kept relative to the fixed part of their
    pattern. Output: an `EncryptedFile` for each shard.

    Args:
        output: the folder, on any Beam filesystem.
        key: the KMS key, as URI or provider, or several: any one of them opens the shards. Or templates, which the path
            of each source fills (`aws-kms://alias/data-{tenant}`; docs/key-choice.md).
        context: the encryption context, which a reader has to give again. Nothing secret. Its values may be templates.
        split_lines: cut line-delimited files into parts of about this size ("256MiB"), encrypted in parallel. Each part
            ends at a line's end; put together, the parts are the file.
        header_lines: with `split_lines`: repeat so many first lines in each part.
        compression: `none` or `zstd`, before encryption.
        if_exists: what to do when a shard exists: "error", "skip" it if it is whole, or "overwrite" it.
        policy: when to ask the KMS for a new data key.
        relative_to: keep paths relative to this folder instead.
        manifest: list the shards in the manifest at or above `output`, under a data key of its own; a new one is made
            where there is none. Results come when that is done.
        path_fields: where in a path is what fills the templates: `{tenant}/*.csv`. Default: folders say it
            (`tenant=acme/`).

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form. While it runs, see `EncryptPlan` and
        `keys.provider.KeyProvider`.

    Example:
        >>> with beam.Pipeline() as p:
        ...     p | beam.Create(["data/*.csv"]) | EncryptFiles("sealed/", key="aws-kms://alias/etl")
    """

    def __init__(  # noqa: PLR0913  # plain keyword arguments
        self,
        output: str,
        *,
        key: Key | Sequence[Key] | None = None,
        context: Mapping[str, str] | None = None,
        split_lines: int | str | None = None,
        header_lines: int = 0,
        compression: str = "none",
        if_exists: IfExists = "error",
        policy: DataKeyPolicy | None = None,
        relative_to: str | None = None,
        manifest: bool = True,
        path_fields: str | None = None,
    ) -> None:
        """Check the arguments; nothing is called yet."""
        if header_lines < 0 or (header_lines and split_lines is None):
            msg = "header_lines is a number of lines that split_lines repeats in each part; give split_lines as well"
            raise ValueError(msg)
        plan = EncryptPlan(
            as_folder(output),
            checked_if_exists(if_exists),
            None if split_lines is None else parse_size(split_lines),
            None if relative_to is None else as_folder(relative_to),
        )
        if compression not in COMPRESSIONS:
            msg = f"compression is one of {', '.join(COMPRESSIONS)}, not {compression!r}"
            raise ValueError(msg)
        choice = write_choice(key, context)
        fields = PathFields(choice.names, path_fields)
        work = _EncryptDoFn(choice, fields, compression, if_exists, header_lines, policy or DataKeyPolicy())
        super().__init__(plan, work)
        self.lists = manifest

    def key_choices(self, source: str) -> tuple[KeyChoice, ...]:
        """Return the keys and the context that generate data keys for a source. Raises FormatError."""
        return (cast("_EncryptDoFn", self.work).choice_of(source),)


class DecryptFiles(FilesTransform):
    """Decrypts shards: each becomes a file of the same name below `output`. Nothing is left of a file that fails.

    Input: patterns, paths or folders of shards, or Beam's `FileMetadata`; key files among them are passed over.
    Output: a `DecryptedFile` for each.

    Args:
        output: the folder, on any Beam filesystem.
        key: the KMS key, as URI or provider, or several, any of which may open a shard; `AllowedKeys`; or templates,
            which the path of each shard fills.
        context: the encryption context that the shards were written with, or `ANY_CONTEXT`.
        if_exists: what to do when a file exists: "error", "skip" it if it has the right size, or "overwrite" it.
        relative_to: keep paths relative to this folder instead of the fixed part of the pattern.
        manifest: "use": where a manifest is at or above the shards, it has to list them; "require": there has to be
            one; "ignore" it.
        path_fields: as `EncryptFiles` has it, of the shards' paths.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form. While it runs, see `DecryptPlan` and
        `formats.shard.open_shard`.

    Example:
        >>> with beam.Pipeline() as p:
        ...     p | beam.Create(["sealed/*"]) | DecryptFiles("opened/", key="aws-kms://alias/etl")
    """

    def __init__(
        self,
        output: str,
        *,
        key: Key | Sequence[Key] | None = None,
        context: Mapping[str, str] | AnyContext | None = None,
        if_exists: IfExists = "error",
        relative_to: str | None = None,
        manifest: ManifestMode = "use",
        path_fields: str | None = None,
    ) -> None:
        """Check the arguments; nothing is called yet."""
        choice = read_choice(key, context)
        plan = DecryptPlan(
            as_folder(output),
            checked_if_exists(if_exists),
            None if relative_to is None else as_folder(relative_to),
            ManifestReader(checked_mode(manifest), choice.keys, choice.pairs, path_fields),
        )
        super().__init__(plan, ShardReaderDoFn(choice, PathFields(choice.names, path_fields), if_exists))


@typehints.with_output_types(EncryptedFile)
class _EncryptDoFn(FileDoFn):
    label = "Encrypt"

    def __init__(
        self,
        choice: KeyChoice,
        fields: PathFields,
        compression: str,
        if_exists: IfExists,
        header_lines: int,
        policy: DataKeyPolicy,
    ) -> None:
        self._choice, self._fields, self._policy = choice, fields, policy
        self._compression, self._if_exists, self._header_lines = compression, if_exists, header_lines
        self._sources: ChosenSources | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the data keys behind: only configuration travels."""
        return {**self.__dict__, "_sources": None}

    def choice_of(self, source: str) -> KeyChoice:
        """Return the keys and the context of a source. Raises FormatError: its path does not say."""
        return self._choice.filled(self._fields(source))

    def settings(self) -> dict[str, Any]:
        return {
            "key": ", ".join(map(str, self._choice.keys)),
            "context": ", ".join(self._choice.pairs),  # type: ignore[arg-type]  # a writer's is never ANY_CONTEXT
            "compression": self._compression,
        }

    def start_bundle(self) -> None:
        self._sources = ChosenSources(self._choice, self._policy)

    def finish_bundle(self) -> None:
        if self._sources is not None:
            self._sources.close()
        self._sources = None

    def teardown(self) -> None:
        self.finish_bundle()

    def do(self, task: Task, progress: Progress) -> EncryptedFile:
        with store_of(task.source).open(task.source) as source:
            begin, end = (
                (0, task.size) if task.end - task.start == task.size else line_bounds(source, task.start, task.end)
            )
            header = b""
            if self._header_lines and task.start:
                header = read_header(source, self._header_lines, task.start)
            plaintext_bytes = len(header) + end - begin
            if self._if_exists == "skip" and (whole := self._finished(task, plaintext_bytes)) is not None:
                progress.add("files_skipped")
                progress.add("bytes_skipped", task.end - task.start)
                return whole
            # A retried bundle finds what its first try wrote, so only the plan refuses what exists.
            output = store_of(task.target).create(task.target, overwrite=True, size_hint=shard_size(plaintext_bytes))
            return self._encrypt(task, source, output, (begin, end, header), progress)

    def _encrypt(
        self, task: Task, source: BinaryIO, output: Output, text: tuple[int, int, bytes], progress: Progress
    ) -> EncryptedFile:
        begin, end, header = text
        try:
            keys, context = self._sources.of(self._fields(task.source))  # type: ignore[union-attr]  # set by start_bundle
            with keys.take(len(header) + end - begin) as data_key:
                name = split_path(task.source)[1]
                writer = ShardWriter(output, data_key, context, compression=self._compression, name=name)
        except BaseException:
            output.abort()
            raise
        with writer:
            writer.write(header)
            for block in blocks(source, begin, end, _BLOCK_BYTES):
                writer.write(block)
                progress.add("bytes_plaintext", len(block))
            if writer.plaintext_bytes != len(header) + end - begin:
                msg = f"{task.source} became shorter while it was read. Encrypt it again when nobody writes it"
                raise TruncatedError(msg)
        progress.add("bytes_ciphertext", writer.ciphertext_bytes)
        progress.add("files")
        return EncryptedFile(
            task.source,
            task.target,
            key_file_path(task.target),
            writer.plaintext_bytes,
            writer.ciphertext_bytes,
            writer.key_file.data_keys[0].key_id.hex(),
            skipped=False,
            shard_id=writer.key_file.shard_id.hex,
        )

    def listed(self, result: EncryptedFile) -> tuple[WrittenShard, Settings]:
        # How much is in a compressed shard that was there already is known of its source only.
        entry = ManifestEntry(result.shard_id, result.ciphertext_bytes, result.plaintext_bytes)
        choice = self.choice_of(result.source)
        context: Any = choice.pairs  # a writer's is never ANY_CONTEXT
        return WrittenShard(result.shard, entry, not result.skipped), Settings(choice.keys, context)

    def _finished(self, task: Task, plaintext_bytes: int) -> EncryptedFile | None:
        """Return what is there, if it is whole: a key file of this dataset and a shard of the right size beside it.

        A shard takes its final name only when it is whole and its key file is durable, so what is unfinished lacks
        one of the two; the size also finds a shard of another state of the source. What the manifest lists has to be
        that shard: it goes on to list it.
        """
        size = store_of(task.target).size(task.target)
        if size is None:
            return None
        try:
            raw = read_small(key_file_path(task.target), MAX_KEY_FILE_BYTES + 1)
            key_file = KeyFile.from_bytes(raw, f"the key file of {task.target}")
            held = plaintext_size(size)
        except (FileNotFoundError, FormatError, TruncatedError):
            return None
        if key_file.context != self.choice_of(task.source).pairs:
            msg = (
                f"{task.target} exists and belongs to another dataset: its context is {dict(key_file.context)}. "
                "Choose another output"
            )
            raise ContextMismatchError(msg)
        if key_file.compression != self._compression or (self._compression == "none" and held != plaintext_bytes):
            return None
        if task.shard_id not in ("", key_file.shard_id.hex):
            return None
        return EncryptedFile(
            task.source,
            task.target,
            key_file_path(task.target),
            plaintext_bytes,
            size,
            key_file.data_keys[0].key_id.hex(),
            skipped=True,
            shard_id=key_file.shard_id.hex,
        )


@typehints.with_output_types(DecryptedFile)
class ShardReaderDoFn(FileDoFn):
    """Decrypts shards, one after another."""

    label = "Decrypt"

    def __init__(self, choice: KeyChoice, fields: PathFields, if_exists: IfExists) -> None:
        """Hold configuration only."""
        self._choice, self._fields, self._if_exists = choice, fields, if_exists

    def settings(self) -> dict[str, Any]:
        """Return the keys, and the names in the context."""
        context = self._choice.pairs
        names = "any" if isinstance(context, AnyContext) else ", ".join(context)
        return {"key": ", ".join(map(str, self._choice.keys)), "context": names}

    def check(self, task: Task) -> None:
        """Open a shard."""
        key_file, shard = self._open(task, None)
        shard.close()
        check_shard_id(task.source, key_file, task.shard_id)

    def do(self, task: Task, progress: Progress) -> DecryptedFile:
        """Decrypt one shard."""
        return self.decrypt(task, progress, None)

    def decrypt(self, task: Task, progress: Progress, raw_key_file: bytes | None) -> DecryptedFile:
        """Do one task whose key file may have been read already."""
        key_file, shard = self._open(task, raw_key_file)
        with shard:
            check_shard_id(task.source, key_file, task.shard_id)
            key_id = key_file.data_keys[0].key_id.hex()
            existing = store_of(task.target).size(task.target) if self._if_exists == "skip" else None
            if existing is not None and (
                key_file.compression != "none" or existing == plaintext_size(task.size, task.source)
            ):
                progress.add("files_skipped")
                progress.add("bytes_skipped", task.size)
                return DecryptedFile(task.source, task.target, existing, task.size, key_id, skipped=True)
            output = store_of(task.target).create(task.target, overwrite=True, size_hint=task.size)
            total = 0
            try:
                buffer = memoryview(bytearray(_BLOCK_BYTES))
                while count := shard.readinto(buffer):
                    output.write(buffer[:count])
                    total += count
                    progress.add("bytes_plaintext", count)
                output.commit()
            except BaseException:
                output.abort()
                raise
        progress.add("bytes_ciphertext", task.size)
        progress.add("files")
        return DecryptedFile(task.source, task.target, total, task.size, key_id, skipped=False)

    def _open(self, task: Task, raw_key_file: bytes | None) -> tuple[KeyFile, io.BufferedReader]:
        choice = self._choice.filled(self._fields(task.source))
        return open_shard_at(task.source, choice.keys, choice.pairs, raw_key_file)
