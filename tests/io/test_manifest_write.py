"""How the results of a job wait for its manifest: all of them in one worker, in little memory."""

import os
import pickle
import tracemalloc

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from beam_envelope import EncryptFiles
from beam_envelope.formats.manifest import Manifest, ManifestEntry
from beam_envelope.io.manifest import WrittenShard
from beam_envelope.io.manifest_write import _Gathered, _GatherFn
from beam_envelope.settings import Settings
from beam_envelope.transforms.plan import EncryptedFile

BLOCK = 500


def listed(number, key):
    """Return what a job says of one file."""
    name = f"s3://sealed/2026/{number:07}.csv"
    shard_id = os.urandom(16).hex()
    result = EncryptedFile(
        f"s3://raw/2026/{number:07}.csv", name, f"{name}.key.json", 1000 + number, 1100 + number, "6b" * 16,
        skipped=False, shard_id=shard_id,
    )  # fmt: skip
    entry = ManifestEntry(shard_id, 1100 + number, 1000 + number)
    return result, WrittenShard(name, entry), Settings((key,), {"dataset": "people"})


def travelled(gathered):
    """Return what another worker gets."""
    return pickle.loads(pickle.dumps(gathered))


@pytest.mark.parametrize("number", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_all_results_come_out_once_and_in_order(number, local_key):
    combine = _GatherFn()
    results = [listed(each, local_key) for each in range(number)]
    parts = []
    for start in range(3):  # of three bundles
        part = combine.create_accumulator()
        for each in results[start::3]:
            part = combine.add_input(part, each)
        parts.append(travelled(combine.compact(part) if start else part))  # not every engine compacts
    whole = travelled(combine.extract_output(combine.merge_accumulators(parts)))
    assert sorted(whole, key=lambda each: each[1].path) == results
    assert list(whole) == list(whole)


def test_a_result_takes_few_bytes(local_key):
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        gathered = _Gathered()
        for number in range(20 * BLOCK):
            gathered.add(listed(number, local_key))
        gathered.close()
        after, peak = tracemalloc.get_traced_memory()
        took = after - before
        tracemalloc.reset_peak()
        assert sum(1 for _ in gathered) == 20 * BLOCK
        _, reading = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert took < 100 * 20 * BLOCK
    assert peak - before < took + 2_000_000  # one block of objects
    assert reading - after < 2_000_000
    assert len(pickle.dumps(gathered)) < 100 * 20 * BLOCK


def test_a_job_of_more_than_a_block_lists_all_and_returns_all(tmp_path, local_key, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()
    names = {f"{number:04}" for number in range(BLOCK + 3)}
    for name in names:
        (tmp_path / "raw" / name).write_text(name)

    def write(result):
        (tmp_path / "results" / result.source[-4:]).touch(exist_ok=False)

    (tmp_path / "results").mkdir()
    with beam.Pipeline("FnApiRunner", options=PipelineOptions([])) as p:
        results = p | beam.Create(["raw/*"]) | EncryptFiles("sealed", key=local_key, context={"dataset": "people"})
        _ = results | beam.Map(write)
    assert set(os.listdir("results")) == names
    manifest = Manifest.from_bytes((tmp_path / "sealed/_MANIFEST.json").read_bytes(), "it")
    assert [set(section.shards) for section in manifest.sections] == [names]
