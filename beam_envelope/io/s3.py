"""S3 objects as files: a reader that asks for what it needs, and an output that S3 shows only after `commit`.

Beam's own S3 writer completes an upload when it is garbage collected or its block raises, and Beam makes a new boto3
session for each call; hence this module.
"""

from __future__ import annotations

import contextlib
import errno
import io
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final

from apache_beam.io.filesystem import FileMetadata, FileSystem
from botocore import exceptions as boto_errors

from beam_envelope.formats.keyfile import key_file_name
from beam_envelope.formats.output import Buffer, check_key_file
from beam_envelope.io.s3_client import clear_s3_clients, s3_client

__all__ = ["PART_BYTES", "S3Store", "clear_s3_clients", "replace_object", "s3_client"]

PART_BYTES: Final = 8 << 20
_MAX_PARTS: Final = 10_000  # "Amazon S3 multipart upload limits", Amazon S3 User Guide
_UPLOADS: Final = 2  # parts of one object on their way at a time, while the next one fills
_READ_BYTES: Final = 1 << 20
_READ_TRIES: Final = 4
_BINARY: Final = "application/octet-stream"
_QUOTED: Final = re.compile(r"\[([*?\[])\]")  # how a glob says that it means the character (io.store.quote_glob)
_FIXED: Final = re.compile(rf"(?:[^*?\[]|{_QUOTED.pattern})*")
_BROKEN_STREAM: Final = (
    boto_errors.ReadTimeoutError,
    boto_errors.ResponseStreamingError,
    boto_errors.IncompleteReadError,
    boto_errors.ConnectionClosedError,
)


def replace_object(path: str, old: bytes, new: bytes) -> None:
    """Replace a small object whose content is `old`, by a request that S3 refuses if it changed meanwhile.

    Raises:
        FileExistsError: it is not `old`.
        FileNotFoundError, PermissionError, OSError: from S3.
    """
    bucket, key = _split(path)
    place = {"Bucket": bucket, "Key": key}
    with _as_os_errors(path, "s3:GetObject"):
        answer = s3_client().get_object(**place)
        found = answer["Body"].read(len(old) + 1)
    if found != old:
        raise FileExistsError(errno.EEXIST, "it was replaced since it was read", path)
    with _as_os_errors(path, "s3:PutObject"):
        try:
            s3_client().put_object(**place, Body=new, ContentType="application/json", IfMatch=answer["ETag"])
        except boto_errors.ClientError as error:
            if error.response["Error"].get("Code") != "NotImplemented":
                raise
            # A store without conditional writes: the look just before has to do.
            s3_client().put_object(**place, Body=new, ContentType="application/json")


class S3Store:
    """Objects named `s3://bucket/key`."""

    def match(self, pattern: str) -> Iterator[FileMetadata]:
        """Yield the objects that match a glob, by one listing of its fixed part. Raises OSError."""
        bucket, key = _split(pattern)
        fixed = _FIXED.match(key)[0]  # type: ignore[index]  # it matches at least the empty string
        scope = {"Bucket": bucket, "Prefix": _QUOTED.sub(r"\1", fixed)}
        # Only ** reaches below the folder, but Beam's ? and [...] match a slash as well.
        if not re.search(r"\*\*|[?\[/]", key[len(fixed) :]):
            scope["Delimiter"] = "/"
        # Python warns of a [ inside of a set, which is how a glob quotes it.
        compiled = re.compile(FileSystem.translate_pattern(pattern).replace("[[]", r"\["))
        with _as_os_errors(pattern, "s3:ListBucket"):
            for page in s3_client().get_paginator("list_objects_v2").paginate(**scope):
                for item in page.get("Contents", ()):
                    path = f"s3://{bucket}/{item['Key']}"
                    if compiled.match(path) and not path.endswith("/"):
                        yield FileMetadata(path, item["Size"], item["LastModified"].timestamp())

    def size(self, path: str) -> int | None:
        """Return an object's size, or None where there is none. Raises OSError."""
        file = self.find(path)
        return None if file is None else file.size_in_bytes

    def find(self, path: str) -> FileMetadata | None:
        """Return an object, or None where there is none. Raises OSError."""
        bucket, key = _split(path)
        if not key:
            return None
        try:
            with _as_os_errors(path, "s3:GetObject and s3:ListBucket"):
                head = s3_client().head_object(Bucket=bucket, Key=key)
        except FileNotFoundError:
            return None
        return FileMetadata(path, int(head["ContentLength"]), head["LastModified"].timestamp())

    def is_folder(self, path: str) -> bool:
        """Whether there are objects whose names go on behind the path and a slash. Raises OSError."""
        bucket, key = _split(path)
        with _as_os_errors(path, "s3:ListBucket"):
            prefix = f"{key.rstrip('/')}/" if key else ""
            return bool(s3_client().list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)["KeyCount"])

    def open(self, path: str) -> io.BufferedReader:
        """Open an object for reading. Raises FileNotFoundError, PermissionError, OSError."""
        return io.BufferedReader(_RawS3Reader(path), _READ_BYTES)

    def create(self, path: str, *, overwrite: bool, size_hint: int) -> S3Output:
        """Start an object of about `size_hint` bytes. Raises FileExistsError, OSError."""
        return S3Output(path, overwrite=overwrite, size_hint=size_hint)


class S3Output:
    """An S3 object in the making: parts of equal size, which S3 shows as an object only when `commit` completes them.

    Two parts are on their way while the next one fills: with copies in between, the memory of four or five.

    A killed writer leaves an incomplete multipart upload that no reader sees; a lifecycle rule
    (`AbortIncompleteMultipartUpload`) removes it.
    """

    def __init__(self, path: str, *, overwrite: bool, size_hint: int) -> None:
        """Make no request but the one that looks for an existing object.

        Raises:
            FileExistsError: there is one, and `overwrite` is off.
            OSError: S3 cannot be asked.
        """
        self.name = path
        bucket, key = _split(path)
        folder, slash, name = key.rpartition("/")
        self._place = {"Bucket": bucket, "Key": key}
        self._key_file_place = {"Bucket": bucket, "Key": folder + slash + key_file_name(name)}
        self._key_file_path = f"s3://{bucket}/{self._key_file_place['Key']}"
        self._overwrite = overwrite
        self._size_hint = size_hint * 101 // 100
        self._part_bytes = max(PART_BYTES, self._size_hint // (_MAX_PARTS - 1))
        self._buffer = bytearray()
        self._sent = 0
        self._parts: list[Future[dict[str, Any]]] = []
        self._pool = ThreadPoolExecutor(_UPLOADS, thread_name_prefix="s3-upload")  # starts its threads when used
        self._upload_id: str | None = None
        self._key_file: bytes | None = None
        if not overwrite:
            self._refuse_existing()

    def begin(self, key_file: bytes) -> None:
        """Keep the key file for `commit`."""
        self._key_file = key_file

    def write(self, data: Buffer) -> None:
        """Take all of `data`; upload each part as it fills. Raises what an earlier part met."""
        view = memoryview(data)
        while view:
            room = self._part_bytes - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]
            if len(self._buffer) == self._part_bytes:
                self._upload_part()

    def commit(self) -> None:
        """Put the key file, then make the object visible in one request, then see that the key file is still ours.

        Without `overwrite`, each is made only if it is not there. So of two writers one gets the key file's name, and
        the other leaves both alone. With `overwrite`, the old object goes first: at no time may a shard stand beside
        the key file of another.
        """
        if self._upload_id is not None and self._buffer:
            self._upload_part()
        with _as_os_errors(self.name, "s3:PutObject"):
            parts = [part.result() for part in self._parts]  # all are there, before anything visible changes
        if not self._overwrite:
            self._refuse_existing()
        elif self._key_file is not None and S3Store().size(self.name) is not None:
            with _as_os_errors(self.name, "s3:DeleteObject"):
                s3_client().delete_object(**self._place)
        if self._key_file is not None:
            self._put_key_file(self._key_file)
        with _as_os_errors(self.name, "s3:PutObject"):
            if self._upload_id is None:
                self._make(s3_client().put_object, **self._place, Body=bytes(self._buffer), ContentType=_BINARY)
            else:
                upload = {"UploadId": self._upload_id, "MultipartUpload": {"Parts": parts}}
                self._make(s3_client().complete_multipart_upload, **self._place, **upload)
        self._upload_id = None
        self._pool.shutdown()
        if self._key_file is not None:
            self._check_key_file(self._key_file)

    def abort(self) -> None:
        """Drop the parts."""
        self._pool.shutdown(cancel_futures=True)  # S3 would keep a part that comes after its upload was aborted
        self._buffer = bytearray()
        upload_id, self._upload_id = self._upload_id, None
        if upload_id is not None:
            with contextlib.suppress(boto_errors.BotoCoreError, boto_errors.ClientError):
                s3_client().abort_multipart_upload(**self._place, UploadId=upload_id)

    def _upload_part(self) -> None:
        with _as_os_errors(self.name, "s3:PutObject"):
            if self._upload_id is None:
                answer = s3_client().create_multipart_upload(**self._place, ContentType=_BINARY)
                self._upload_id = answer["UploadId"]
            if len(self._parts) >= _UPLOADS:
                self._parts[-_UPLOADS].result()
        number = len(self._parts) + 1
        self._parts.append(self._pool.submit(self._send, number, bytes(self._buffer)))
        self._sent += len(self._buffer)
        self._buffer.clear()
        if self._sent > self._size_hint:  # it is larger than foretold: keep room for as much again
            self._part_bytes = max(self._part_bytes, self._sent // max(_MAX_PARTS - number, 1))

    def _send(self, number: int, body: bytes) -> dict[str, Any]:
        answer = s3_client().upload_part(**self._place, UploadId=self._upload_id, PartNumber=number, Body=body)
        return {"ETag": answer["ETag"], "PartNumber": number}

    def _put_key_file(self, data: bytes) -> None:
        with _as_os_errors(self._key_file_path, "s3:PutObject"):
            self._make(s3_client().put_object, **self._key_file_place, Body=data, ContentType="application/json")

    def _check_key_file(self, data: bytes) -> None:
        with _as_os_errors(self._key_file_path, "s3:GetObject"):
            found = s3_client().get_object(**self._key_file_place)["Body"].read()
        check_key_file(found, data, self.name)

    def _make(self, request: Callable[..., Any], **arguments: Any) -> None:
        """Make an object; without `overwrite`, S3 refuses if another writer made it since we looked."""
        if not self._overwrite:
            try:
                request(**arguments, IfNoneMatch="*")
            except boto_errors.ClientError as error:
                if error.response["Error"].get("Code") != "NotImplemented":
                    raise
            else:
                return
        request(**arguments)  # also where a store has no conditional writes: the look just before has to do

    def _refuse_existing(self) -> None:
        if S3Store().size(self.name) is not None:
            raise FileExistsError(errno.EEXIST, "the output exists; choose to skip or overwrite it", self.name)


class _RawS3Reader(io.RawIOBase):
    """Reads one version of an object: one GET as long as the reader goes forward, another after a seek."""

    mode = "rb"

    def __init__(self, path: str) -> None:
        self.name = path
        self._bucket, self._key = _split(path)
        self._etag: str | None = None
        self._body: Any = None
        self._body_position = self._position = 0
        with _as_os_errors(path, "s3:GetObject"):
            self._size = int(self._ask()["ContentLength"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Note the position; the next read asks for what is there."""
        position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence] + offset
        if position < 0:
            raise ValueError(f"cannot seek to {position}, before the start")
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
                    if self._body is None or self._body_position != self._position:
                        self._ask()
                    count = int(self._body.readinto(buffer))
                    break
                except _BROKEN_STREAM:
                    self._drop()
                    if not remaining:
                        raise
        self._position += count
        self._body_position = self._position
        return count

    def close(self) -> None:
        self._drop()
        super().close()

    def _ask(self) -> dict[str, Any]:
        """Ask S3 for the object from the position on, in the version that was opened."""
        self._drop()
        arguments = {} if self._etag is None else {"IfMatch": self._etag}
        if self._position:  # at 0, the range of an empty object would be refused
            arguments["Range"] = f"bytes={self._position}-"
        answer: dict[str, Any] = s3_client().get_object(Bucket=self._bucket, Key=self._key, **arguments)
        self._etag, self._body, self._body_position = answer["ETag"], answer["Body"], self._position
        return answer

    def _drop(self) -> None:
        body, self._body = getattr(self, "_body", None), None
        if body is not None:
            body.close()


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.removeprefix("s3://").partition("/")
    if not bucket:
        raise ValueError(f"{path!r} names no bucket; an object is s3://BUCKET/NAME")
    return bucket, key


@contextmanager
def _as_os_errors(path: str, permission: str) -> Iterator[None]:
    """Turn boto3's errors into the OSError that a local file would give, saying what to do."""
    try:
        yield
    except boto_errors.ClientError as error:
        raise _refused(error, path, permission) from None
    except boto_errors.BotoCoreError as error:
        raise OSError(errno.EIO, f"S3 could not be used: {error}", path) from None


def _refused(error: boto_errors.ClientError, path: str, permission: str) -> OSError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    said = f"S3 says {code}: {error.response.get('Error', {}).get('Message', '')}"
    number, text = errno.EIO, said
    if code == "NoSuchBucket":
        number, text = errno.ENOENT, "there is no such bucket; check its name and the endpoint"
    elif code == "NoSuchUpload":
        number, text = errno.ESTALE, "somebody, or a lifecycle rule, removed its unfinished upload. Write it again"
    elif code == "AccessDenied":
        number, text = errno.EACCES, f"access denied; the caller needs {permission} on it. {said}"
    elif code == "403":  # the answer to a HEAD, which has no text
        number, text = errno.EACCES, f"access denied; the caller needs {permission} on it, and valid credentials"
    elif status == 403 or code == "InvalidAccessKeyId":  # noqa: PLR2004  # HTTP; SignatureDoesNotMatch and its like
        number, text = errno.EACCES, f"S3 does not take these credentials; check them. {said}"
    elif status == 404:  # noqa: PLR2004  # HTTP
        number, text = errno.ENOENT, "there is no such object"
    elif status == 412 and error.operation_name == "GetObject":  # noqa: PLR2004  # HTTP
        number, text = errno.ESTALE, "it was replaced while it was read. Read it again when nobody writes it"
    elif status == 412 or code == "ConditionalRequestConflict":  # noqa: PLR2004  # HTTP
        number, text = errno.EEXIST, "another writer made it meanwhile, or a killed one left it; choose to overwrite it"
    return OSError(number, text, path)  # which Python makes a FileNotFoundError, PermissionError or FileExistsError
