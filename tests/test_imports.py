"""What an import brings in: Beam takes seconds, so only what needs it may load it."""

import subprocess
import sys

import pytest

import beam_envelope


def loaded_by(program, *arguments):
    """Return the modules that a program has loaded at its end; what it prints goes to stderr."""
    tail = "\nfinally:\n    print(*sys.modules)"
    body = "\n".join(f"    {line}" for line in program.splitlines())
    script = f"import sys\nsys.path[:0] = {sys.path!r}\ntry:\n{body}{tail}"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_shards_keys_and_formats_are_there_without_beam():
    modules = loaded_by(
        "import beam_envelope, beam_envelope.testing\n"
        "from beam_envelope import AwsKms, LocalKms, create_shard, open_key, open_shard\n"
        "open_key('aws-kms://alias/etl')"
    )
    assert "beam_envelope.formats.shard" in modules
    assert modules.isdisjoint({"apache_beam", "pyarrow", "rich"})


@pytest.mark.parametrize("words", [["--help"], ["encrypt", "--help"], ["decrypt", "-h"], ["--version"], []])
def test_help_answers_without_loading_beam(words, monkeypatch, capsys):
    # In one process: what matters is which of our modules it asks for, and `commands` is the one that needs Beam.
    modules = dict(sys.modules)
    monkeypatch.setitem(sys.modules, "beam_envelope.commands", None)  # an import of it fails
    from beam_envelope import cli

    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0
    assert "beam-envelope" in capsys.readouterr().out
    assert modules.keys() <= sys.modules.keys()


def test_help_of_the_command_loads_no_beam(tmp_path):
    program = (
        "import contextlib, io\n"
        "from beam_envelope import cli\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    cli.main(['decrypt', '--help'])\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    assert cli.main(['keygen', '--key', 'local-kms://{tmp_path}/k.json']) == 0"
    )
    modules = loaded_by(program)
    assert "beam_envelope.arguments" in modules
    assert modules.isdisjoint({"apache_beam", "pyarrow"})


def test_every_public_name_is_there():
    for name in beam_envelope.__all__:
        assert getattr(beam_envelope, name) is not None
    assert sorted(beam_envelope.__all__) == beam_envelope.__all__


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'beam_envelope' has no attribute 'EncryptFile'$"):
        _ = beam_envelope.EncryptFile
