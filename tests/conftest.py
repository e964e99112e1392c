"""Fixtures for all tests: KMSs of every kind, no setting of the user's, and empty caches."""

import contextlib
import logging
import os
import sys
import threading
import urllib.request

import pytest
from hypothesis import HealthCheck, settings

from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.keys.provider import kms_calls
from beam_envelope.testing import FakeKms

# A shared machine knows no deadline, and nothing is too slow for it.
settings.register_profile("beam_envelope", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("beam_envelope")


@pytest.fixture(autouse=True)
def empty_caches():
    """Start and end each test without cached data keys and KMS clients, and count KMS calls from here on."""
    kms_calls.counts.clear()
    clear_caches()
    yield
    clear_caches()


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch):
    """Hide the AWS account and the settings of whoever runs the tests: no test may reach, or depend on, them."""
    for name in os.environ:
        if name.startswith(("AWS_", "BEAM_ENVELOPE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(autouse=True)
def no_options_of_an_earlier_pipeline(monkeypatch):
    """Let each test begin without pipeline options, where there is Beam at all: those seen last hold for a process."""
    filesystems = sys.modules.get("apache_beam.io.filesystems")
    if filesystems is not None:
        monkeypatch.setattr(filesystems.FileSystems, "_pipeline_options", None)


@pytest.fixture(autouse=True)
def levels_of_loggers():
    """Restore the levels that the command sets for its process, so that no test hears less for it."""
    loggers = [logging.getLogger(name) for name in (None, "apache_beam")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def local_key(tmp_path):
    """A LocalKms on a fresh keyring."""
    key = LocalKms(tmp_path / "keyring" / "keyring.json")
    generate_local_key(key)
    return key


@pytest.fixture
def fake_kms(monkeypatch, no_settings_of_the_user):
    """A FakeKms that `aws-kms://` keys of this process and of its children reach."""
    with FakeKms() as kms:
        credentials = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}  # which S3 takes too
        for name, value in (kms.environment() | credentials).items():
            monkeypatch.setenv(name, value)
        yield kms


def pytest_addoption(parser):
    """Let S3 be another than moto's."""
    parser.addoption("--s3", choices=["moto", "versitygw"], default="moto", help="which S3 tests with one run on")


def pytest_collection_modifyitems(config, items):
    """Skip what cannot hold on another S3 than moto's, and say why."""
    if config.getoption("--s3") == "versitygw":
        from tests.engines.gateway import reason_to_skip

        for item in items:
            if reason := reason_to_skip(item.nodeid):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def aws_application(request, tmp_path_factory):
    """The WSGI application that answers as AWS: moto, and with `--s3 versitygw` that for requests to S3."""
    pytest.importorskip("moto.server")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    moto = DomainDispatcherApplication(create_backend_app)
    if request.config.getoption("--s3") == "moto":
        yield moto
        return
    from tests.engines.gateway import Gateway, S3AtGateway

    gateway = Gateway(tmp_path_factory.mktemp("versitygw"))
    yield S3AtGateway(gateway, moto)
    gateway.stop()


@contextlib.contextmanager
def served(application):
    """Serve a WSGI application over HTTP in this process; yields its URL."""
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections open

        def log_request(self, *_):
            """Say nothing."""

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


@pytest.fixture(scope="session")
def moto_endpoint(aws_application):
    """Where one moto server for all tests serves; use `moto_server`, which empties it."""
    with served(aws_application) as endpoint:
        yield endpoint


@pytest.fixture
def moto_server(moto_endpoint, monkeypatch, no_settings_of_the_user):
    """The URL of an empty moto server (S3, KMS, ...) that boto3 in this process and its children reaches."""
    environment = {
        "AWS_ENDPOINT_URL": moto_endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    clear_caches()
    request = urllib.request.Request(f"{moto_endpoint}/moto-api/reset", method="POST")  # noqa: S310  # http
    urllib.request.urlopen(request).close()  # noqa: S310
    return moto_endpoint


@pytest.fixture(scope="session")
def forker(tmp_path_factory):
    """A process that has loaded Beam and starts commands at once."""
    from tests.forking import Forker

    process = Forker(tmp_path_factory.mktemp("forker"))
    yield process
    process.close()
