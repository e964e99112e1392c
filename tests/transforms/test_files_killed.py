"""A job that is killed at any moment: what it leaves is whole or is not taken for a shard, and `skip` finishes it."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from beam_envelope import LocalKms, open_shard
from beam_envelope.formats.keyfile import key_file_name
from beam_envelope.keys.local import generate_local_key
from tests.running import decrypt, encrypt, listing, read_files, with_key_files, with_manifest, write_files

CONTEXT = {"dataset": "flights"}
OPTIONS = ("--context", "dataset=flights")


def visible(folder):
    """Return the files of a folder that readers take for shards."""
    return [name for name in listing(folder) if not name.startswith(("_TMP_", "_KEY_FOR_", "_MANIFEST"))]


def plaintext(shard, key):
    """Return what is in a shard."""
    with open_shard(shard, key=key, context=CONTEXT) as stream:
        return stream.read()


def state(folder):
    """Return what is in a folder, without the random names of unfinished files."""
    return tuple(name[:5] if name.startswith("_TMP_") else name for name in listing(folder))


@pytest.mark.parametrize("if_exists", ["error", "overwrite"])
def test_a_job_killed_at_any_step_leaves_whole_shards_only_and_skip_finishes_it(tmp_path, local_key, forker, if_exists):
    contents = {"a": b"alpha" * 10_000, "b": b"beta"}
    old = {"a": b"the state of yesterday", "b": b"of old"}
    data, sealed = write_files(tmp_path / "data", contents), tmp_path / "sealed"
    if if_exists == "overwrite":
        encrypt(write_files(tmp_path / "old", old), sealed, local_key, context=CONTEXT)
    words = ("encrypt", f"{data}/*", "--output", sealed, "--key", local_key, *OPTIONS, "--if-exists", if_exists)
    seen, orphans = set(), set()
    for step in range(1, 100):
        status, log = forker.run(*words, step=step, below=sealed)
        if status == 0:
            break
        assert status == -signal.SIGKILL, log
        there = visible(sealed)
        for name in there:
            assert plaintext(sealed / name, local_key) in {contents[name], old[name]}
        orphans |= {name for name in contents if key_file_name(name) in listing(sealed) and name not in there}
        if if_exists == "error":  # finish it, then start afresh, to be killed one step later
            if (left := state(sealed)) not in seen:
                seen.add(left)
                results, _ = encrypt(data, sealed, local_key, context=CONTEXT, if_exists="skip")
                assert [result.skipped for result in results] == [name in there for name in contents]
                assert {name: plaintext(sealed / name, local_key) for name in visible(sealed)} == contents
            for path in sealed.glob("*"):
                path.unlink()
    assert status == 0
    assert {name: plaintext(sealed / name, local_key) for name in visible(sealed)} == contents
    assert orphans == {"a", "b"}  # it was killed between key file and shard, too


def test_the_command_killed_in_the_middle_is_finished_by_skip(tmp_path, local_key):
    contents = {f"{number:02}": os.urandom(1 << 20) + b"%d" % number for number in range(40)}
    data = write_files(tmp_path / "data", contents)
    sealed = tmp_path / "sealed"
    command = [sys.executable, "-m", "beam_envelope.cli", "encrypt", f"{data}/*", "--output", str(sealed)]
    with subprocess.Popen(
        [*command, "--key", str(local_key), *OPTIONS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as process:
        while process.poll() is None and len(visible(sealed)) < 3:
            time.sleep(0.002)
        process.kill()
    done = visible(sealed)
    assert process.returncode == -signal.SIGKILL
    assert 3 <= len(done) < 40
    assert all(plaintext(sealed / name, local_key) == contents[name] for name in done)

    results, counters = encrypt(f"{data}/*", sealed, local_key, context=CONTEXT, if_exists="skip")
    assert [result.skipped for result in results] == [name in done for name in contents]
    assert (counters["files"], counters["files_skipped"]) == (40 - len(done), len(done))
    decrypt(sealed, tmp_path / "opened", local_key, context=CONTEXT)
    assert read_files(tmp_path / "opened") == contents
    assert set(with_manifest(*contents)) <= set(listing(sealed))


# ------------------------------------------------------------------------------- as a user with fewer rights

NOBODY = 65_534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user, and read what root may")


@pytest.fixture
def open_folder():
    """A folder that every user may enter and write to; only its owner may enter pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY, NOBODY)
        yield Path(folder)


@pytest.fixture
def nobodys_key(open_folder):
    """A key in a keyring of the other user's own."""
    key = LocalKms(open_folder / "keyring.json")
    generate_local_key(key)
    os.chown(key.path, NOBODY, NOBODY)
    return key


@as_root
def test_an_unreadable_file_is_an_error_that_names_it_and_the_other_files_are_whole(open_folder, nobodys_key, forker):
    data = write_files(open_folder / "data", {"a": b"1", "secret": b"2"})
    (data / "secret").chmod(0o600)
    status, log = forker.run(
        "encrypt", f"{data}/*", "--output", open_folder / "sealed", "--key", nobodys_key, uid=NOBODY
    )
    assert status == 1
    assert f"beam-envelope encrypt: Permission denied: '{data}/secret'\n" in log
    assert "Traceback" not in log
    assert listing(open_folder / "sealed") in ([], with_key_files("a"))


@as_root
def test_an_unreadable_folder_is_an_error_that_names_it(open_folder, nobodys_key, forker):
    data = write_files(open_folder / "data", {"a": b"1", "sub/b": b"2"})
    (data / "sub").chmod(0o700)
    words = ("--output", open_folder / "sealed", "--key", nobodys_key)
    status, log = forker.run("encrypt", data, *words, uid=NOBODY)
    assert (status, listing(open_folder / "sealed")) == (1, [])
    assert log.endswith(f"beam-envelope encrypt: {data}/sub: Permission denied\n")
    status, _ = forker.run("encrypt", f"{data}/*", *words, uid=NOBODY)  # does not look into it
    assert (status, listing(open_folder / "sealed")) == (0, with_manifest("a"))


@as_root
def test_an_output_folder_that_may_not_be_written_is_an_error_that_names_it(open_folder, nobodys_key, forker):
    data = write_files(open_folder / "data", {"a": b"1"})
    (open_folder / "sealed").mkdir(mode=0o755)
    status, log = forker.run("encrypt", data, "--output", open_folder / "sealed", "--key", nobodys_key, uid=NOBODY)
    assert status == 1
    assert f"Permission denied: '{open_folder}/sealed/_TMP_" in log
    assert listing(open_folder / "sealed") == []


@as_root
def test_a_keyring_of_another_user_is_an_error_that_says_so(open_folder, nobodys_key, forker):
    data = write_files(open_folder / "data", {"a": b"1"})
    os.chown(nobodys_key.path, 0, 0)
    status, log = forker.run("encrypt", data, "--output", open_folder / "sealed", "--key", nobodys_key, uid=NOBODY)
    assert status == 1
    assert f"the keyring {nobodys_key.path} may not be read by this user. Run the job as its owner" in log
    assert listing(open_folder / "sealed") == []
