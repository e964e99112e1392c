"""pipelines/encrypt.py: a Beam program that a runner takes."""

import pytest
from apache_beam.runners.runner import PipelineState

from beam_envelope import open_shard
from pipelines import encrypt
from tests.running import listing, with_manifest, write_files

IN_MEMORY = "--direct_running_mode=in_memory"


def test_it_encrypts_and_returns_the_jobs_result(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"a": b"1", "sub/b": b"2"})
    words = ["--output", f"{tmp_path}/sealed", "--key", str(local_key), "--context", "dataset=x", "--compression=zstd"]
    result = encrypt.run([str(data), *words, IN_MEMORY])
    assert result.wait_until_finish() == PipelineState.DONE
    assert listing(tmp_path / "sealed") == with_manifest("a", "sub/b")
    with open_shard(tmp_path / "sealed/a", key=local_key, context={"dataset": "x"}) as shard:
        assert shard.read() == b"1"


def test_a_misspelt_option_stops_it(tmp_path, local_key, capsys):
    data = write_files(tmp_path / "data", {"a": b"1"})
    words = ["--output", f"{tmp_path}/sealed", "--key", str(local_key), "--contexts", "dataset=x"]
    with pytest.raises(SystemExit) as ended:
        encrypt.run([str(data), *words, IN_MEMORY])
    assert ended.value.code == 2
    assert "unknown option --contexts: did you mean --context?" in capsys.readouterr().err
    assert listing(tmp_path / "sealed") == []


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        encrypt.run(["--help"])
    assert ended.value.code == 0
    assert "python -m pipelines.encrypt 'data/*.csv' --output sealed/" in capsys.readouterr().out
