"""S3 objects as files: a reader that asks for what it needs, and an output that S3 shows only after `commit`.

Beam's own S3 writer completes an upload when it is garbage collected or its block raises, and Beam makes a new boto3
session for each call; hence this module. Its client is made by Beam's own code, so `--s3_endpoint_url` and Beam's other
S3 options hold here too.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from apache_beam.io.aws.clients.s3.boto3_client import Client
from apache_beam.io.aws.s3io import parse_s3_path
from apache_beam.io.filesystem import FileMetadata, FileSystem
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions, S3Options
from botocore import exceptions as boto_errors

from beam_envelope.formats.keyfile import key_file_name
from beam_envelope.formats.output import Buffer, check_key_file

PART_BYTES: Final = 8 << 20
_MAX_PARTS: Final = 10_000  # "Amazon S3 multipart upload limits", Amazon S3 User Guide
_READ_BYTES: Final = 1 << 20
_READ_TRIES: Final = 4
_BROKEN_STREAM: Final = (
    boto_errors.ReadTimeoutError,
    boto_errors.ResponseStreamingError,
    boto_errors.IncompleteReadError,
    boto_errors.ConnectionClosedError,
)

_lock = threading.Lock()
_clients: dict[tuple[object, ...], Any] = {}


def s3_client() -> Any:  # noqa: ANN401  # boto3 clients have no static type
    """Return this process's S3 client for the pipeline's S3 options. It may be shared between threads."""
    options = FileSystems._pipeline_options or PipelineOptions.from_dictionary({})  # noqa: SLF001  # where Beam's own filesystems find them
    if isinstance(options, PipelineOptions):
        options = options.view_as(S3Options).get_all_options()
    key = tuple((name, options[name]) for name in sorted(options) if name.startswith("s3_"))
    with _lock:
        if key not in _clients:
            _clients[key] = Client(options).client
        return _clients[key]


def clear_s3_clients() -> None:
    """Forget all clients, so that changed AWS settings are read anew."""
    global _lock  # noqa: PLW0603  # a lock held by another thread at fork stays locked in the child
    _lock = threading.Lock()
    _clients.clear()


os.register_at_fork(after_in_child=clear_s3_clients)


class S3Store:
    """Objects named `s3://bucket/key`."""

    def match(self, pattern: str) -> Iterator[FileMetadata]:
        """Yield the objects that match a glob, by one listing of its fixed part. Raises OSError."""
        bucket, key = parse_s3_path(pattern, object_optional=True)
        prefix = key[: _first_glob(key)]
        compiled = re.compile(FileSystem.translate_pattern(pattern))
        with _as_os_errors(pattern, "s3:ListBucket"):
            for page in s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                for item in page.get("Contents", ()):
                    path = f"s3://{bucket}/{item['Key']}"
                    if compiled.match(path) and not path.endswith("/"):
                        yield FileMetadata(path, item["Size"], item["LastModified"].timestamp())

    def size(self, path: str) -> int | None:
        """Return an object's size, or None where there is none. Raises OSError."""
        bucket, key = parse_s3_path(path)
        try:
            with _as_os_errors(path, "s3:GetObject and s3:ListBucket"):
                return int(s3_client().head_object(Bucket=bucket, Key=key)["ContentLength"])
        except FileNotFoundError:
            return None

    def is_folder(self, path: str) -> bool:
        """Return False: S3 has no folders."""
        del path
        return False

    def open(self, path: str) -> io.BufferedReader:
        """Open an object for reading. Raises FileNotFoundError, PermissionError, OSError."""
        return io.BufferedReader(_RawS3Reader(path), _READ_BYTES)

    def create(self, path: str, *, overwrite: bool, size_hint: int) -> S3Output:
        """Start an object of about `size_hint` bytes. Raises FileExistsError, OSError."""
        return S3Output(path, overwrite=overwrite, size_hint=size_hint)


class S3Output:
    """An S3 object in the making: parts of equal size, which S3 shows as an object only when `commit` completes them.

    A killed writer leaves an incomplete multipart upload that no reader sees; a lifecycle rule
    (`AbortIncompleteMultipartUpload`) removes it.
    """

    def __init__(self, path: str, *, overwrite: bool, size_hint: int) -> None:
        """Make no request but the one that looks for an existing object."""
        self.name = path
        self._bucket, self._key = parse_s3_path(path)
        self._overwrite = overwrite
        self._part_bytes = max(PART_BYTES, size_hint * 101 // 100 // (_MAX_PARTS - 1))
        self._buffer = bytearray()
        self._parts: list[dict[str, Any]] = []
        self._upload_id: str | None = None
        self._key_file: bytes | None = None
        self._refuse_existing()

    def begin(self, key_file: bytes) -> None:
        """Keep the key file for `commit`."""
        self._key_file = key_file

    def write(self, data: Buffer) -> None:
        """Take all of `data`; upload each part as it fills."""
        view = memoryview(data)
        while view:
            room = self._part_bytes - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]
            if len(self._buffer) == self._part_bytes:
                self._upload_part()

    def commit(self) -> None:
        """Put the key file, then make the object visible in one request."""
        if self._upload_id is not None and self._buffer:
            self._upload_part()
        self._refuse_existing()
        client = s3_client()
        place = {"Bucket": self._bucket, "Key": self._key}
        folder, _, name = self._key.rpartition("/")
        key_place = {"Bucket": self._bucket, "Key": f"{folder}/{key_file_name(name)}" if folder else key_file_name(name)}
        # S3 refuses the request if another writer made the object since we looked.
        condition = {} if self._overwrite else {"IfNoneMatch": "*"}
        with _as_os_errors(self.name, "s3:PutObject, s3:GetObject (and s3:DeleteObject to overwrite)"):
            if self._overwrite and self._key_file is not None:
                client.delete_object(**place)  # at no time may a shard stand beside the key file of another
            if self._key_file is not None:
                client.put_object(**key_place, Body=self._key_file, ContentType="application/json")
            if self._upload_id is None:
                client.put_object(**place, **condition, Body=bytes(self._buffer), ContentType=_BINARY)
            else:
                client.complete_multipart_upload(
                    **place, **condition, UploadId=self._upload_id, MultipartUpload={"Parts": self._parts}
                )
                self._upload_id = None
            if self._key_file is not None:
                check_key_file(client.get_object(**key_place)["Body"].read(), self._key_file, self.name)

    def abort(self) -> None:
        """Drop the parts."""
        upload_id, self._upload_id = self._upload_id, None
        self._buffer = bytearray()
        if upload_id is not None:
            with contextlib.suppress(boto_errors.BotoCoreError, boto_errors.ClientError):
                s3_client().abort_multipart_upload(Bucket=self._bucket, Key=self._key, UploadId=upload_id)

    def _upload_part(self) -> None:
        client = s3_client()
        place = {"Bucket": self._bucket, "Key": self._key}
        with _as_os_errors(self.name, "s3:PutObject"):
            if self._upload_id is None:
                self._upload_id = client.create_multipart_upload(**place, ContentType=_BINARY)["UploadId"]
            number = len(self._parts) + 1
            answer = client.upload_part(
                **place, UploadId=self._upload_id, PartNumber=number, Body=bytes(self._buffer)
            )
        self._parts.append({"ETag": answer["ETag"], "PartNumber": number})
        self._buffer.clear()

    def _refuse_existing(self) -> None:
        if not self._overwrite and S3Store().size(self.name) is not None:
            raise FileExistsError(errno.EEXIST, "the output exists; choose to skip or overwrite it", self.name)


_BINARY: Final = "application/octet-stream"


class _RawS3Reader(io.RawIOBase):
    """Reads one version of an object: one GET as long as the reader goes forward, another after a seek."""

    mode = "rb"

    def __init__(self, path: str) -> None:
        self.name = path
        self._bucket, self._key = parse_s3_path(path)
        self._position = 0
        self._body: Any = None
        with _as_os_errors(path, "s3:GetObject"):
            head = s3_client().head_object(Bucket=self._bucket, Key=self._key)
        self._size, self._etag = int(head["ContentLength"]), head["ETag"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence] + offset
        if position != self._position:
            self._drop()
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Buffer) -> int:  # type: ignore[override]  # typeshed's Buffer is not importable on 3.10
        if self._position >= self._size:
            return 0
        with _as_os_errors(self.name, "s3:GetObject"):
            for remaining in reversed(range(_READ_TRIES)):
                try:
                    if self._body is None:
                        self._body = s3_client().get_object(
                            Bucket=self._bucket, Key=self._key, Range=f"bytes={self._position}-", IfMatch=self._etag
                        )["Body"]
                    data = self._body.read(len(buffer))
                    break
                except _BROKEN_STREAM:
                    self._drop()
                    if not remaining:
                        raise
        buffer[: len(data)] = data  # type: ignore[index]  # a writable buffer
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _drop(self) -> None:
        body, self._body = getattr(self, "_body", None), None
        if body is not None:
            body.close()


def _first_glob(text: str) -> int:
    return min((index for index, letter in enumerate(text) if letter in "*?["), default=len(text))


@contextmanager
def _as_os_errors(path: str, permission: str) -> Iterator[None]:
    """Turn boto3's errors into the OSError that a local file would give, saying what to do."""
    try:
        yield
    except boto_errors.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code == "NoSuchBucket":
            raise FileNotFoundError(errno.ENOENT, "there is no such bucket", path) from None
        if status == 404:  # noqa: PLR2004  # HTTP
            raise FileNotFoundError(errno.ENOENT, "there is no such object", path) from None
        if status == 403:  # noqa: PLR2004  # HTTP
            msg = f"S3 denies access ({code}); the caller needs {permission} on it"
            raise PermissionError(errno.EACCES, msg, path) from None
        if status == 412:  # noqa: PLR2004  # HTTP
            msg = "another writer made or changed the object meanwhile"
            raise FileExistsError(errno.EEXIST, msg, path) from None
        raise OSError(errno.EIO, f"S3 says {code or status}: {error.response.get('Error', {}).get('Message', '')}", path) from None
    except boto_errors.BotoCoreError as error:
        raise OSError(errno.EIO, f"S3 could not be used: {error}", path) from None
