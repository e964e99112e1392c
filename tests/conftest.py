"""Fixtures for all tests: KMSs of every kind, no setting of the user's, and empty caches."""

import logging
import os
import sys
import urllib.request

import pytest
from hypothesis import settings

from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.keys.provider import kms_calls
from beam_envelope.testing import FakeKms

settings.register_profile("beam_envelope", deadline=None, print_blob=True)  # a shared machine knows no deadline
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
        for name, value in kms.environment().items():
            monkeypatch.setenv(name, value)
        yield kms


@pytest.fixture(scope="session")
def moto_endpoint():
    """Where one moto server for all tests serves; use `moto_server`, which empties it."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


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
