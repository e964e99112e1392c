"""The command without --key and --context: from its pass-through options, then from the environment."""

import json

import pytest

from beam_envelope import cli
from beam_envelope.keys.local import LocalKms, generate_local_key
from tests.running import read_files, write_files


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """Run the command in a folder that holds `data`: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    write_files("data", {"a.csv": b"alpha\n"})

    def run_words(*words):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as ended:
            status = ended.code
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return run_words


@pytest.fixture
def other_key(tmp_path):
    key = LocalKms(tmp_path / "other.json")
    generate_local_key(key)
    return key


def contexts_and_keys(run):
    status, out, err = run("inspect", "sealed", "--json")
    assert status == 0, err
    (entry,) = json.loads(out)
    return entry["context"], entry["kms_keys"]


def test_options_behind_the_command_hold_and_its_own_arguments_come_first(run, local_key, other_key):
    ours = (f"--envelope_key={local_key}", "--envelope_context=from=option")
    assert run("encrypt", "data", "--output", "sealed", *ours)[0] == 0
    context, (kms_key,) = contexts_and_keys(run)
    assert context == {"from": "option"}
    assert run("decrypt", "sealed", "--output", "opened", *ours)[0] == 0
    assert read_files("opened") == {"a.csv": b"alpha\n"}
    assert run("cat", "sealed/*", *ours)[:2] == (0, "alpha\n")
    assert run("verify", "sealed", *ours)[0] == 0
    assert run("verify", "sealed", f"--envelope_key={local_key}", "--envelope_any_context")[0] == 0
    assert run("verify", "sealed", f"--envelope_key={local_key}", "--envelope_context=from=x")[0] == 1
    words = ("--output", "sealed", "--if-exists=overwrite", "--key", other_key, "--context", "from=argument", *ours)
    assert run("encrypt", "data", *words)[0] == 0
    context, (other,) = contexts_and_keys(run)
    assert context == {"from": "argument"}
    assert other != kms_key


def test_the_environment_holds_where_nothing_else_is_said(run, local_key, other_key, monkeypatch):
    monkeypatch.setenv("BEAM_ENVELOPE_KEY", f"{local_key} {other_key}")
    monkeypatch.setenv("BEAM_ENVELOPE_CONTEXT", "from=environment")
    assert run("encrypt", "data", "--output", "sealed")[0] == 0
    context, kms_keys = contexts_and_keys(run)
    assert (context, len(kms_keys)) == ({"from": "environment"}, 2)
    assert run("cat", "sealed/*", "--key", other_key)[:2] == (0, "alpha\n")
    assert run("cat", "sealed/*", "--key", other_key, "--context", "from=x")[0] == 1


def test_without_a_key_anywhere_it_says_where_to_give_one(run):
    status, _, err = run("encrypt", "data", "--output", "sealed")
    assert status == 2
    said = " ".join(err.split())
    assert "no key is set: pass key='aws-kms://alias/NAME' (--key), give --envelope_key=aws-kms://alias/NAME" in said
    assert run("cat", "sealed", "--envelope_key=kms://a")[0] == 2


def test_a_misspelt_option_of_ours_is_told(run, local_key):
    status, _, err = run("encrypt", "data", "--output", "sealed", f"--envelope_keys={local_key}")
    assert status == 2
    assert "unknown option --envelope_keys" in err
