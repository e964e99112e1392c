"""Fixtures for the tests of formats."""

import pytest

from beam_envelope.keys.local import LocalKms, generate_local_key
from tests.formats.sealed import CHUNK, Sealed, rows


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    """A key for the whole module, so that tests with many examples may use it."""
    made = LocalKms(tmp_path_factory.mktemp("keyring") / "keyring.json")
    generate_local_key(made)
    return made


@pytest.fixture(scope="module")
def three_chunks(key):
    return Sealed(rows(2 * CHUNK + 5000), key)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "part-0.csv"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Three keys for the whole module."""
    made = [LocalKms(tmp_path_factory.mktemp("keyring") / f"{name}.json") for name in ("main", "pii", "geo")]
    for key in made:
        generate_local_key(key)
    return made
