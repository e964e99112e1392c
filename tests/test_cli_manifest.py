"""`beam-envelope manifest`: it shows how list and folder differ, and changes the list only as it is told."""

import json
import os
import shutil
from pathlib import Path

import pytest
from apache_beam.io.filesystems import FileSystems

from beam_envelope import DecryptFiles, LocalKms, cli
from beam_envelope.formats.manifest import Manifest
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.local import generate_local_key
from tests.running import encrypt, fails, write_files
from tests.running import run as run_transform

CONTEXT = {"dataset": "flights"}
KEY, OTHER = "local-kms://keyring.json?name=ours", "local-kms://keyring.json?name=theirs"
OURS = ("--key", KEY, "--context", "dataset=flights")


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """Run `manifest` in this process, in a folder with shards in `sealed`: exit status, stdout, stderr."""
    monkeypatch.setattr(FileSystems, "_pipeline_options", FileSystems._pipeline_options)
    monkeypatch.chdir(tmp_path)
    for name in ("ours", "theirs"):
        generate_local_key(LocalKms("keyring.json", name))
    encrypt(
        write_files("data", {"a.csv": b"alpha", "b.csv": b"beta", "sub/c.csv": b""}), "sealed", KEY, context=CONTEXT
    )

    def run_words(*words):
        clear_caches()
        status = cli.main(["manifest", "sealed", *words])
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return run_words


def sections():
    return Manifest.from_bytes(Path("sealed/_MANIFEST.json").read_bytes(), "it").sections


def remove(name):
    folder, base = os.path.split(f"sealed/{name}")
    os.remove(f"{folder}/{base}")
    os.remove(f"{folder}/_KEY_FOR_{base}.json")


def copy_shard(name, to):
    shutil.copy(f"sealed/{name}", f"sealed/{to}")
    shutil.copy(f"sealed/_KEY_FOR_{name}.json", f"sealed/_KEY_FOR_{to}.json")


def test_a_folder_that_agrees(run):
    before = Path("sealed/_MANIFEST.json").read_bytes()
    assert run(*OURS) == (0, "3 shards are listed and there.\n", "")
    assert Path("sealed/_MANIFEST.json").read_bytes() == before


def test_differences_are_shown_and_nothing_is_changed(run):
    remove("sub/c.csv")
    encrypt(write_files("more", {"[red]d": b"delta"}), "sealed", KEY, context=CONTEXT, manifest=False)
    before = Path("sealed/_MANIFEST.json").read_bytes()
    status, out, err = run(*OURS)
    assert status == 1
    assert [line.split() for line in out.splitlines()] == [
        ["file"],
        ["sealed/[red]d", "not", "listed"],
        ["sealed/sub/c.csv", "not", "there"],
        ["2", "shards", "are", "listed", "and", "there."],
    ]
    assert err == "The list and the folder differ; --add and --forget make the list agree.\n"
    assert Path("sealed/_MANIFEST.json").read_bytes() == before


def test_what_was_removed_on_purpose_is_forgotten_and_readers_are_content(run):
    remove("a.csv")
    status, out, err = run(*OURS, "--forget")
    assert (status, out, err) == (0, "2 shards are listed and there, 1 taken from the list.\n", "")
    assert sections()[-1].shards == {"a.csv": None}
    assert run(*OURS)[0] == 0


def test_what_another_program_wrote_is_added_if_the_key_opens_it(run):
    encrypt(write_files("more", {"d": b"delta"}), "sealed", KEY, context=CONTEXT, manifest=False)
    assert run(*OURS, "--add") == (0, "3 shards are listed and there, 1 added.\n", "")
    assert list(sections()[-1].shards) == ["d"]
    encrypt(write_files("even more", {"e": b"epsilon"}), "sealed", OTHER, context=CONTEXT, manifest=False)
    status, _, err = run(*OURS, "--add")
    assert (status, "sealed/e is not taken for a shard of this dataset" in err) == (1, True)
    assert len(sections()) == 2


def test_a_folder_without_a_manifest_gets_one(run):
    os.remove("sealed/_MANIFEST.json")
    assert run(*OURS)[0] == 1
    assert run(*OURS, "--add")[:2] == (0, "0 shards are listed and there, 3 added.\n")
    assert sorted(sections()[0].shards) == ["a.csv", "b.csv", "sub/c.csv"]


def test_a_plain_file_is_not_added(run):
    write_files("sealed", {"notes.txt": b"plain words that are longer than a header of a shard, which has 56 bytes"})
    status, _, err = run(*OURS, "--add")
    assert (status, "sealed/notes.txt" in err) == (1, True)


def test_a_shard_in_the_place_of_another_is_refused_whatever_is_asked(run):
    copy_shard("a.csv", "b.csv")
    before = Path("sealed/_MANIFEST.json").read_bytes()
    for words in ((), ("--add",), ("--forget",), ("--add", "--forget", "--compact")):
        status, _, err = run(*OURS, *words)
        assert (status, "sealed/b.csv is not the shard that its manifest lists" in err) == (1, True)
    assert Path("sealed/_MANIFEST.json").read_bytes() == before


def test_compact_makes_one_section_and_drops_what_was_forgotten(run):
    encrypt(write_files("more", {"d": b"delta"}), "sealed", KEY, context=CONTEXT)
    remove("a.csv")
    status, out, _ = run(*OURS, "--forget", "--compact")
    assert (status, out.endswith("1 taken from the list, 3 sections made one.\n")) == (0, True)
    assert [sorted(section.shards) for section in sections()] == [["b.csv", "d", "sub/c.csv"]]
    assert run(*OURS)[0] == 0


def test_compact_refuses_what_the_key_does_not_open(run):
    encrypt(write_files("more", {"d": b"delta"}), "sealed/other", OTHER, context=CONTEXT)
    before = Path("sealed/_MANIFEST.json").read_bytes()
    status, _, err = run(*OURS, "--compact")
    assert (status, "section 2 of" in err) == (1, True)
    assert Path("sealed/_MANIFEST.json").read_bytes() == before


def test_a_nested_manifest_keeps_what_is_below_it(run):
    os.remove("sealed/_MANIFEST.json")
    encrypt(write_files("more", {"d": b"delta", "e": b""}), "sealed/day=1", KEY, context=CONTEXT)
    assert run(*OURS, "--add")[0] == 0
    remove("day=1/d")
    assert run(*OURS)[0] == 1
    assert run(*OURS, "--forget")[0] == 0
    assert run(*OURS)[0] == 0
    assert "day=1/d" not in sections()[-1].shards
    nested = Manifest.from_bytes(Path("sealed/day=1/_MANIFEST.json").read_bytes(), "it")
    assert nested.sections[-1].shards == {"d": None}


def test_json_has_the_names(run):
    remove("a.csv")
    status, out, _ = run(*OURS, "--forget", "--json")
    assert (status, json.loads(out)) == (
        0,
        {
            "listed": 2,
            "not_listed": [],
            "not_there": ["sealed/a.csv"],
            "added": 0,
            "compacted_sections": 0,
            "forgotten": 1,
        },
    )


def test_readers_say_which_command_helps(run):
    remove("a.csv")
    name, message = fails(DecryptFiles("out", key=KEY, context=CONTEXT), "sealed/*.csv")
    assert (name, "beam-envelope manifest --forget" in message) == ("ManifestError", True)
    assert run(*OURS, "--forget")[0] == 0
    assert [
        result.shard for result in run_transform(DecryptFiles("out", key=KEY, context=CONTEXT), "sealed/*.csv").results
    ] == ["sealed/b.csv"]
