"""The key store on a local disk."""

import errno
import multiprocessing
import os
import pickle
import threading

import pytest

from beam_envelope.formats import keystore
from beam_envelope.formats.keyfile import MAX_KEY_FILE_BYTES
from beam_envelope.formats.keystore import LocalKeyStore
from tests.running import listing


@pytest.fixture
def store(tmp_path):
    return LocalKeyStore(tmp_path / "deep" / "keys")


def test_nothing_is_touched_before_the_first_key_file(store, tmp_path):
    assert store.get("a") is None
    assert listing(tmp_path) == []


def test_a_key_file_comes_back_and_is_hidden_from_globs(store, tmp_path):
    store.put("a", b"one")
    assert store.get("a") == b"one"
    assert listing(tmp_path) == ["deep/keys/_KEY_FOR_a.json"]


def test_put_replaces_and_create_once_does_not(store, tmp_path):
    store.put("a", b"one")
    assert store.create_once("a", b"two") == b"one"
    store.put("a", b"three")
    assert store.create_once("a", b"four") == store.get("a") == b"three"
    assert store.create_once("b", b"five") == store.get("b") == b"five"
    assert listing(tmp_path) == ["deep/keys/_KEY_FOR_a.json", "deep/keys/_KEY_FOR_b.json"]


def test_a_key_file_is_on_the_disk_before_put_returns(store, monkeypatch):
    synced = []
    fsync = os.fsync

    def remember(descriptor):
        fsync(descriptor)
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", remember)
    store.put("a", b"one")
    assert len(synced) >= 2  # the file, and the folder that names it
    assert synced[-1] == "keys"
    synced.clear()
    store.create_once("b", b"one")
    assert len(synced) >= 1


def test_a_huge_file_is_not_read_into_memory(store):
    store.put("a", bytes(MAX_KEY_FILE_BYTES + 1000))
    assert len(store.get("a")) == MAX_KEY_FILE_BYTES + 1


def test_of_many_threads_that_create_all_get_the_same(store):
    barrier, found = threading.Barrier(8), []

    def create(number):
        barrier.wait()
        found.append(store.create_once("a", b"%d" % number))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [store.get("a")] * 8


def _create(folder, number, barrier):
    barrier.wait()
    return LocalKeyStore(folder).create_once("a", b"%d" % number)


def test_of_many_processes_that_create_all_get_the_same(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    workers = [context.Process(target=lambda n=number: queue.put(_create(tmp_path, n, barrier))) for number in range(4)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [LocalKeyStore(tmp_path).get("a")] * 4
    assert listing(tmp_path) == ["_KEY_FOR_a.json"]


def test_a_disk_without_links_says_so_and_nothing_is_left(store, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(keystore.os, "link", refuse)
    with pytest.raises(OSError, match="this disk has no hard links, so no file on it is created by one of two jobs"):
        store.create_once("a", b"one")
    assert listing(tmp_path) == []


def test_other_errors_of_the_disk_pass_through(store, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(keystore.os, "link", fail)
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error$"):
        store.create_once("a", b"one")
    assert listing(tmp_path) == []


def test_stores_are_equal_by_place_and_travel(store, tmp_path, monkeypatch):
    assert pickle.loads(pickle.dumps(store)) == store
    assert hash(LocalKeyStore(f"{tmp_path}/deep/keys/")) == hash(store)
    assert LocalKeyStore(f"{tmp_path}/deep/keys/") == store != LocalKeyStore(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert LocalKeyStore("deep/keys") == store  # it means the same in another working directory
    assert repr(store) == f"LocalKeyStore('{tmp_path}/deep/keys')"
