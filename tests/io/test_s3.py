"""S3Store, S3Output and the reader, over HTTP, against moto's S3. Requests are counted where boto3 sends them."""

import errno
import io
import itertools
import os
import random
import re
import signal
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import boto3
import pytest
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions, S3Options
from botocore import exceptions as boto_errors
from botocore.response import StreamingBody

from beam_envelope.errors import EnvelopeError
from beam_envelope.formats.keyfile import MAX_KEY_FILE_BYTES
from beam_envelope.formats.shard import open_sealed
from beam_envelope.formats.shard_writer import ShardWriter
from beam_envelope.io import s3
from beam_envelope.io import s3_client as client_module
from beam_envelope.io.s3 import S3Store, clear_s3_clients, s3_client
from beam_envelope.io.store import quote_glob, read_small
from tests.wire import s3_answer, s3_error

PART = 5 << 20  # S3's minimum
KEY_FILE = b'{"key": "file"}\n'


@pytest.fixture(scope="module")
def plain_client(moto_endpoint):
    """A client for what these tests do and look at themselves: nothing hooks into it."""
    clear_s3_clients()
    return boto3.client(
        "s3",
        endpoint_url=moto_endpoint,
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )


@pytest.fixture
def boto(plain_client, moto_server, monkeypatch):
    """The plain client, with an empty bucket; our own client is the same for all tests, and loses its hooks.

    What a test leaves open is aborted: else its parts would go on, and be tried again, beside the next tests.
    """
    monkeypatch.setattr(FileSystems, "_pipeline_options", None)
    plain_client.create_bucket(Bucket="bucket")
    yield plain_client
    while _hooks:
        event, handler = _hooks.pop()
        s3_client().meta.events.unregister(event, handler)
    while _started:
        _started.pop().abort()


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(s3, "PART_BYTES", PART)


@pytest.fixture
def fresh_clients(boto):
    """Start and end without a client of ours."""
    clear_s3_clients()
    yield
    _hooks.clear()
    clear_s3_clients()


_hooks = []
_started = []


def hook(event, handler):
    """Have our client call a handler."""
    s3_client().meta.events.register(event, handler)
    _hooks.append((event, handler))


@pytest.fixture
def away(fresh_clients, small_parts, monkeypatch):
    """An S3 that cannot be reached once it `begins()`; what was `sent`, and the `waits` between, in seconds."""
    waits, sent = [], []
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=waits.append))

    def refuse_connection(request, **_):
        sent.append(request)
        raise boto_errors.EndpointConnectionError(endpoint_url="http://s3")

    return SimpleNamespace(sent=sent, waits=waits, begins=lambda: hook("before-send.s3.UploadPart", refuse_connection))


@pytest.fixture
def requests(boto):
    """The operations that our client sends, as it sends them; `requests.clear()` starts anew."""
    sent = []
    hook("before-send.s3", lambda event_name, **_: sent.append(event_name.split(".")[-1]))
    return sent


def before(operation, action, number=0):
    """Do something just before a request of an operation leaves: the first, or the one of that number."""
    count = itertools.count()  # parts are sent by several threads; `next` is one step

    def handle(**_):
        if next(count) == number:
            action()

    hook(f"before-send.s3.{operation}" if operation else "before-send.s3", handle)


def refuse(operation, status, code, times=1):
    """Answer the next requests of an operation with an error, in place of the server."""
    count = itertools.count()

    def respond(request, **_):
        return s3_error(request, status, code) if next(count) < times else None

    hook(f"before-send.s3.{operation}", respond)


def data_of(size, seed=0):
    return random.Random(seed).randbytes(size)


def stored(boto, key="dir/shard"):
    return boto.get_object(Bucket="bucket", Key=key)["Body"].read()


def keys(boto):
    return [item["Key"] for item in boto.list_objects_v2(Bucket="bucket").get("Contents", ())]


def uploads(boto):
    return [upload["Key"] for upload in boto.list_multipart_uploads(Bucket="bucket").get("Uploads", ())]


def started(data=b"", *, overwrite=False, key_file=KEY_FILE, path="s3://bucket/dir/shard", size_hint=0):
    output = S3Store().create(path, overwrite=overwrite, size_hint=size_hint)
    _started.append(output)
    if key_file is not None:
        output.begin(key_file)
    output.write(data)
    return output


def put(data=b"", **settings):
    started(data, **settings).commit()


def error_of(kind, call, *arguments, **settings):
    with pytest.raises(kind) as caught:
        call(*arguments, **settings)
    assert type(caught.value) is kind
    return caught.value


class TestOutput:
    @pytest.mark.parametrize("size", [0, 1, 100_000, PART - 1, PART, PART + 1, 2 * PART, 3 * PART + 17])
    def test_what_is_written_in_any_blocks_is_read(self, boto, small_parts, size):
        data = data_of(size)
        output = started()
        position, step = 0, random.Random(size)
        while position < size:
            block = data[position : position + step.choice([1, 1000, 1 << 18, 1 << 20, 7 << 20])]
            output.write(memoryview(block))
            position += len(block)
        output.commit()
        assert stored(boto) == data
        assert S3Store().size("s3://bucket/dir/shard") == size
        with S3Store().open("s3://bucket/dir/shard") as stream:
            assert stream.read() == data
        assert stored(boto, "dir/_KEY_FOR_shard.json") == KEY_FILE
        assert sorted(keys(boto)) == ["dir/_KEY_FOR_shard.json", "dir/shard"]
        assert uploads(boto) == []

    def test_a_buffer_may_be_used_again_at_once(self, boto, small_parts):
        output, buffer = started(), bytearray(1 << 20)
        for number in range(12):
            buffer[:] = bytes([number]) * len(buffer)
            output.write(buffer)
        output.commit()
        assert stored(boto) == b"".join(bytes([number]) * (1 << 20) for number in range(12))

    def test_an_object_at_the_root_of_a_bucket_has_its_key_file_there(self, boto):
        put(b"data", path="s3://bucket/shard")
        assert sorted(keys(boto)) == ["_KEY_FOR_shard.json", "shard"]

    def test_a_plain_file_has_no_key_file(self, boto):
        put(b"data", key_file=None)
        assert keys(boto) == ["dir/shard"]

    def test_an_object_says_what_it_is(self, boto, small_parts):
        put(b"data")
        put(data_of(PART + 1), path="s3://bucket/large")
        types = {key: boto.head_object(Bucket="bucket", Key=key)["ContentType"] for key in keys(boto)}
        assert types == {
            "_KEY_FOR_large.json": "application/json",
            "dir/_KEY_FOR_shard.json": "application/json",
            "dir/shard": "application/octet-stream",
            "large": "application/octet-stream",
        }

    @pytest.mark.parametrize("size_hint", [0, 3 * PART + 17])
    def test_parts_are_of_equal_size_but_the_last(self, boto, small_parts, size_hint):
        put(data_of(3 * PART + 17), size_hint=size_hint)
        sizes = [
            boto.head_object(Bucket="bucket", Key="dir/shard", PartNumber=number)["ContentLength"]
            for number in (1, 2, 3, 4)
        ]
        assert sizes == [PART, PART, PART, 17]

    def test_parts_grow_with_the_foretold_size(self, boto, small_parts, monkeypatch, requests):
        monkeypatch.setattr(s3, "_MAX_PARTS", 4)
        data = data_of(22 << 20)
        put(data, size_hint=len(data))
        assert requests.count("UploadPart") == 3
        assert stored(boto) == data

    def test_parts_of_an_object_that_is_larger_than_foretold_grow_on_the_way(
        self, boto, small_parts, monkeypatch, requests
    ):
        monkeypatch.setattr(s3, "_MAX_PARTS", 4)
        data = data_of(6 * PART)
        put(data, size_hint=PART)
        assert requests.count("UploadPart") == 4  # 1 + 1 + 1 + 3 times PART
        assert stored(boto) == data

    def test_nothing_is_visible_before_the_commit(self, boto, small_parts):
        output = started()
        assert (keys(boto), uploads(boto)) == ([], [])
        for _ in range(3):
            output.write(data_of(PART))
            assert keys(boto) == []
            assert uploads(boto) == ["dir/shard"]
            assert S3Store().size("s3://bucket/dir/shard") is None
            assert list(S3Store().match("s3://bucket/**")) == []
        output.commit()
        assert sorted(keys(boto)) == ["dir/_KEY_FOR_shard.json", "dir/shard"]
        assert uploads(boto) == []

    @pytest.fixture
    def held(self, boto, small_parts):
        """An output whose parts leave only when `may_send` is set; `seen` are those that would like to."""
        output = started()
        send, output.may_send, output.seen, came = output._send, threading.Event(), [], threading.Semaphore(0)

        def hold(number, body):
            output.seen.append(number)
            came.release()
            output.may_send.wait(60)
            return send(number, body)

        output._send, output.wait_for_one = hold, lambda: came.acquire(timeout=60)
        return output

    def test_a_third_full_part_waits_for_two_on_their_way(self, boto, held):
        writer = threading.Thread(target=held.write, args=(data_of(5 * PART),))
        writer.start()
        assert held.wait_for_one()
        assert held.wait_for_one()
        writer.join(0.2)
        assert writer.is_alive()
        assert sorted(held.seen) == [1, 2]
        held.may_send.set()
        writer.join()
        held.commit()
        assert stored(boto) == data_of(5 * PART)

    def test_abort_waits_for_the_parts_on_their_way(self, boto, held, requests):
        held.write(data_of(2 * PART))
        assert held.wait_for_one()
        stop = threading.Thread(target=held.abort)
        stop.start()
        stop.join(0.2)
        assert stop.is_alive()
        held.may_send.set()
        stop.join()
        assert requests[-1] == "AbortMultipartUpload"  # S3 keeps a part that comes later
        assert "UploadPart" in requests
        assert uploads(boto) == []

    def test_a_large_object_takes_the_memory_of_a_few_parts(self, boto, small_parts):
        output, block = started(overwrite=True), data_of(1 << 20)
        hook("before-send.s3.UploadPart", lambda request, **_: s3_answer(request, 200, ETag="x"))
        tracemalloc.start()
        for _ in range(100):
            output.write(block)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(output._parts) == 20
        assert peak < 7 * PART  # one that fills, two on their way, and copies in between

    @pytest.mark.parametrize("size", [0, 100, PART, 3 * PART + 1])
    def test_abort_leaves_nothing(self, boto, small_parts, size):
        output = started(data_of(size))
        output.abort()
        output.abort()
        assert (keys(boto), uploads(boto)) == ([], [])

    def test_abort_says_nothing_when_s3_does_not_answer(self, boto, small_parts):
        output = started(data_of(PART))
        refuse("AbortMultipartUpload", 403, "AccessDenied")
        output.abort()

    def test_abort_after_a_commit_changes_nothing(self, boto, small_parts):
        output = started(data_of(PART + 1))
        output.commit()
        output.abort()
        assert stored(boto) == data_of(PART + 1)

    @pytest.mark.parametrize("failing", [1, 2, 4])
    def test_a_part_that_fails_is_an_error_of_the_writer(self, boto, small_parts, failing):
        output = started()
        with pytest.raises(PermissionError) as caught:  # noqa: PT012  # at which of them is the writer's affair
            for number in (1, 2, 3, 4):
                if number == failing:
                    refuse("UploadPart", 403, "AccessDenied")
                output.write(data_of(PART))
            output.commit()
        assert caught.value.filename == "s3://bucket/dir/shard"
        assert "the caller needs s3:PutObject on it" in caught.value.strerror
        output.abort()
        assert (keys(boto), uploads(boto)) == ([], [])

    @pytest.mark.parametrize("operation", ["UploadPart", "CompleteMultipartUpload"])
    def test_an_upload_that_somebody_removed_is_an_error(self, boto, small_parts, operation):
        output = started()
        refuse(operation, 404, "NoSuchUpload")
        output.write(data_of(PART))
        error = error_of(OSError, output.commit)
        assert error.strerror == "somebody, or a lifecycle rule, removed its unfinished upload. Write it again"
        output.abort()

    def test_a_small_object_takes_four_requests_and_no_permission_to_delete(self, boto, requests):
        put(b"data", overwrite=True)
        assert requests == ["HeadObject", "PutObject", "PutObject", "GetObject"]

    def test_a_plain_object_that_may_be_overwritten_takes_one(self, boto, requests):
        put(b"data", overwrite=True, key_file=None)
        put(b"more", overwrite=True, key_file=None)
        assert requests == ["PutObject"] * 2
        assert stored(boto) == b"more"


class TestShardWriter:
    """The writer above an output: only a successful close commits."""

    @pytest.fixture
    def writer(self, boto, small_parts, local_key):
        def start():
            with local_key.generate_data_key({}) as data_key:
                return ShardWriter(
                    S3Store().create("s3://bucket/dir/shard", overwrite=True, size_hint=0),
                    data_key,
                    {},
                    compression="none",
                    name="shard",
                )

        return start

    @pytest.mark.parametrize("size", [10, 2 * PART])
    def test_a_closed_shard_is_there(self, boto, writer, local_key, size):
        with writer() as shard:
            shard.write(data_of(size))
        with S3Store().open("s3://bucket/dir/shard") as stream:
            opened = open_sealed(stream, stored(boto, "dir/_KEY_FOR_shard.json"), [local_key], None, "shard")
            assert opened.read() == data_of(size)

    @pytest.mark.parametrize("size", [10, 2 * PART])
    def test_an_exception_leaves_nothing(self, boto, writer, size):
        with pytest.raises(RuntimeError, match="of the caller"), writer() as shard:  # noqa: PT012
            shard.write(data_of(size))
            raise RuntimeError("of the caller")
        assert (keys(boto), uploads(boto)) == ([], [])

    @pytest.mark.parametrize("size", [10, 2 * PART])
    @pytest.mark.parametrize("wrapper", [lambda shard: shard, io.TextIOWrapper, io.BufferedWriter])
    def test_garbage_collection_leaves_nothing(self, boto, writer, size, wrapper):
        shard = writer()
        shard.write(data_of(size))
        shard = wrapper(shard)
        del shard
        assert (keys(boto), uploads(boto)) == ([], [])

    @pytest.mark.parametrize("operation", ["PutObject", "CompleteMultipartUpload"])
    def test_a_commit_that_fails_leaves_no_shard(self, boto, writer, operation):
        shard = writer()
        shard.write(data_of(10 if operation == "PutObject" else 2 * PART))
        refuse(operation, 403, "AccessDenied")
        error_of(PermissionError, shard.close)
        assert "dir/shard" not in keys(boto)
        assert uploads(boto) == []


def test_a_killed_writer_leaves_an_upload_that_nobody_sees(boto, small_parts):
    ready, say_ready = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.alarm(60)
            output = started(data_of(3 * PART), overwrite=True)
            os.write(say_ready, b"x")
            signal.pause()
            output.commit()
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert keys(boto) == []
    assert uploads(boto) == ["dir/shard"]
    assert S3Store().size("s3://bucket/dir/shard") is None
    put(b"again", overwrite=True)
    assert stored(boto) == b"again"


class TestTwoWriters:
    """Without `overwrite` the first wins; with it, a shard never stays beside the key file of another unnoticed."""

    def test_what_exists_is_refused_at_the_start(self, boto, requests):
        put(b"first")
        requests.clear()
        error = error_of(FileExistsError, S3Store().create, "s3://bucket/dir/shard", overwrite=False, size_hint=0)
        assert (error.errno, error.filename) == (errno.EEXIST, "s3://bucket/dir/shard")
        assert error.strerror == "the output exists; choose to skip or overwrite it"
        assert requests == ["HeadObject"]

    @pytest.mark.parametrize("size", [10, 2 * PART])
    def test_what_came_meanwhile_is_refused(self, boto, small_parts, size):
        late = started(data_of(size, 1), key_file=b"late")
        put(b"first")
        error_of(FileExistsError, late.commit)
        late.abort()
        assert (stored(boto), stored(boto, "dir/_KEY_FOR_shard.json")) == (b"first", KEY_FILE)
        assert uploads(boto) == []

    @pytest.mark.parametrize("size", [10, 2 * PART])
    def test_a_plain_file_that_came_meanwhile_is_not_given_our_key_file(self, boto, small_parts, size):
        late = started(data_of(size))
        boto.put_object(Bucket="bucket", Key="dir/shard", Body=b"plain")
        error_of(FileExistsError, late.commit)
        late.abort()
        assert keys(boto) == ["dir/shard"]
        assert stored(boto) == b"plain"

    @pytest.mark.parametrize("size", [10, 2 * PART])
    def test_what_came_after_the_last_look_is_refused_by_s3(self, boto, small_parts, size):
        late = started(data_of(size, 1), key_file=b"late")
        before("PutObject", lambda: other_process_puts(boto, b"first"))
        error = error_of(FileExistsError, late.commit)
        assert error.strerror == ("another writer made it meanwhile, or a killed one left it; choose to overwrite it")
        late.abort()
        assert (stored(boto), stored(boto, "dir/_KEY_FOR_shard.json")) == (b"first", KEY_FILE)
        assert uploads(boto) == []

    @pytest.mark.parametrize(("size", "operation"), [(10, "PutObject"), (2 * PART, "CompleteMultipartUpload")])
    def test_so_is_a_plain_file(self, boto, small_parts, size, operation):
        late = started(data_of(size), key_file=None)
        before(operation, lambda: boto.put_object(Bucket="bucket", Key="dir/shard", Body=b"first"))
        error_of(FileExistsError, late.commit)
        late.abort()
        assert stored(boto) == b"first"

    def test_s3_may_also_answer_that_two_writes_conflict(self, boto):
        output = started(b"data", key_file=None)
        refuse("PutObject", 409, "ConditionalRequestConflict")
        error_of(FileExistsError, output.commit)

    def test_a_key_file_that_a_killed_writer_left_is_not_replaced(self, boto):
        boto.put_object(Bucket="bucket", Key="dir/_KEY_FOR_shard.json", Body=b"left")
        error = error_of(FileExistsError, put, b"data")
        assert error.filename == "s3://bucket/dir/_KEY_FOR_shard.json"
        assert keys(boto) == ["dir/_KEY_FOR_shard.json"]
        put(b"data", overwrite=True)
        assert (stored(boto), stored(boto, "dir/_KEY_FOR_shard.json")) == (b"data", KEY_FILE)

    @pytest.mark.parametrize("size", [10, PART + 1])
    def test_a_store_without_conditional_writes_goes_without(self, boto, small_parts, requests, size):
        output = started(data_of(size))
        requests.clear()
        refuse("PutObject", 501, "NotImplemented", times=1)
        refuse("CompleteMultipartUpload", 501, "NotImplemented", times=1)
        output.commit()
        assert stored(boto) == data_of(size)
        assert requests[-3:] == (
            ["PutObject", "PutObject", "GetObject"]
            if size == 10
            else ["CompleteMultipartUpload", "CompleteMultipartUpload", "GetObject"]
        )

    @pytest.mark.parametrize("size", [10, 2 * PART])
    def test_overwriting_removes_the_old_object_before_its_key_file_is_replaced(
        self, boto, small_parts, requests, size
    ):
        put(b"old", key_file=b"old key file")
        requests.clear()
        states = []

        def look(event_name, **_):
            there = keys(boto)
            key_file = stored(boto, "dir/_KEY_FOR_shard.json")
            states.append((event_name.split(".")[-1], "dir/shard" in there, key_file))

        hook("before-send.s3", look)
        put(data_of(size), overwrite=True)
        last = "PutObject" if size == 10 else "CompleteMultipartUpload"
        assert states[-5:] == [
            ("HeadObject", True, b"old key file"),
            ("DeleteObject", True, b"old key file"),
            ("PutObject", False, b"old key file"),
            (last, False, KEY_FILE),
            ("GetObject", True, KEY_FILE),
        ]
        assert stored(boto) == data_of(size)

    def test_who_overwrites_needs_permission_to_delete(self, boto):
        put(b"old")
        output = started(b"new", overwrite=True, key_file=b"new")
        refuse("DeleteObject", 403, "AccessDenied")
        error = error_of(PermissionError, output.commit)
        assert "s3:DeleteObject" in error.strerror
        assert (stored(boto), stored(boto, "dir/_KEY_FOR_shard.json")) == (b"old", KEY_FILE)

    def test_a_key_file_that_another_writer_replaced_is_an_error(self, boto):
        output = started(b"ours", overwrite=True)
        before("GetObject", lambda: boto.put_object(Bucket="bucket", Key="dir/_KEY_FOR_shard.json", Body=b"theirs"))
        error = error_of(EnvelopeError, output.commit)
        assert "another writer replaced the key file of s3://bucket/dir/shard while it was written" in str(error)

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("stop", range(6))
    def test_wherever_another_writer_comes_between_none_loses_unnoticed(self, boto, stop, overwrite):
        ours = started(b"ours", overwrite=overwrite, key_file=b"key file of ours")
        before("", lambda: other_process_puts(boto, b"theirs"), number=stop)
        try:
            ours.commit()
        except (FileExistsError, EnvelopeError):
            pair = (b"theirs", KEY_FILE)
        else:
            pair = (b"ours", b"key file of ours")
        if overwrite and pair[0] == b"theirs":
            return  # who overwrites is told
        assert (stored(boto), stored(boto, "dir/_KEY_FOR_shard.json")) == pair


def other_process_puts(boto, data):
    """Do what another process without `overwrite` does, by the plain client."""
    for key, body in (("dir/_KEY_FOR_shard.json", KEY_FILE), ("dir/shard", data)):
        try:
            boto.put_object(Bucket="bucket", Key=key, Body=body, IfNoneMatch="*")
        except boto_errors.ClientError:
            return


class TestReader:
    DATA = data_of(5 << 20, seed=7)

    @pytest.fixture
    def raw(self, boto, requests):
        boto.put_object(Bucket="bucket", Key="file", Body=self.DATA)
        with s3._RawS3Reader("s3://bucket/file") as reader:
            yield reader

    def read(self, raw, size):
        """Read so many bytes, however many reads it takes."""
        buffer, done = memoryview(bytearray(size)), 0
        while done < size and (count := raw.readinto(buffer[done:])):
            done += count
        return bytes(buffer[:done])

    @pytest.mark.parametrize("block", [1000, 1 << 20, 3 << 20, 16 << 20])
    def test_reading_to_the_end_is_one_request(self, boto, requests, block):
        boto.put_object(Bucket="bucket", Key="file", Body=self.DATA)
        with S3Store().open("s3://bucket/file") as stream:
            assert b"".join(iter(lambda: stream.read(block), b"")) == self.DATA
            assert stream.read(1) == b""
        assert requests == ["GetObject"]

    def test_an_empty_object_is_one_too(self, boto, requests):
        boto.put_object(Bucket="bucket", Key="file", Body=b"")
        with S3Store().open("s3://bucket/file") as stream:
            assert (stream.seek(0, io.SEEK_END), stream.seek(0), stream.read()) == (0, 0, b"")
        assert requests == ["GetObject"]

    def test_asking_for_the_size_costs_nothing(self, raw, requests):
        assert raw.seek(0, io.SEEK_END) == len(self.DATA)
        assert raw.seek(0) == 0
        assert self.read(raw, 1000) == self.DATA[:1000]
        assert requests == ["GetObject"]

    def test_each_seek_is_one_more_request_when_it_is_read_from(self, raw, requests):
        steps = random.Random(5)
        for number in range(1, 20):
            position = steps.randrange(len(self.DATA) - 10_000)
            raw.seek(5)
            assert raw.seek(position - 5, io.SEEK_CUR) == raw.tell() == position
            assert self.read(raw, 3000) == self.DATA[position : position + 3000]
            assert self.read(raw, 7000) == self.DATA[position + 3000 : position + 10_000]
            assert requests == ["GetObject"] * (number + 1)

    def test_positions_count_from_the_end_too(self, raw):
        assert raw.seek(-100, io.SEEK_END) == len(self.DATA) - 100
        assert self.read(raw, 1000) == self.DATA[-100:]
        assert self.read(raw, 1000) == b""
        assert raw.seek(100, io.SEEK_END) == len(self.DATA) + 100
        assert self.read(raw, 1000) == b""

    def test_there_is_nothing_before_the_start(self, raw):
        with pytest.raises(ValueError, match="cannot seek to -1, before the start"):
            raw.seek(-1)
        with pytest.raises(ValueError, match="before the start"):
            raw.seek(-len(self.DATA) - 1, io.SEEK_END)
        assert raw.tell() == 0

    def test_an_object_that_is_replaced_is_not_mixed_with_its_old_version(self, boto, raw):
        assert self.read(raw, 1000) == self.DATA[:1000]
        boto.put_object(Bucket="bucket", Key="file", Body=bytes(len(self.DATA)))
        raw.seek(2000)
        error = error_of(OSError, self.read, raw, 10)
        assert (error.errno, error.filename) == (errno.ESTALE, "s3://bucket/file")
        assert error.strerror == "it was replaced while it was read. Read it again when nobody writes it"

    def test_an_object_that_is_deleted_is_not_found(self, boto, raw):
        boto.delete_object(Bucket="bucket", Key="file")
        raw.seek(1)
        error_of(FileNotFoundError, self.read, raw, 10)

    @pytest.fixture
    def breaking(self, monkeypatch):
        """Make the next bodies fail after so many reads."""

        def plan(errors, reads=1):
            left = {"errors": list(errors), "reads": reads}
            readinto = StreamingBody.readinto

            def broken(body, buffer):
                if left["errors"]:
                    left["reads"] -= 1
                    if left["reads"] < 0:
                        left["reads"] = reads
                        raise left["errors"].pop(0)
                return readinto(body, buffer)

            monkeypatch.setattr(StreamingBody, "readinto", broken)

        return plan

    BROKEN = (
        boto_errors.ReadTimeoutError(endpoint_url="http://s3"),
        boto_errors.ResponseStreamingError(error="cut"),
        boto_errors.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        boto_errors.ConnectionClosedError(endpoint_url="http://s3"),
    )

    @pytest.mark.parametrize("error", BROKEN, ids=lambda error: type(error).__name__)
    def test_a_broken_stream_is_resumed_where_it_broke(self, raw, requests, breaking, error):
        breaking([error] * 3)
        for start in range(0, len(self.DATA), 1 << 20):
            assert self.read(raw, 1 << 20) == self.DATA[start : start + (1 << 20)]
        assert requests == ["GetObject"] * 4

    def test_a_stream_that_goes_on_breaking_is_an_error(self, raw, requests, breaking):
        breaking(self.BROKEN, reads=0)
        error = error_of(OSError, self.read, raw, 1000)
        assert (error.errno, error.filename) == (errno.EIO, "s3://bucket/file")
        assert error.strerror.startswith("S3 could not be used: ")
        assert len(requests) == 4
        assert self.read(raw, 1000) == self.DATA[:1000]  # and no bytes were lost

    def test_a_body_that_ends_early_is_resumed(self, raw, requests, monkeypatch):
        """Not every version of urllib3 notices; botocore then does."""
        monkeypatch.setattr(StreamingBody, "readinto", lambda body, buffer: body._verify_content_length() or 0)
        error_of(OSError, self.read, raw, 1000)
        assert len(requests) == 4

    def test_closing_gives_the_connection_back(self, raw):
        body = raw._body
        raw.close()
        assert raw.closed
        assert body._raw_stream.closed
        raw.close()

    def test_a_reader_passes_for_a_file(self, boto):
        boto.put_object(Bucket="bucket", Key="file", Body="höher\nweiter\n".encode())
        with S3Store().open("s3://bucket/file") as stream:
            assert stream.readable()
            assert stream.seekable()
            assert not stream.writable()
            assert (stream.name, stream.mode) == ("s3://bucket/file", "rb")
            assert list(io.TextIOWrapper(stream, encoding="utf-8")) == ["höher\n", "weiter\n"]


class TestMessages:
    def test_no_object(self, boto):
        error = error_of(FileNotFoundError, S3Store().open, "s3://bucket/none")
        assert (error.filename, error.strerror) == ("s3://bucket/none", "there is no such object")
        assert S3Store().size("s3://bucket/none") is None

    def test_no_bucket(self, boto):
        said = "there is no such bucket; check its name and the endpoint"
        for call in (
            lambda: S3Store().open("s3://none/file"),
            lambda: list(S3Store().match("s3://none/*")),
            lambda: S3Store().is_folder("s3://none/dir"),
            lambda: put(b"data", path="s3://none/file"),
            lambda: put(b"data", path="s3://none/file", overwrite=True),
        ):
            error = error_of(FileNotFoundError, call)
            assert error.strerror == said
            assert error.filename.startswith("s3://none/")
        assert S3Store().size("s3://none/file") is None  # S3 does not say more of what it only describes

    @pytest.mark.parametrize(
        ("operation", "permission", "call"),
        [
            ("GetObject", "s3:GetObject", lambda: S3Store().open("s3://bucket/file")),
            ("HeadObject", "s3:GetObject and s3:ListBucket", lambda: S3Store().size("s3://bucket/file")),
            ("ListObjectsV2", "s3:ListBucket", lambda: list(S3Store().match("s3://bucket/*"))),
            ("ListObjectsV2", "s3:ListBucket", lambda: S3Store().is_folder("s3://bucket/dir")),
            ("PutObject", "s3:PutObject", lambda: put(b"data")),
            ("CreateMultipartUpload", "s3:PutObject", lambda: put(data_of(PART))),
            ("CompleteMultipartUpload", "s3:PutObject", lambda: put(data_of(PART))),
        ],
    )
    def test_a_denial_names_the_permission(self, boto, small_parts, operation, permission, call):
        refuse(operation, 403, "AccessDenied")
        error = error_of(PermissionError, call)
        assert error.errno == errno.EACCES
        assert error.filename.startswith("s3://bucket/")
        more = ", and valid credentials" if operation == "HeadObject" else ". S3 says AccessDenied: planned"
        assert error.strerror == f"access denied; the caller needs {permission} on it{more}"

    def test_the_key_file_is_named_when_it_is_the_one_that_is_denied(self, boto):
        output = started(b"data")
        refuse("PutObject", 403, "AccessDenied")
        assert error_of(PermissionError, output.commit).filename == "s3://bucket/dir/_KEY_FOR_shard.json"

    def test_wrong_credentials_are_no_missing_permission(self, boto):
        refuse("GetObject", 403, "SignatureDoesNotMatch")
        error = error_of(PermissionError, S3Store().open, "s3://bucket/file")
        said = "S3 does not take these credentials; check them. S3 says SignatureDoesNotMatch: planned"
        assert error.strerror == said

    def test_what_else_s3_says_is_passed_on(self, boto):
        refuse("PutObject", 400, "InvalidRequest")
        error = error_of(OSError, put, b"data")
        assert (error.errno, error.strerror) == (errno.EIO, "S3 says InvalidRequest: planned")

    @pytest.mark.usefixtures("fresh_clients")
    def test_no_credentials(self, boto, monkeypatch):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        for call in (lambda: S3Store().open("s3://bucket/file"), lambda: put(b"data", overwrite=True)):
            error = error_of(OSError, call)
            assert error.strerror == "S3 could not be used: Unable to locate credentials"

    def test_a_server_that_is_away_is_waited_for(self, away, caplog):
        away.begins()
        assert error_of(OSError, put, data_of(PART)).strerror.startswith("S3 could not be used: Could not connect")
        assert (len(away.sent), len(away.waits)) == (8, 7)
        assert all(limit / 2 <= wait <= limit for wait, limit in zip(away.waits[2:], (1, 2, 4, 8, 16), strict=True))
        said = [record.message for record in caplog.records if record.name == "beam_envelope.keys.aws_retries"]
        assert len(said) == 5
        assert re.fullmatch(r"S3 UploadPart: EndpointConnectionError; trying again in \d+ s", said[0])

    def test_each_thread_has_its_own_retries(self, away):
        """botocore's, some 35 for all threads of a client, are used up by the first of them."""
        away.begins()
        with ThreadPoolExecutor(20) as pool:
            tries = [pool.submit(put, data_of(PART), path=f"s3://bucket/{number}") for number in range(20)]
        assert all(isinstance(done.exception(), OSError) for done in tries)
        assert len(away.sent) == 20 * 8

    def test_aws_own_setting_of_the_attempts_holds(self, away, monkeypatch):
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        away.begins()
        error_of(OSError, put, data_of(PART))
        assert len(away.sent) == 2

    @pytest.mark.parametrize("mode", ["legacy", "standard", "adaptive"])
    def test_aws_own_retry_mode_takes_no_patience_away(self, away, monkeypatch, mode):
        monkeypatch.setenv("AWS_RETRY_MODE", mode)
        away.begins()
        error_of(OSError, put, data_of(PART))
        assert len(away.sent) == 8

    @pytest.mark.usefixtures("fresh_clients")
    def test_settings_that_make_no_client(self, boto, monkeypatch):
        monkeypatch.setenv("AWS_PROFILE", "none")
        for call in (
            lambda: S3Store().open("s3://bucket/file"),
            lambda: list(S3Store().match("s3://bucket/*")),
            lambda: put(b"data", overwrite=True),
            lambda: put(data_of(s3.PART_BYTES), overwrite=True),
        ):
            assert "profile (none) could not be found" in error_of(OSError, call).strerror

    def test_a_path_without_a_bucket(self):
        for path in ("s3://", "s3:///file"):
            with pytest.raises(ValueError, match="names no bucket; an object is s3://BUCKET/NAME"):
                S3Store().size(path)


ODD_NAMES = [
    "a b/c d.csv",
    "größe/日本.csv",
    "a+b%20c%.csv",
    "a[1].csv",
    "a?b*c.csv",
    "a&b=c#d;e,f@g:h$i'j\"k.csv",
    "two//slashes",
    ".hidden/..x",
]


class TestStore:
    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_any_name_can_be_written_found_and_read(self, boto, name):
        path = f"s3://bucket/{name}"
        put(b"data", path=path)
        folder, _, last = name.rpartition("/")
        assert sorted(keys(boto)) == sorted([name, f"{folder}/_KEY_FOR_{last}.json".removeprefix("/")])
        found = {metadata.path: metadata.size_in_bytes for metadata in S3Store().match("s3://bucket/**")}
        assert found[path] == S3Store().size(path) == 4
        with S3Store().open(path) as stream:
            assert stream.read() == b"data"

    TREE = ("a.csv", "b.csv", "b.txt", "dir/a.csv", "dir/b.csv", "dir/deep/a.csv", "dirt/a.csv", "x1/a.csv", "x2/a.csv")

    @pytest.fixture
    def tree(self, boto):
        for key in self.TREE:
            boto.put_object(Bucket="bucket", Key=key, Body=key.encode())
        boto.put_object(Bucket="bucket", Key="dir/", Body=b"")  # what consoles make when asked for a folder

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("*", "a.csv b.csv b.txt"),
            ("*.csv", "a.csv b.csv"),
            ("b.*", "b.csv b.txt"),
            ("dir/*", "dir/a.csv dir/b.csv"),
            ("dir/a.csv", "dir/a.csv"),
            ("dir/**", "dir/a.csv dir/b.csv dir/deep/a.csv"),
            ("dir*", ""),
            ("dir*/*", "dir/a.csv dir/b.csv dirt/a.csv"),
            ("*/a.csv", "dir/a.csv dirt/a.csv x1/a.csv x2/a.csv"),
            ("**a.csv", "a.csv dir/a.csv dir/deep/a.csv dirt/a.csv x1/a.csv x2/a.csv"),
            ("x[12]/a.csv", "x1/a.csv x2/a.csv"),
            ("x?/*", "x1/a.csv x2/a.csv"),
            ("dir?a.csv", "dir/a.csv"),
            ("none/*", ""),
        ],
    )
    def test_globs(self, boto, tree, pattern, expected):
        found = sorted(S3Store().match(f"s3://bucket/{pattern}"), key=lambda metadata: metadata.path)
        assert [metadata.path for metadata in found] == [f"s3://bucket/{name}" for name in expected.split()]

    def test_globs_find_what_those_of_beam_find_but_folders(self, boto, tree):
        FileSystems.set_options(PipelineOptions([]))
        for pattern in ("s3://bucket/dir*/*", "s3://bucket/**"):
            theirs = FileSystems.match([pattern])[0].metadata_list
            expected = {(metadata.path, metadata.size_in_bytes) for metadata in theirs} - {("s3://bucket/dir/", 0)}
            assert {(metadata.path, metadata.size_in_bytes) for metadata in S3Store().match(pattern)} == expected

    @pytest.mark.parametrize("name", ["a[1].csv", "a*b.csv", "a?b.csv", "a[[]b.csv", "[*]", "dir[x]/a"])
    def test_a_quoted_glob_finds_the_one_name_and_lists_no_more(self, boto, name):
        for key in (name, "a1.csv", "axb.csv", "aa", "dirx/a"):
            boto.put_object(Bucket="bucket", Key=key, Body=b"x")
        listed = []
        hook("before-parameter-build.s3.ListObjectsV2", lambda params, **_: listed.append(params["Prefix"]))
        found = S3Store().match(quote_glob(f"s3://bucket/{name}"))
        assert [metadata.path for metadata in found] == [f"s3://bucket/{name}"]
        assert listed == [name]

    def test_a_file_has_the_time_at_which_s3_took_it(self, boto, tree):
        (found,) = S3Store().match("s3://bucket/a.*")
        head = boto.head_object(Bucket="bucket", Key="a.csv")
        assert found.last_updated_in_seconds == pytest.approx(head["LastModified"].timestamp(), abs=1)

    def test_folders_below_are_listed_only_if_the_glob_reaches_them(self, boto, tree, requests):
        listed = []
        hook(
            "after-call.s3.ListObjectsV2",
            lambda parsed, **_: listed.extend(item["Key"] for item in parsed.get("Contents", ())),
        )
        assert len(list(S3Store().match("s3://bucket/dir/*.csv"))) == 2
        assert listed == ["dir/", "dir/a.csv", "dir/b.csv"]
        assert requests == ["ListObjectsV2"]

    def test_listings_of_several_pages_are_read_to_their_end(self, boto, requests):
        names = [f"many/{number:02}" for number in range(11)]
        for name in names:
            boto.put_object(Bucket="bucket", Key=name, Body=b"x")
        hook("before-parameter-build.s3.ListObjectsV2", lambda params, **_: params.update(MaxKeys=4))
        found = [metadata.path for metadata in S3Store().match("s3://bucket/many/*")]
        assert found == [f"s3://bucket/{name}" for name in names]
        assert requests == ["ListObjectsV2"] * 3

    def test_a_folder_is_a_prefix_that_has_objects(self, boto, tree):
        for path, expected in {
            "s3://bucket": True,
            "s3://bucket/dir": True,
            "s3://bucket/dir/": True,
            "s3://bucket/dir/deep": True,
            "s3://bucket/di": False,
            "s3://bucket/a.csv": False,
        }.items():
            assert S3Store().is_folder(path) is expected

    def test_a_bucket_alone_is_no_object(self, boto):
        assert S3Store().size("s3://bucket") is None
        assert S3Store().size("s3://bucket/") is None


@pytest.mark.usefixtures("fresh_clients")
class TestClient:
    @pytest.fixture
    def sessions(self, monkeypatch):
        made, session = [], boto3.Session

        def make(*arguments, **settings):
            made.append(settings)
            return session(*arguments, **settings)

        monkeypatch.setattr(boto3, "Session", make)
        return made

    def test_a_process_has_one_client(self, boto, sessions, small_parts):
        put(data_of(2 * PART))
        with S3Store().open("s3://bucket/dir/shard") as stream:
            stream.read()
        assert len(list(S3Store().match("s3://bucket/**"))) == 2
        with ThreadPoolExecutor(8) as pool:
            clients = set(pool.map(lambda _: s3_client(), range(100)))
        assert len(clients) == len(sessions) == 1

    def test_pipelines_with_the_same_options_share_it(self, boto, sessions):
        first = s3_client()
        FileSystems.set_options(PipelineOptions(["--s3_region_name=eu-west-1"]))
        other = s3_client()
        FileSystems.set_options(PipelineOptions(["--job_name=another", "--s3_region_name=eu-west-1"]))
        assert s3_client() is other
        FileSystems.set_options(PipelineOptions([]))
        assert s3_client() is first
        assert other.meta.region_name == "eu-west-1"
        assert len(sessions) == 2

    def test_looking_it_up_is_quick(self, boto, monkeypatch):
        s3_client()
        monkeypatch.setattr(client_module, "_settings", None)  # reading the options takes longer than a request
        s3_client()

    @pytest.mark.parametrize("form", ["options", "dict"])  # Beam's filesystems may be given either
    def test_the_s3_options_of_beam_hold(self, boto, moto_server, monkeypatch, form):
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(name)
        words = [
            f"--s3_endpoint_url={moto_server}",
            "--s3_access_key_id=ours",
            "--s3_secret_access_key=secret",
            "--s3_session_token=token",
            "--s3_region_name=eu-central-1",
        ]
        options = PipelineOptions(words)
        FileSystems.set_options(options if form == "options" else options.view_as(S3Options).get_all_options())
        sent = []
        hook("before-send.s3", lambda request, **_: sent.append({**request.headers}))
        put(b"data")
        assert stored(boto) == b"data"
        assert re.search(rb"Credential=ours/\d+/eu-central-1/s3/", sent[0]["Authorization"])
        assert sent[0]["X-Amz-Security-Token"] == b"token"
        assert b"beam-envelope" in sent[0]["User-Agent"]

    def test_tls_options_hold(self, monkeypatch):
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        FileSystems.set_options(PipelineOptions(["--s3_disable_ssl", "--s3_verify=/ca.pem"]))
        client = s3_client()
        assert client.meta.endpoint_url.startswith("http://")
        assert client._endpoint.http_session._verify == "/ca.pem"

    def test_a_child_of_a_fork_makes_its_own(self, boto):
        ours = s3_client()
        with client_module._lock:  # held by another thread at the time of the fork, say
            child = os.fork()
            if not child:
                try:
                    signal.alarm(30)
                    fresh = not client_module._clients and s3_client() is not ours
                    os._exit(0 if fresh and S3Store().size("s3://bucket/none") is None else 1)
                finally:
                    os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert s3_client() is ours


def test_a_key_file_of_the_largest_size_is_read_in_one_request(boto, requests):
    data = data_of(MAX_KEY_FILE_BYTES)
    boto.put_object(Bucket="bucket", Key="key", Body=data)
    assert read_small("s3://bucket/key", MAX_KEY_FILE_BYTES + 1) == data
    assert requests == ["GetObject"]
