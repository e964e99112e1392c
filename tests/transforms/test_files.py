"""EncryptFiles and DecryptFiles: what goes in comes out, and what cannot is a clear error that leaves nothing."""

import os
import re
import shutil
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.io import fileio
from apache_beam.io.filesystem import FileMetadata
from apache_beam.transforms.display import DisplayData
from apache_beam.transforms.error_handling import CollectingErrorHandler

from beam_envelope import (
    ANY_CONTEXT,
    DataKeyPolicy,
    DecryptedFile,
    DecryptFiles,
    EncryptedFile,
    EncryptFiles,
    FailedFile,
    FormatError,
    LocalKms,
    open_shard,
)
from beam_envelope.formats.keyfile import KeyFile, key_file_name
from beam_envelope.formats.shard_layout import shard_size
from beam_envelope.keys.local import generate_local_key
from tests import running
from tests.running import decrypt, encrypt, fails, listing, read_files, run, with_manifest, write_files

CONTEXT = {"dataset": "flights", "tenant": "a"}

# ---------------------------------------------------------------------------------------------- round trips

SIZES = {f"size-{size}": os.urandom(size) for size in (0, 1, 16_383, 16_384, 16_385, 1_200_000)}
NAMES = dict.fromkeys(
    (
        "with space.csv",
        "größe-日本語.csv",
        "a[1].csv",
        "star*.csv",
        "what?.csv",
        "per%20cent#&=;'\".csv",
        "-dash",
        ".hidden",
        "new\nline",
        "n" * 241,  # with its key file's prefix and ending: 255
    ),
    b"some bytes\n",
)
TREE = {**SIZES, **NAMES, "a/x.csv": b"one", "b/x.csv": b"two", "a/b/x.csv": b"three", "d[1]/x*/y": b"four"}


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_tree_of_files_of_all_sizes_and_names_comes_back_byte_for_byte(tmp_path, local_key, compression):
    data = write_files(tmp_path / "data", TREE)
    settings = {"context": CONTEXT, "compression": compression}
    encrypted, _ = encrypt(data, tmp_path / "sealed", local_key, **settings)
    assert listing(tmp_path / "sealed") == sorted(with_manifest(*TREE), key=Path)
    decrypted, _ = decrypt(tmp_path / "sealed", tmp_path / "opened", local_key, context=CONTEXT)
    assert read_files(tmp_path / "opened") == TREE
    assert len(encrypted) == len(decrypted) == len(TREE)


def test_no_plaintext_is_in_the_shards(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a.csv": b"CANARY-7f3a" * 5000})
    encrypt(data, tmp_path / "sealed", local_key)
    shard = (tmp_path / "sealed/a.csv").read_bytes()
    assert b"CANARY" not in shard
    assert len(shard) == shard_size(11 * 5000)


def test_the_shards_are_those_of_open_shard(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a/x.csv": b"one"})
    encrypt(data, tmp_path / "sealed", local_key, context=CONTEXT)
    with open_shard(tmp_path / "sealed/a/x.csv", key=local_key, context=CONTEXT) as shard:
        assert shard.read() == b"one"


def test_compression_makes_the_shard_smaller(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a.csv": b"the same line\n" * 10_000})
    (result,), _ = encrypt(data, tmp_path / "sealed", local_key, compression="zstd")
    assert result.plaintext_bytes == 140_000
    assert result.ciphertext_bytes == (tmp_path / "sealed/a.csv").stat().st_size < 1000
    assert KeyFile.from_bytes(Path(result.key_file).read_bytes(), "").compression == "zstd"


def test_same_names_in_two_folders_keep_their_own_key_files(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a/x.csv": b"one", "b/x.csv": b"two"})
    encrypt(data, tmp_path / "sealed", local_key)
    assert listing(tmp_path / "sealed") == with_manifest("a/x.csv", "b/x.csv")
    shutil.rmtree(tmp_path / "sealed/a")
    assert fails(DecryptFiles(f"{tmp_path}/opened", key=local_key), f"{tmp_path}/sealed")[0] == "ManifestError"
    decrypt(tmp_path / "sealed", tmp_path / "opened", local_key, manifest="ignore")
    assert read_files(tmp_path / "opened") == {"b/x.csv": b"two"}


# --------------------------------------------------------------------------------------------------- inputs


def test_one_pattern_may_be_piped_in_as_a_string(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a": b"1", "b": b"2"})
    sealed = f"{data}/*" | EncryptFiles(f"{tmp_path}/sealed", key=local_key)
    opened = f"{tmp_path}/sealed/*" | "Open" >> DecryptFiles(f"{tmp_path}/opened", key=local_key)
    assert [type(sealed[0]), type(opened[0]), len(sealed), len(opened)] == [EncryptedFile, DecryptedFile, 2, 2]
    assert read_files(tmp_path / "opened") == {"a": b"1", "b": b"2"}


def test_patterns_paths_and_folders_may_be_mixed(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"one/a": b"1", "two/b": b"2", "three/c": b"3", "three/no": b"4"})
    transform = EncryptFiles(f"{tmp_path}/sealed", key=local_key)
    run(transform, f"{data}/one/a", f"{data}/two", f"{data}/three/c*")
    assert listing(tmp_path / "sealed") == with_manifest("a", "b", "c")


def test_matches_of_beams_own_transform_keep_their_paths_below_a_folder(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a/x.csv": b"one", "b/x.csv": b"two"})
    sealing = fileio.MatchFiles(f"{data}/**") | EncryptFiles(f"{tmp_path}/sealed", key=local_key, relative_to=str(data))
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        _ = pipeline | "Seal" >> sealing
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        found = pipeline | fileio.MatchFiles(f"{tmp_path}/sealed/**.csv")
        _ = found | DecryptFiles(f"{tmp_path}/opened", key=local_key, relative_to=f"{tmp_path}/sealed")
    assert read_files(tmp_path / "opened") == {"a/x.csv": b"one", "b/x.csv": b"two"}


def test_matches_without_a_folder_keep_their_names(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"d[1]/x[1].csv": b"one"})
    run(EncryptFiles(f"{tmp_path}/sealed", key=local_key), FileMetadata(f"{data}/d[1]/x[1].csv", 3))
    assert listing(tmp_path / "sealed") == with_manifest("x[1].csv")


def test_a_file_named_twice_is_encrypted_once(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a": b"1"})
    results, counters = run(EncryptFiles(f"{tmp_path}/sealed", key=local_key), f"{data}/a", f"{data}/*")
    assert len(results) == counters["files"] == 1


def test_two_sources_of_one_shard_are_an_error_that_names_both(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a/x.csv": b"one", "b/x.csv": b"two"})
    error = fails(EncryptFiles(f"{tmp_path}/sealed", key=local_key), f"{data}/a/x.csv", f"{data}/b/x.csv")
    assert error == (
        "ValueError",
        (
            f"{data}/a/x.csv and {data}/b/x.csv would both become {tmp_path}/sealed/x.csv. "
            "Give relative_to= (--relative-to), a folder above both, or run one job for each"
        ),
    )
    assert listing(tmp_path / "sealed") == []
    transform = EncryptFiles(f"{tmp_path}/sealed", key=local_key, relative_to=str(data))
    run(transform, f"{data}/a/x.csv", f"{data}/b/x.csv")
    assert listing(tmp_path / "sealed") == with_manifest("a/x.csv", "b/x.csv")


def test_a_link_to_a_file_is_encrypted_as_the_file_that_it_points_to(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"real/x": b"one"})
    (data / "link").symlink_to("real/x")
    encrypt(f"{data}/*", tmp_path / "sealed", local_key)
    decrypt(tmp_path / "sealed", tmp_path / "opened", local_key)
    assert read_files(tmp_path / "opened") == {"link": b"one"}
    assert not (tmp_path / "sealed/link").is_symlink()


# --------------------------------------------------------------------------- inputs that cannot be encrypted


def broken_link(data):
    (data / "b").symlink_to("nowhere")


def pipe(data):
    os.mkfifo(data / "b")


def shard_of_ours(data):
    write_files(data, {"b": b"x", "_KEY_FOR_b.json": b"{}"})


def key_file_alone(data):
    write_files(data, {"_KEY_FOR_b.json": b"{}"})


def bad_name(data):
    write_files(os.fsencode(data).decode(), {os.fsdecode(b"\xff"): b"x"})


@pytest.mark.parametrize(
    ("spoil", "name", "message"),
    [
        (broken_link, "OSError", "[Errno 67] the link points to nothing; mend it or leave it out: '{data}/b'"),
        (pipe, "OSError", "[Errno 22] not a regular file (a pipe, socket or device); leave it out: '{data}/b'"),
        (
            shard_of_ours,
            "AlreadyEncryptedError",
            (
                "{data}/_KEY_FOR_b.json is one of our own helper files. "
                "Leave it out of the input pattern, or decrypt it first"
            ),
        ),
        (
            key_file_alone,
            "AlreadyEncryptedError",
            (
                "{data}/_KEY_FOR_b.json is one of our own helper files. "
                "Leave it out of the input pattern, or decrypt it first"
            ),
        ),
        (bad_name, "ValueError", "the name of '{data}/\\udcff' is not valid UTF-8; rename the file"),
    ],
)
def test_an_input_that_cannot_be_encrypted_stops_the_job_before_it_writes(tmp_path, local_key, spoil, name, message):
    data = write_files(tmp_path / "data", {"a": b"1"})
    spoil(data)
    error = fails(EncryptFiles(f"{tmp_path}/sealed", key=local_key), f"{data}/*")
    assert error == (name, message.replace("{data}", str(data)))
    assert listing(tmp_path / "sealed") == []


def test_shards_are_not_encrypted_again(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a": b"1"})
    encrypt(data, tmp_path / "sealed", local_key)
    error = fails(EncryptFiles(f"{tmp_path}/twice", key=local_key), f"{tmp_path}/sealed/a*")
    assert error == (
        "AlreadyEncryptedError",
        (
            f"{tmp_path}/sealed/a is encrypted already (a key file lies beside it). "
            "Leave it out of the input pattern, or decrypt it first"
        ),
    )
    assert listing(tmp_path / "twice") == []


def test_an_output_inside_the_input_stops_the_job_before_it_writes(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a": b"1"})
    for output in (data, data / "sealed"):
        with pytest.raises(ValueError, match="Choose an output folder outside the pattern"):
            encrypt(data, output, local_key, if_exists="overwrite")
    assert read_files(data) == {"a": b"1"}


def test_a_pattern_that_finds_nothing_is_an_error(tmp_path, local_key):
    message = "no file matches; quote a pattern so that the shell leaves it alone, and use ** to look into sub-folders"
    for transform in (EncryptFiles, DecryptFiles):
        error = fails(transform(f"{tmp_path}/out", key=local_key), f"{tmp_path}/*.nothing")
        assert error == ("FileNotFoundError", f"[Errno 2] {message}: '{tmp_path}/*.nothing'")


def test_a_name_with_no_room_for_its_key_files_name_is_an_error(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"n" * 242: b"1"})
    error = fails(EncryptFiles(f"{tmp_path}/sealed", key=local_key), f"{data}/*")
    message = "the name is too long: with its key file's prefix it passes 255 bytes"
    assert error == ("OSError", f"[Errno 36] {message}: '{tmp_path}/sealed/{'n' * 242}'")
    assert listing(tmp_path / "sealed") == []


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a": b"12345"})
    error = fails(EncryptFiles(f"{tmp_path}/sealed", key=local_key), FileMetadata(f"{data}/a", 9))
    assert error == (
        "TruncatedError",
        f"{data}/a became shorter while it was read. Encrypt it again when nobody writes it",
    )
    assert listing(tmp_path / "sealed") == []


def test_a_file_that_vanishes_is_an_error(tmp_path, local_key):
    name, message = fails(EncryptFiles(f"{tmp_path}/sealed", key=local_key), FileMetadata(f"{tmp_path}/gone", 9))
    assert (name, message) == ("FileNotFoundError", f"[Errno 2] No such file or directory: '{tmp_path}/gone'")
    assert listing(tmp_path / "sealed") == []


def test_a_disk_that_fills_up_leaves_nothing_half_made(tmp_path, local_key, monkeypatch):
    data = write_files(tmp_path / "data", {"a": os.urandom(3_000_000)})
    written = [0]
    write = os.write

    def write_until_full(handle, block):
        written[0] += len(block)
        if written[0] > 1_000_000:
            raise OSError(28, "No space left on device")
        return write(handle, block)

    monkeypatch.setattr(os, "write", write_until_full)
    error = fails(EncryptFiles(f"{tmp_path}/sealed", key=local_key), f"{data}/*")
    assert error == ("OSError", f"[Errno 28] No space left on device: '{data}/a' -> '{tmp_path}/sealed/a'")
    assert listing(tmp_path / "sealed") == []

    monkeypatch.undo()
    encrypt(data, tmp_path / "sealed", local_key)
    written[0] = 0
    monkeypatch.setattr(os, "write", write_until_full)
    error = fails(DecryptFiles(f"{tmp_path}/opened", key=local_key), f"{tmp_path}/sealed")
    assert error == ("OSError", f"[Errno 28] No space left on device: '{tmp_path}/sealed/a' -> '{tmp_path}/opened/a'")
    assert listing(tmp_path / "opened") == []


def test_a_source_that_cannot_be_read_to_its_end_leaves_nothing_half_made(tmp_path, local_key, monkeypatch):
    data = write_files(tmp_path / "data", {"a": os.urandom(3_000_000)})

    def blocks(*_arguments):
        yield b"the first block"
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("beam_envelope.transforms.files.blocks", blocks)
    name, message = fails(EncryptFiles(f"{tmp_path}/sealed", key=local_key), f"{data}/*")
    assert (name, message) == ("OSError", f"[Errno 5] Input/output error: '{data}/a' -> '{tmp_path}/sealed/a'")
    assert listing(tmp_path / "sealed") == []


# ------------------------------------------------------------------------------------------- keys and contexts


def test_without_a_keyring_nothing_is_written(tmp_path):
    data = write_files(tmp_path / "data", {"a": b"1"})
    name, message = fails(EncryptFiles(f"{tmp_path}/sealed", key=f"local-kms://{tmp_path}/none.json"), f"{data}/*")
    assert name == "KeyAccessError"
    assert message == (
        f"there is no keyring at {tmp_path}/none.json. "
        f"Make one: beam-envelope keygen --key 'local-kms://{tmp_path}/none.json'"
    )
    assert listing(tmp_path / "sealed") == []


@pytest.fixture(scope="module")
def sealed_once(tmp_path_factory):
    """A key, and shards `a.csv` (of several chunks) and `b.csv` under it."""
    folder = tmp_path_factory.mktemp("sealed_once")
    key = LocalKms(folder / "keyring.json")
    generate_local_key(key)
    write_files(folder / "data", {"a.csv": b"alpha\n" * 10_000, "b.csv": b"beta\n"})
    encrypt(folder / "data", folder / "sealed", key, context=CONTEXT)
    return folder / "sealed", key


@pytest.fixture
def sealed(sealed_once, tmp_path):
    """A copy of those shards, to spoil."""
    shutil.copytree(sealed_once[0], tmp_path / "sealed")
    return tmp_path / "sealed"


@pytest.fixture
def key(sealed_once):
    """The key that they are under."""
    return sealed_once[1]


@pytest.mark.parametrize(
    ("context", "difference"),
    [
        (None, "'dataset' is missing here; 'tenant' is missing here"),
        ({"dataset": "flights"}, "'tenant' is missing here"),
        ({"dataset": "trains", "tenant": "a"}, "'dataset' is 'flights' there and 'trains' here"),
        ({**CONTEXT, "year": "2026"}, "'year' is not there"),
        ({"Dataset": "flights", "tenant": "a"}, "'dataset' is missing here; 'Dataset' is not there"),
    ],
)
def test_another_context_than_the_written_one_is_refused(sealed, key, tmp_path, context, difference):
    for manifest, what in (("ignore", f"{sealed}/a.csv"), ("use", f"section 1 of {sealed}/_MANIFEST.json")):
        transform = DecryptFiles(f"{tmp_path}/opened", key=key, context=context, manifest=manifest)
        assert fails(transform, f"{sealed}/a.csv") == (
            "ContextMismatchError",
            (
                f"{what} was written with another encryption context: {difference}. Give the context that it was "
                "written with (key files show it), or ANY_CONTEXT (--any-context) to accept any"
            ),
        )
    assert listing(tmp_path / "opened") == []


def test_any_context_is_accepted_where_the_caller_says_so(sealed, key, tmp_path):
    decrypt(sealed, tmp_path / "opened", key, context=ANY_CONTEXT)
    assert listing(tmp_path / "opened") == ["a.csv", "b.csv"]


def test_a_foreign_key_opens_nothing(sealed, local_key, tmp_path):
    for manifest, what in (("ignore", f"{sealed}/a.csv"), ("use", f"section 1 of {sealed}/_MANIFEST.json")):
        transform = DecryptFiles(f"{tmp_path}/opened", key=local_key, context=CONTEXT, manifest=manifest)
        name, message = fails(transform, f"{sealed}/a.csv")
        assert name == "WrongKeyError"
        assert re.fullmatch(
            rf"{re.escape(what)} is encrypted under default/[0-9a-f]{{32}}; the keys allowed here are "
            rf"{re.escape(str(local_key))}\. Give one that it is under",
            message,
        )
    assert listing(tmp_path / "opened") == []


# ------------------------------------------------------------------------------------------------ damaged shards


def no_key_file(sealed):
    (sealed / "_KEY_FOR_a.csv.json").unlink()


def plain_file(sealed):
    (sealed / "a.csv").write_bytes(b"year,month\n2013,1\n" * 99)
    (sealed / "_KEY_FOR_a.csv.json").unlink()


def swapped_key_files(sealed):
    ours, other = (sealed / f"_KEY_FOR_{name}.csv.json" for name in "ab")
    text = ours.read_bytes()
    ours.write_bytes(other.read_bytes())
    other.write_bytes(text)


def swapped_shards(sealed):
    (sealed / "a.csv").write_bytes((sealed / "b.csv").read_bytes())


def cut_in_the_last_chunk(sealed):
    os.truncate(sealed / "a.csv", shard_size(60_000) - 1)


def cut_at_a_chunk_border(sealed):
    os.truncate(sealed / "a.csv", 56 + 16_400 * 2)


def cut_to_nothing(sealed):
    os.truncate(sealed / "a.csv", 0)


def flip(position):
    def flip_there(sealed):
        raw = bytearray((sealed / "a.csv").read_bytes())
        raw[position] ^= 1
        (sealed / "a.csv").write_bytes(raw)

    flip_there.__name__ = f"flip_at_{position}"
    return flip_there


def bytes_behind_the_end(sealed):
    with (sealed / "a.csv").open("ab") as stream:
        stream.write(b"x")


def broken_key_file(sealed):
    path = sealed / "_KEY_FOR_a.csv.json"
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (
            no_key_file,
            "KeyFileMissingError",
            "there is no key file _KEY_FOR_a.csv.json beside {sealed}/a.csv; without it",
        ),
        (plain_file, "NotEncryptedError", "{sealed}/a.csv is plain data: it has no key file (_KEY_FOR_a.csv.json)"),
        (swapped_key_files, "WrongKeyError", "{sealed}/a.csv and its key file do not belong together"),
        (swapped_shards, "WrongKeyError", "{sealed}/a.csv and its key file do not belong together"),
        (cut_in_the_last_chunk, "TamperedError", "{sealed}/a.csv was changed after it was written: chunk 3 does not"),
        (cut_at_a_chunk_border, "TruncatedError", "{sealed}/a.csv has 32856 bytes, a size that no whole shard has"),
        (cut_to_nothing, "TruncatedError", "{sealed}/a.csv has 0 bytes, a size that no whole shard has: it was cut"),
        (bytes_behind_the_end, "TamperedError", "{sealed}/a.csv was changed after it was written: chunk 3 does not"),
        (flip(0), "WrongKeyError", "{sealed}/a.csv and its key file do not belong together"),
        (flip(30), "WrongKeyError", "{sealed}/a.csv and its key file do not belong together"),
        (flip(56), "TamperedError", "{sealed}/a.csv was changed after it was written: one of the chunks 0 to 2 does"),
        (flip(-1), "TamperedError", "{sealed}/a.csv was changed after it was written: chunk 3 does not authenticate"),
        (broken_key_file, "FormatError", "the key file of {sealed}/a.csv is not a readable key file: it is not JSON"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_shard_is_a_named_error_and_gives_no_file(sealed, key, tmp_path, damage, name, message):
    damage(sealed)
    error = fails(DecryptFiles(f"{tmp_path}/opened", key=key, context=CONTEXT), f"{sealed}/a.csv")
    assert error[0] == name
    assert error[1].startswith(message.replace("{sealed}", str(sealed)))
    assert listing(tmp_path / "opened") == []


def test_a_plain_file_among_shards_is_not_copied_through(sealed, key, tmp_path):
    write_files(sealed, {"note.txt": b"remember the milk\n"})
    assert fails(DecryptFiles(f"{tmp_path}/opened", key=key, context=CONTEXT), f"{sealed}/*")[0] == "ManifestError"
    assert listing(tmp_path / "opened") == []
    transform = DecryptFiles(f"{tmp_path}/opened", key=key, context=CONTEXT, manifest="ignore")
    assert fails(transform, f"{sealed}/*")[0] == "NotEncryptedError"
    assert not set(listing(tmp_path / "opened")) - {"a.csv", "b.csv"}


# ------------------------------------------------------------------------------------------------ what exists


def test_by_default_nothing_is_written_if_one_output_exists(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a": b"1", "b": b"2"})
    write_files(tmp_path / "sealed", {"b": b"old"})
    error = fails(EncryptFiles(f"{tmp_path}/sealed", key=local_key), f"{data}/*")
    name, message = error
    assert name == "FileExistsError"
    assert message.startswith("[Errno 17] the output exists (1 of 2 do); choose to skip or overwrite it. If the engine")
    assert message.endswith(f"further up in the log, and skip goes on from there: '{tmp_path}/sealed/b'")
    assert read_files(tmp_path / "sealed") == {"b": b"old"}

    encrypt(data, tmp_path / "shards", local_key)
    write_files(tmp_path / "opened", {"b": b"old"})
    error = fails(DecryptFiles(f"{tmp_path}/opened", key=local_key), f"{tmp_path}/shards")
    assert error == (name, message.replace(f"{tmp_path}/sealed/b", f"{tmp_path}/opened/b"))
    assert read_files(tmp_path / "opened") == {"b": b"old"}


def test_overwrite_replaces_the_shard_and_its_key_file(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a": b"old"})
    encrypt(data, tmp_path / "sealed", local_key)
    before = read_files(tmp_path / "sealed")
    write_files(data, {"a": b"new"})
    (result,), _ = encrypt(data, tmp_path / "sealed", local_key, context=CONTEXT, if_exists="overwrite")
    after = read_files(tmp_path / "sealed")
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)
    assert not result.skipped
    write_files(tmp_path / "opened", {"a": b"something else"})
    (opened,), _ = decrypt(tmp_path / "sealed", tmp_path / "opened", local_key, context=CONTEXT, if_exists="overwrite")
    assert read_files(tmp_path / "opened") == {"a": b"new"}
    assert not opened.skipped


def test_skip_leaves_what_is_whole_and_says_so(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a": b"12345"})
    first, _ = encrypt(data, tmp_path / "sealed", local_key, context=CONTEXT)
    before = read_files(tmp_path / "sealed")
    write_files(data, {"b": b"678"})
    again, counters = encrypt(data, tmp_path / "sealed", local_key, context=CONTEXT, if_exists="skip")
    assert again[0] == first[0]._replace(skipped=True)
    assert [result.skipped for result in again] == [True, False]
    assert (counters["files_skipped"], counters["bytes_skipped"], counters["files"]) == (1, 5, 1)
    assert before.pop("_MANIFEST.json") != (tmp_path / "sealed/_MANIFEST.json").read_bytes()  # it lists b now
    assert before.items() <= read_files(tmp_path / "sealed").items()
    before = read_files(tmp_path / "sealed")
    encrypt(data, tmp_path / "sealed", local_key, context=CONTEXT, if_exists="skip")
    assert read_files(tmp_path / "sealed") == before


def opens(sealed, name, key, context=None):
    """Return the plaintext of a shard."""
    with open_shard(sealed / name, key=key, context=context) as shard:
        return shard.read()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda sealed: os.truncate(sealed / "a", 60_000),
        lambda sealed: os.truncate(sealed / "a", 0),
        lambda sealed: (sealed / "_KEY_FOR_a.json").unlink(),
        lambda sealed: (sealed / "_KEY_FOR_a.json").write_bytes(b"{}"),
        lambda sealed: os.truncate(sealed / "_KEY_FOR_a.json", 100),
        lambda sealed: (sealed / "a").unlink(),
    ],
    ids=["cut", "emptied", "no key file", "another key file", "key file cut", "no shard"],
)
def test_skip_trusts_nothing_that_is_not_whole(tmp_path, local_key, spoil):
    data = write_files(tmp_path / "data", {"a": b"alpha" * 20_000})
    encrypt(data, tmp_path / "sealed", local_key)
    spoil(tmp_path / "sealed")
    (result,), _ = encrypt(data, tmp_path / "sealed", local_key, if_exists="skip")
    assert not result.skipped
    assert opens(tmp_path / "sealed", "a", local_key) == b"alpha" * 20_000


def test_skip_encrypts_again_what_changed_its_size_or_should_be_compressed(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a": b"old"})
    encrypt(data, tmp_path / "sealed", local_key)
    write_files(data, {"a": b"new and longer"})
    (result,), _ = encrypt(data, tmp_path / "sealed", local_key, if_exists="skip")
    assert not result.skipped
    assert opens(tmp_path / "sealed", "a", local_key) == b"new and longer"
    (result,), _ = encrypt(data, tmp_path / "sealed", local_key, if_exists="skip", compression="zstd")
    assert not result.skipped
    (result,), _ = encrypt(data, tmp_path / "sealed", local_key, if_exists="skip", compression="zstd")
    assert result.skipped
    assert opens(tmp_path / "sealed", "a", local_key) == b"new and longer"


def test_skip_encrypts_again_what_the_manifest_lists_as_another_shard(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a": b"old", "b": b"old"})
    sealed = tmp_path / "sealed"
    encrypt(data, sealed, local_key)
    before = (sealed / "_MANIFEST.json").read_bytes()
    encrypt(data / "a", sealed, local_key, if_exists="overwrite")
    (sealed / "_MANIFEST.json").write_bytes(before)  # as if that job had been killed before its end
    assert fails(DecryptFiles(f"{tmp_path}/opened", key=local_key), str(sealed))[0] == "ManifestError"
    results, _ = encrypt(data, sealed, local_key, if_exists="skip")
    assert [result.skipped for result in results] == [False, True]
    decrypt(sealed, tmp_path / "opened", local_key)
    assert read_files(tmp_path / "opened") == {"a": b"old", "b": b"old"}
    assert all(result.skipped for result in encrypt(data, sealed, local_key, if_exists="skip").results)


def test_skip_refuses_a_shard_of_another_context(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a": b"1"})
    encrypt(data, tmp_path / "sealed", local_key, context=CONTEXT)
    before = read_files(tmp_path / "sealed")
    error = fails(EncryptFiles(f"{tmp_path}/sealed", key=local_key, if_exists="skip"), str(data))
    assert error == (
        "ContextMismatchError",
        f"{tmp_path}/sealed/a exists and belongs to another dataset: its context is {CONTEXT}. Choose another output",
    )
    assert read_files(tmp_path / "sealed") == before


def test_decrypting_with_skip_leaves_files_of_the_right_size_and_makes_the_others(sealed, key, tmp_path):
    write_files(tmp_path / "opened", {"a.csv": b"x" * 59_999})
    decrypt(f"{sealed}/*", tmp_path / "opened", key, context=CONTEXT, if_exists="skip")
    assert read_files(tmp_path / "opened") == {"a.csv": b"alpha\n" * 10_000, "b.csv": b"beta\n"}
    results, counters = decrypt(f"{sealed}/*", tmp_path / "opened", key, context=CONTEXT, if_exists="skip")
    assert [result.skipped for result in results] == [True, True]
    assert (counters["files_skipped"], counters["bytes_skipped"]) == (2, shard_size(60_000) + shard_size(5))


# ----------------------------------------------------------------------------------------------- what is told


def test_results_tell_what_became_of_what(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"sub/a": b"12345"})
    (sealed,), counters = encrypt(data, tmp_path / "sealed", local_key)
    key_file = KeyFile.from_bytes((tmp_path / "sealed/sub/_KEY_FOR_a.json").read_bytes(), "")
    key_id = key_file.data_keys[0].key_id.hex()
    shard = f"{tmp_path}/sealed/sub/a"
    assert sealed == EncryptedFile(
        f"{data}/sub/a", shard, f"{tmp_path}/sealed/sub/_KEY_FOR_a.json", 5, shard_size(5), key_id, skipped=False,
        shard_id=key_file.shard_id.hex,
    )  # fmt: skip
    assert key_file.name == "a"
    assert counters == {
        "files": 1,
        "bytes_plaintext": 5,
        "bytes_ciphertext": shard_size(5),
        "kms_GenerateDataKey": 2,  # one of them for the manifest
    }
    (opened,), counters = decrypt(tmp_path / "sealed", tmp_path / "opened", local_key)
    assert opened == DecryptedFile(shard, f"{tmp_path}/opened/sub/a", 5, shard_size(5), key_id, skipped=False)
    assert counters == {"files": 1, "bytes_plaintext": 5, "bytes_ciphertext": shard_size(5), "kms_Decrypt": 2}


def test_results_are_rows_for_the_steps_that_follow(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a": b"12345", "b": b"678"})
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        sealed = pipeline | beam.Create([f"{data}/*"]) | EncryptFiles(f"{tmp_path}/sealed", key=local_key)
        opened = sealed | beam.Map(lambda result: result.shard) | DecryptFiles(f"{tmp_path}/opened", key=local_key)
        assert sealed.element_type == EncryptedFile
        assert opened.element_type == DecryptedFile
        total = opened | beam.GroupBy().aggregate_field("plaintext_bytes", sum, "total")
        _ = total | beam.Map(lambda row: Path(f"{tmp_path}/total").write_text(str(row.total)))
    assert (tmp_path / "total").read_text() == "8"


def test_display_data_shows_the_settings_but_no_value_of_the_context(local_key):
    sealing = EncryptFiles("sealed", key=local_key, context={"tenant": "acme-corp"}, compression="zstd")
    opening = DecryptFiles("opened", key=local_key, context={"tenant": "acme-corp"}, if_exists="skip")
    shown = {item.key: item.value for item in DisplayData.create_from(sealing).items}
    assert shown == {
        "output": "sealed/",
        "if_exists": "error",
        "key": str(local_key),
        "context": "tenant",
        "compression": "zstd",
    }
    shown = {item.key: item.value for item in DisplayData.create_from(opening).items}
    assert shown == {"output": "opened/", "if_exists": "skip", "key": str(local_key), "context": "tenant"}
    anything = DisplayData.create_from(DecryptFiles("opened", key=local_key, context=ANY_CONTEXT)).items
    assert {item.key: item.value for item in anything}["context"] == "any"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"key": "kms://x"}, FormatError, "the key 'kms://x' does not start with a scheme that is known"),
        ({"key": []}, ValueError, "no key was given"),
        ({"context": {"a": 1}}, TypeError, "an encryption context maps strings to strings; 'a' maps to a int"),
        ({"context": {"aws:x": "1"}}, ValueError, "starts with 'aws:', which AWS reserves"),
        ({"compression": "gzip"}, ValueError, "compression is one of none, zstd, not 'gzip'"),
        ({"if_exists": "replace"}, ValueError, "if_exists is one of error, skip, overwrite, not 'replace'"),
        ({"split_lines": "big"}, ValueError, "'big' is not a size"),
    ],
)
def test_wrong_arguments_are_refused_when_the_pipeline_is_built(settings, error, message):
    with pytest.raises(error, match=re.escape(message)):
        EncryptFiles("sealed", **{"key": "local-kms://k.json", **settings})


# ----------------------------------------------------------------------------------------------- dead letters

_failed = []


def _keep_failed(row):
    _failed.append(row)


def run_with_handler(transform, *sources):
    """Run a transform with an error handler; return what it let through and what it sent to the handler."""
    _failed.clear()
    running._results.clear()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        with CollectingErrorHandler() as handler:
            done = pipeline | beam.Create(sources) | transform.with_error_handler(handler)
        _ = done | "Keep" >> beam.Map(running._keep)
        _ = handler.output() | "Keep failed" >> beam.Map(_keep_failed)
    return sorted(running._results), sorted(_failed)


def test_bad_shards_go_to_the_error_handler_and_the_good_ones_land(sealed, key, tmp_path):
    write_files(sealed, {"note.txt": b"remember the milk\n", "orphan": os.urandom(500)})
    flip(60)(sealed)
    for manifest, note, orphan in (
        ("ignore", "NotEncryptedError", "KeyFileMissingError"),
        ("use", "ManifestError", "ManifestError"),  # neither is listed
    ):
        opening = DecryptFiles(f"{tmp_path}/{manifest}", key=key, context=CONTEXT, manifest=manifest)
        done, failed = run_with_handler(opening, f"{sealed}/*")
        assert [Path(result.output).name for result in done] == ["b.csv"]
        assert read_files(tmp_path / manifest) == {"b.csv": b"beta\n"}
        assert [(Path(row.source).name, row.error) for row in failed] == [
            ("a.csv", "TamperedError"),
            ("note.txt", note),
            ("orphan", orphan),
        ]
        assert all(type(row) is FailedFile and row.source in row.message for row in failed)


def test_sources_that_fail_go_to_the_error_handler_without_their_data(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a": b"CANARY-1", "b": b"CANARY-2", "_KEY_FOR_b.json": b"{}"})
    sources = [f"{data}/a", f"{data}/b", f"{tmp_path}/none*", FileMetadata(f"{data}/gone", 7)]
    done, failed = run_with_handler(EncryptFiles(f"{tmp_path}/sealed", key=local_key), *sources)
    assert [Path(result.source).name for result in done] == ["a"]
    assert listing(tmp_path / "sealed") == with_manifest("a")
    assert [(Path(row.source).name, row.error) for row in failed] == [
        ("b", "AlreadyEncryptedError"),
        ("gone", "FileNotFoundError"),
        ("none*", "FileNotFoundError"),
    ]
    assert "CANARY" not in str(failed)


def test_the_second_use_of_a_name_key_file_and_all_is_told_by_the_shard_not_the_handler(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a": b"1"})
    (result,), failed = run_with_handler(EncryptFiles(f"{tmp_path}/sealed", key=local_key), f"{data}/a", f"{data}/a")
    assert Path(result.key_file).name == key_file_name("a")
    assert failed == []


@pytest.mark.parametrize("refuse", ["Decrypt", "throttle"])
def test_errors_of_the_kms_fail_the_job_and_are_no_dead_letters(tmp_path, fake_kms, refuse):
    data = write_files(tmp_path / "data", {"a": b"1"})
    key = f"aws-kms://{fake_kms.create_key()}"
    encrypt(data, tmp_path / "sealed", key)
    name = "KeyAccessError"
    if refuse == "throttle":
        fake_kms.fail(1000, "KMSInvalidStateException", 400)
    else:
        fake_kms.deny("Decrypt")
    with pytest.raises(Exception, match="kms") as caught:  # which one is asserted below
        run_with_handler(DecryptFiles(f"{tmp_path}/opened", key=key), f"{tmp_path}/sealed")
    assert type(caught.value).__name__ == name
    assert _failed == []
    assert listing(tmp_path / "opened") == []


# --------------------------------------------------------------------------------------------------- KMS calls


def test_a_hundred_files_in_a_bundle_take_two_calls_and_reading_them_two_more(tmp_path, fake_kms):
    key = f"aws-kms://{fake_kms.create_key('etl')}"
    data = write_files(tmp_path / "data", {f"{number:03}": b"%d" % number for number in range(100)})
    results, counters = encrypt(data, tmp_path / "sealed", key, context=CONTEXT)
    assert len({result.key_id for result in results}) == 1
    assert (counters["files"], counters["kms_GenerateDataKey"]) == (100, 2)  # for the files, and for the manifest
    assert fake_kms.calls == {"GenerateDataKey": 2}
    _, counters = decrypt(tmp_path / "sealed", tmp_path / "opened", key, context=CONTEXT)
    assert (counters["files"], counters["kms_Decrypt"]) == (100, 2)
    assert fake_kms.calls == {"GenerateDataKey": 2, "Decrypt": 2}
    encrypt(data, tmp_path / "unlisted", key, context=CONTEXT, manifest=False)
    decrypt(tmp_path / "unlisted", tmp_path / "opened too", key, context=CONTEXT)
    assert fake_kms.calls == {"GenerateDataKey": 2 + 1, "Decrypt": 2 + 1}


def test_each_bundle_has_its_own_data_key(tmp_path, fake_kms):
    key = f"aws-kms://{fake_kms.create_key('etl')}"
    data = write_files(tmp_path / "data", {"a": b"1"})
    for number in range(2):
        encrypt(data, tmp_path / f"sealed-{number}", key)
    assert fake_kms.calls == {"GenerateDataKey": 4}  # one of each job's two for its manifest


def test_the_bundles_of_a_worker_share_a_data_key_if_the_policy_says_so(tmp_path, fake_kms):
    key = f"aws-kms://{fake_kms.create_key('etl')}"
    data = write_files(tmp_path / "data", {"a": b"1"})
    policy = DataKeyPolicy(reuse="worker")
    ids = {encrypt(data, tmp_path / f"sealed-{n}", key, policy=policy).results[0].key_id for n in range(3)}
    assert (len(ids), fake_kms.calls) == (1, {"GenerateDataKey": 1 + 3})  # each of the three manifests has its own
    encrypt(data, tmp_path / "other", key, policy=policy, context=CONTEXT)  # another context: another data key
    assert fake_kms.calls == {"GenerateDataKey": 2 + 4}


@pytest.mark.parametrize("policy", [DataKeyPolicy(max_records=10), DataKeyPolicy(max_bytes=100)])
def test_a_data_key_is_replaced_when_its_limit_is_met(tmp_path, local_key, policy):
    data = write_files(tmp_path / "data", {f"{number:02}": b"ten bytes." for number in range(25)})
    results, counters = encrypt(data, tmp_path / "sealed", local_key, policy=policy)
    ids = [result.key_id for result in results]
    assert counters["kms_GenerateDataKey"] == len(set(ids)) + 1 == 4  # and one for the manifest
    assert max(map(ids.count, ids)) == 10
    decrypt(tmp_path / "sealed", tmp_path / "opened", local_key)
    assert set(read_files(tmp_path / "opened").values()) == {b"ten bytes."}


def test_any_one_of_several_keys_opens_the_shards(tmp_path, fake_kms, local_key):
    keys = [f"aws-kms://{fake_kms.create_key(name)}" for name in ("here", "there")] + [local_key]
    data = write_files(tmp_path / "data", {"a": b"1", "b": b"2"})
    encrypt(data, tmp_path / "sealed", keys, context=CONTEXT)
    assert fake_kms.calls == {"GenerateDataKey": 2, "Encrypt": 2}  # of the files, and of the manifest
    fake_kms.disable_key("alias/here")
    for number, key in enumerate([keys[1], keys[2], [keys[0], keys[1]]]):
        decrypt(tmp_path / "sealed", tmp_path / f"opened-{number}", key, context=CONTEXT)
        assert read_files(tmp_path / f"opened-{number}") == {"a": b"1", "b": b"2"}
    name, _ = fails(DecryptFiles(f"{tmp_path}/no", key=keys[0], context=CONTEXT), f"{tmp_path}/sealed")
    assert name == "KeyAccessError"
