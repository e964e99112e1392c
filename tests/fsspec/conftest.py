"""The filesystem `envelope::`, over the local disk and over memory."""

import fsspec
import pytest

from beam_envelope.fsspec import EnvelopeFsspecFileSystem
from beam_envelope.keys.local import LocalKms, generate_local_key

CONTEXT = {"dataset": "flights"}
CANARY = "canary-3f1c9e70"


@pytest.fixture(autouse=True)
def no_instances_of_other_tests():
    """Start and end each test with an empty memory:// and no filesystem of another test."""
    memory = fsspec.filesystem("memory")

    def clear():
        EnvelopeFsspecFileSystem.clear_instance_cache()
        memory.store.clear()
        memory.pseudo_dirs[:] = [""]

    clear()
    yield
    clear()


@pytest.fixture
def key(tmp_path_factory):
    """The URI of a local key, outside of the folders that tests look into."""
    kms = LocalKms(tmp_path_factory.mktemp("keyring") / "keyring.json")
    generate_local_key(kms)
    return f"local-kms://{kms.path}"


@pytest.fixture
def options(key):
    """The storage options of readers and writers."""
    return {"key": key, "context": CONTEXT}


@pytest.fixture(params=["file", "memory"])
def inner(request):
    """The filesystem inside."""
    return fsspec.filesystem(request.param, **({"auto_mkdir": True} if request.param == "file" else {}))


@pytest.fixture
def fs(inner, options):
    """The filesystem that is tested."""
    return EnvelopeFsspecFileSystem(fs=inner, **options)


@pytest.fixture
def folder(inner, tmp_path):
    """A folder for shards, as a path of both filesystems."""
    path = f"{tmp_path}/data"
    inner.makedirs(path)
    return path


def everything(inner, folder):
    """Return what the filesystem inside has below a folder: relative path to bytes."""
    return {path.removeprefix(folder + "/"): inner.cat_file(path) for path in inner.find(folder)}
