"""pipelines/decrypt.py: a Beam program that a runner takes."""

import pytest
from apache_beam.runners.runner import PipelineState

from beam_envelope import ContextMismatchError
from pipelines import decrypt
from tests.running import encrypt, listing, read_files, write_files

IN_MEMORY = "--direct_running_mode=in_memory"
CONTENTS = {"a": b"1", "sub/b": b"2"}


@pytest.fixture
def words(tmp_path, local_key):
    """The command line for shards of the context `dataset=x`."""
    encrypt(write_files(tmp_path / "data", CONTENTS), tmp_path / "sealed", local_key, context={"dataset": "x"})
    return [f"{tmp_path}/sealed", "--output", f"{tmp_path}/opened", "--key", str(local_key), IN_MEMORY]


def test_it_decrypts_and_returns_the_jobs_result(tmp_path, words):
    result = decrypt.run([*words, "--context", "dataset=x"])
    assert result.wait_until_finish() == PipelineState.DONE
    assert read_files(tmp_path / "opened") == CONTENTS


def test_any_context_is_a_word_of_its_own(tmp_path, words):
    decrypt.run([*words, "--any-context"])
    assert read_files(tmp_path / "opened") == CONTENTS


def test_it_fails_as_the_transform_does(tmp_path, words):
    with pytest.raises(ContextMismatchError, match="was written with another encryption context"):
        decrypt.run(words)
    assert listing(tmp_path / "opened") == []
