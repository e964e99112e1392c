"""KMS and S3 of moto behind an HTTP layer that counts, so that requests of worker processes count too."""

import contextlib
import io
import itertools
import re
import threading
from collections import Counter
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

import boto3
import pytest
from apache_beam.io.filesystems import FileSystems

from beam_envelope import cli, console
from beam_envelope.io.s3 import clear_s3_clients, s3_client
from beam_envelope.keys.cache import clear_caches
from tests.conftest import served


class Request(NamedTuple):
    """What came: `Decrypt` of KMS in `eu-west-1`, say, or `PutObject` of S3 with the path of its object."""

    operation: str
    region: str
    path: str


class Recorder:
    """A WSGI application that notes each request and passes it on."""

    def __init__(self, application):
        self.application = application
        self.requests = []
        self.watch = None

    def __call__(self, environ, start_response):
        request = _request(environ)
        self.requests.append(request)
        if self.watch is not None:
            self.watch(request)
        return self.application(environ, start_response)


def _request(environ):
    scope = re.search(r"Credential=[^/]+/\d+/([^/]+)/", environ.get("HTTP_AUTHORIZATION", ""))
    region = scope[1] if scope else ""
    path = unquote(environ["PATH_INFO"].encode("latin-1").decode())
    target = environ.get("HTTP_X_AMZ_TARGET", "")
    if target:
        return Request(target.rpartition(".")[2], region, path)
    query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    method = environ["REQUEST_METHOD"]
    if "uploadId" in query:
        names = {"PUT": "UploadPart", "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}
    elif "list-type" in query:
        names = {"GET": "ListObjectsV2"}
    else:
        names = {
            "GET": "GetObject",
            "HEAD": "HeadObject",
            "PUT": "PutObject",
            "POST": "CreateMultipartUpload",
            "DELETE": "DeleteObject",
        }
    return Request(names[method], region, path)


@pytest.fixture(scope="session")
def recorder(aws_application):
    """A Recorder in front of AWS."""
    return Recorder(aws_application)


@pytest.fixture(scope="session")
def recorded_endpoint(recorder):
    """Where the recorder serves. It shares its data with `moto_endpoint`, since both are in this process."""
    with served(recorder) as endpoint:
        yield endpoint


class Aws:
    """AWS as a test sees it: what it does itself goes past the recorder."""

    def __init__(self, endpoint, moto_endpoint, recorder, clients):
        self.endpoint = endpoint
        self._moto_endpoint, self._recorder, self._clients = moto_endpoint, recorder, clients
        self.s3 = self.client("s3", "us-east-1")

    def client(self, service, region):
        if (service, region) not in self._clients:
            credentials = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
            self._clients[service, region] = boto3.client(
                service, region_name=region, endpoint_url=self._moto_endpoint, **credentials
            )
        return self._clients[service, region]

    def create_key(self, alias=None, region="us-east-1"):
        """Make a KMS key and return its ARN."""
        kms = self.client("kms", region)
        arn = kms.create_key()["KeyMetadata"]["Arn"]
        if alias:
            kms.create_alias(AliasName=alias, TargetKeyId=arn)
        return arn

    def put(self, bucket, contents):
        for key, data in contents.items():
            self.s3.put_object(Bucket=bucket, Key=key, Body=data)

    def keys(self, bucket):
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def read(self, bucket):
        """Return all objects of a bucket."""
        return {key: self.s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in self.keys(bucket)}

    def uploads(self, bucket):
        return [upload["Key"] for upload in self.s3.list_multipart_uploads(Bucket=bucket).get("Uploads", ())]

    @property
    def requests(self):
        return list(self._recorder.requests)

    def calls(self):
        """How often each operation was asked for since the last look."""
        counts = Counter(request.operation for request in self._recorder.requests)
        self._recorder.requests.clear()
        return counts

    @contextlib.contextmanager
    def stopped_at(self, operation, number=1):
        """Hold back the request of that number of an operation until the block ends; yields an event that it came."""
        came, go_on, count = threading.Event(), threading.Event(), itertools.count(1)

        def watch(request):
            if request.operation == operation and next(count) == number:
                came.set()
                go_on.wait(60)

        self._recorder.watch = watch
        try:
            yield came
        finally:
            self._recorder.watch = None
            go_on.set()


@pytest.fixture(scope="session")
def plain_clients():
    return {}


@pytest.fixture(scope="module", autouse=True)
def one_s3_client():
    """Keep our S3 client from test to test: they all have the same endpoint."""
    clear_s3_clients()
    yield
    clear_s3_clients()


@pytest.fixture
def hook():
    """Has our S3 client call a handler, until the end of the test."""
    hooks = []

    def register(event, handler):
        s3_client().meta.events.register(event, handler)
        hooks.append((event, handler))

    yield register
    for event, handler in hooks:
        s3_client().meta.events.unregister(event, handler)


@pytest.fixture
def aws(moto_server, recorder, recorded_endpoint, plain_clients, monkeypatch):
    """An AWS with two empty buckets, `raw` and `sealed`, that this process and its children reach."""
    monkeypatch.setattr(FileSystems, "_pipeline_options", None)
    monkeypatch.setenv("AWS_ENDPOINT_URL", recorded_endpoint)
    clear_caches()
    aws = Aws(recorded_endpoint, moto_server, recorder, plain_clients)
    for bucket in ("raw", "sealed"):
        aws.s3.create_bucket(Bucket=bucket)
    aws.calls()
    return aws


class Said(NamedTuple):
    """What a command said and how it ended."""

    status: int
    output: str
    errors: str


@pytest.fixture
def command(monkeypatch):
    """Runs `beam-envelope` in this process, with the caches empty as in a fresh one."""

    def run(*words):
        clear_caches()
        output, errors = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = cli.main([str(word) for word in words])
        return Said(status, output.buffer.getvalue().decode(), errors.getvalue())

    yield run
    console.errors._file = None  # a job leaves the stream of its time there
