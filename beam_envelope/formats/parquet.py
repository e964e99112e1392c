"""Parquet files encrypted column by column (Parquet modular encryption), with a key file. Bytes: docs/format.md, 10.

Opening and creating are here; what is written and read then, in parquet_writer.py and parquet_reader.py.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from beam_envelope.errors import EnvelopeError, FormatError, KeyFileMissingError, NotEncryptedError
from beam_envelope.formats.keyfile import MAX_KEY_FILE_BYTES, PARQUET_CIPHER, KeyFile, is_internal, key_file_name
from beam_envelope.formats.output import LocalOutput, Output, StreamOutput
from beam_envelope.formats.parquet_columns import leaf_paths
from beam_envelope.formats.parquet_footer import read_footer
from beam_envelope.formats.parquet_interop import in_key_file, master_key_names
from beam_envelope.formats.parquet_keys import ColumnKeys
from beam_envelope.formats.parquet_reader import EncryptedParquetReader, OnDenied
from beam_envelope.formats.parquet_source import MAGIC, Source
from beam_envelope.formats.parquet_writer import EncryptedParquetWriter
from beam_envelope.formats.shard import KeyFileSource, key_file_writer, missing_key_file, read_key_file
from beam_envelope.formats.shard_layout import HEADER_BYTES
from beam_envelope.keys.context import AnyContext, checked_context, match_context
from beam_envelope.keys.provider import KeyProvider
from beam_envelope.keys.uri import Key, open_keys


def create_parquet(
    destination: str | os.PathLike[str] | BinaryIO,
    schema: pa.Schema,
    *,
    key: Key | Sequence[Key] | None = None,
    columns: Mapping[str, Key | Sequence[Key]] | None = None,
    context: Mapping[str, str] | None = None,
    overwrite: bool = False,
    key_file: str | os.PathLike[str] | BinaryIO | None = None,
    interop: bool = False,
    **writer_options: Any,
) -> EncryptedParquetWriter:
    """Start an encrypted Parquet file.

    Args:
        destination: a local path, or a binary stream open for writing (which stays open).
        schema: the Arrow schema of what will be written.
        key: the KMS key, as URI or provider, or several, any one of which opens the file: for the footer and all
            columns that `columns` does not name.
        columns: KMS keys of columns: the name of a column, or the path of what is in it (`address.zip`), and its key or
            keys. Without `key`, all other columns are **plain** and not authenticated, and each of the KMS keys named
            opens the footer.
        context: the encryption context, which a reader has to give again. Nothing secret.
        overwrite: replace a file that exists.
        key_file: where the key file goes. Needed with a stream; with a path it goes beside the file.
        interop: for readers (Spark, pyarrow) with nothing but a plain `KmsClient` for AWS KMS: the keys are wrapped by
            the KMS in the footer, and there is no key file. What is lost: rotation means to write the file again, a
            file can be swapped unseen for another one under the same KMS keys, there is no encryption context, and
            between KMS and columns is a key of 128 bits. The footer and each column can be under one KMS key only.
        writer_options: any of those of `pyarrow.parquet.ParquetWriter`, except `bloom_filter_options`,
            `encryption_properties`, `filesystem` and `metadata_collector`.

    Returns:
        A writer. Use it in a `with` block: an exception in the block leaves no file.

    Raises:
        FileExistsError: the path exists, and `overwrite` is off.
        KeyAccessError, KmsUnavailableError: from the KMS.
        ValueError, TypeError, FormatError: an argument is not of the right form, or names an unknown column.

    Example:
        >>> with create_parquet("out/a.parquet", table.schema, key="aws-kms://alias/etl",
        ...                     columns={"ssn": "aws-kms://alias/pii"}) as writer:
        ...     writer.write_table(table)
    """
    column_keys = ColumnKeys.of(key, columns)
    pairs = checked_context(context)
    if interop:
        if key_file is not None:
            raise ValueError("with interop=True there is no key file: leave out key_file=")
        master_key_names(column_keys, pairs)
    column_keys.assign(leaf_paths(schema, writer_options))  # before anything is made, and before the KMS is asked
    if isinstance(destination, (str, os.PathLike)):
        if key_file is not None:
            raise ValueError("key_file goes with a stream; the key file of a path has a fixed name beside it")
        path = _local_path(destination, "create_parquet")
        if is_internal(path.name):
            raise ValueError(f"{path} is a name that key files, manifests and unfinished files have; choose another")
        output: Output = (_Keyless if interop else LocalOutput)(path, overwrite=overwrite)
        name = path.name
    else:
        output = StreamOutput(destination, len if interop else key_file_writer(key_file))  # len: never called
        name = ""
    try:
        data_keys = [] if interop else column_keys.generate(pairs)
        try:
            return EncryptedParquetWriter(
                output, schema, data_keys, column_keys, pairs, name=name, options=writer_options, interop=interop
            )
        finally:
            for data_key in data_keys:
                data_key.close()
    except BaseException:
        output.abort()
        raise


def open_parquet(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    key: Key | Sequence[Key],
    context: Mapping[str, str] | AnyContext | None = None,
    key_file: KeyFileSource | None = None,
    on_denied: OnDenied = "error",
    interop: bool = False,
) -> EncryptedParquetReader:
    """Open an encrypted Parquet file for reading.

    Args:
        source: a local path, or a seekable binary stream (which stays open).
        key: the KMS keys that this reader may use, as URIs or providers. One of them has to open the footer.
        context: the encryption context that it was written with, or `ANY_CONTEXT`.
        key_file: the key file: a path, its bytes or a stream. Needed with a stream; default: the one beside the path.
        on_denied: what becomes of columns whose KMS keys this reader may not use: `error` raises when one is read,
            `null` reads nulls in their place, `drop` leaves them out. A list or map is denied if a column in it is.
        interop: open a file that has its keys in its footer, wrapped by AWS KMS: one of `create_parquet(interop=True)`,
            or one that Spark, parquet-java or pyarrow wrote with a `KmsClient` whose wrapped keys are the base64 of
            KMS's ciphertext. Then `context` is what that client gave to KMS; ours gives none. Nothing tells such a file
            from another one under the same KMS keys that was put in its place.

    Returns:
        A reader. Nothing of an encrypted column is returned before its page is authenticated; columns that were written
        plain are not authenticated at all.

    Raises:
        KeyFileMissingError, NotEncryptedError, FormatError: this is no encrypted Parquet file, or its key file is
            missing or broken.
        ContextMismatchError, WrongKeyError, KeyAccessError, KmsUnavailableError: the key or context is not right.
        TruncatedError, TamperedError: the file or key file was changed.

    Example:
        >>> with open_parquet("out/a.parquet", key="aws-kms://alias/etl", on_denied="null") as reader:
        ...     table = reader.read(filter=pc.field("year") == 2026)
    """
    keys = open_keys(key)
    if interop:
        return _open_interop(source, keys, context, key_file, on_denied)
    if not isinstance(source, (str, os.PathLike)):
        if key_file is None:
            raise ValueError(
                "a stream has no name beside which a key file could be; pass key_file= (a path, bytes or a stream), or "
                "interop=True if its keys are in its footer, wrapped by AWS KMS"
            )
        what = str(getattr(source, "name", "the Parquet file"))
        return open_sealed_parquet(source, read_key_file(key_file), keys, context, what, on_denied=on_denied)
    path = _local_path(source, "open_parquet")
    if is_internal(path.name):
        msg = f"{path} is a key file or an unfinished file, not a Parquet file. Name the Parquet file itself"
        raise NotEncryptedError(msg)
    stream = pa.OSFile(str(path))  # no memory map: a file that is cut while it is mapped kills its readers
    try:
        raw = read_key_file(key_file) if key_file is not None else _sibling_key_file(path, stream)
        return open_sealed_parquet(stream, raw, keys, context, str(path), on_denied=on_denied, own=True)
    except BaseException:
        stream.close()
        raise


def open_sealed_parquet(
    stream: BinaryIO | pa.NativeFile,
    key_file: bytes,
    keys: Sequence[Key],
    context: Mapping[str, str] | AnyContext | None,
    what: str,
    *,
    on_denied: OnDenied = "error",
    own: bool = False,
) -> EncryptedParquetReader:
    """Open an encrypted Parquet file in a seekable stream with its key file's bytes.

    Args:
        stream: the file's bytes.
        key_file: the key file's bytes.
        keys: the allowed keys.
        context: what the caller expects.
        what: the file's name for messages.
        on_denied: as `open_parquet`.
        own: close the stream with the reader.

    Raises:
        As `open_parquet`.
    """
    parsed = KeyFile.from_bytes(key_file, f"the key file of {what}")
    if parsed.cipher != PARQUET_CIPHER:
        raise FormatError(
            f"the key file of {what} is of the cipher {parsed.cipher}, not of an encrypted Parquet file. "
            "Open a shard with open_shard; a Parquet file in it, with pyarrow on what open_shard returns"
        )
    pairs = match_context(context, parsed.context, what)
    return EncryptedParquetReader(stream, parsed, open_keys(keys), pairs, what, on_denied=on_denied, own=own)


def missing_parquet_key_file(what: str, head: bytes) -> Exception:
    """Return the error for a file without key file; `head` is its first bytes."""
    if head.startswith(MAGIC):
        name = key_file_name(what.rpartition("/")[2])
        return KeyFileMissingError(
            f"there is no key file {name} beside {what}, an encrypted Parquet file; without it nobody can open "
            "that. Restore it from a copy"
        )
    return missing_key_file(what, head)


def _sibling_key_file(path: Path, stream: pa.NativeFile) -> bytes:
    try:
        with path.with_name(key_file_name(path.name)).open("rb") as found:
            return found.read(MAX_KEY_FILE_BYTES + 1)
    except FileNotFoundError:
        head = stream.read(HEADER_BYTES)
        _refuse_interop(path, stream)
        raise missing_parquet_key_file(str(path), head) from None


def _refuse_interop(path: Path, stream: pa.NativeFile) -> None:
    """Say how a file without key file is opened, if its keys are in its footer."""
    try:
        material = read_footer(Source(stream), str(path)).material
    except EnvelopeError:
        return
    if not in_key_file(material):
        raise KeyFileMissingError(
            f"{path} has no key file: its keys are in its footer, wrapped by a KMS (under {material.master_key!r}), as "
            "interop=True and other software write it. Open it with open_parquet(..., interop=True)"
        )


def _open_interop(
    source: str | os.PathLike[str] | BinaryIO,
    keys: Sequence[KeyProvider],
    context: Mapping[str, str] | AnyContext | None,
    key_file: KeyFileSource | None,
    on_denied: OnDenied,
) -> EncryptedParquetReader:
    if key_file is not None:
        raise ValueError("interop=True opens files without key file: leave out key_file=, or interop=True")
    if isinstance(context, AnyContext):
        msg = "with interop=True the file does not say its context, so ANY_CONTEXT finds none. Name it"
        raise ValueError(msg)  # noqa: TRY004  # it is of the right type elsewhere
    pairs = checked_context(context)
    if not isinstance(source, (str, os.PathLike)):
        what = str(getattr(source, "name", "the Parquet file"))
        return EncryptedParquetReader(source, None, keys, pairs, what, on_denied=on_denied)
    path = _local_path(source, "open_parquet")
    stream = pa.OSFile(str(path))
    try:
        return EncryptedParquetReader(stream, None, keys, pairs, str(path), on_denied=on_denied, own=True)
    except BaseException:
        stream.close()
        raise


class _Keyless(LocalOutput):
    """A file without key file; that of a file which it replaces goes with that file."""

    def commit(self) -> None:
        """Remove the old pair, then commit. Raises as `LocalOutput`."""
        key_file = self._path.with_name(key_file_name(self._path.name))
        if key_file.exists():
            if not self._overwrite:
                msg = "a key file of that name exists, and readers would take it for this file's; remove it"
                raise FileExistsError(errno.EEXIST, msg, str(key_file))
            self._path.unlink(missing_ok=True)
            key_file.unlink()
        super().commit()


def _local_path(path: str | os.PathLike[str], function: str) -> Path:
    if "://" in os.fspath(path):
        msg = (
            f"{function} takes local paths and open streams, not {os.fspath(path)!r}. Open a stream yourself and pass "
            "key_file= as well"
        )
        raise ValueError(msg)
    return Path(path)
