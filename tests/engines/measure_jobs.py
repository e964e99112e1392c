"""The jobs that `measure.py` times, each with its like without encryption. As a program it runs one of them."""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import apache_beam as beam
from apache_beam.io import fileio
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineState

from beam_envelope import EncryptFiles, EncryptRecords, WriteEncryptedText, jobs
from tests.engines.branches import to_base64, utf8

KEY = "aws-kms://alias/etl"


def _copy(file, output):
    target = Path(output, Path(file.path).name)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file.path, target)
    return str(target)


def _lines(begin, data):
    return begin | beam.io.ReadFromText(f"{data}/*") | beam.Reshuffle()


def copy_files(begin, data, output, shards):
    """Files, copied."""
    files = begin | fileio.MatchFiles(f"{data}/*") | beam.Reshuffle()
    return files | "Copy" >> beam.Map(_copy, output)


def encrypt_files(begin, data, output, shards):
    """EncryptFiles."""
    return begin | beam.Create([f"{data}/*"]) | EncryptFiles(output, key=KEY, if_exists="overwrite")


def plain_text(begin, data, output, shards):
    """Beam's WriteToText."""
    return _lines(begin, data) | beam.io.WriteToText(f"{output}/part", num_shards=shards)


def encrypted_text(begin, data, output, shards):
    """WriteEncryptedText."""
    return _lines(begin, data) | WriteEncryptedText(f"{output}/part", key=KEY, num_shards=shards)


def plain_records(begin, data, output, shards):
    """Records in base64."""
    coded = _lines(begin, data) | beam.Map(utf8) | "Base64" >> beam.Map(to_base64)
    return coded | beam.io.WriteToText(f"{output}/part", num_shards=shards)


def encrypted_records(begin, data, output, shards):
    """EncryptRecords in base64."""
    sealed = _lines(begin, data) | EncryptRecords(key=KEY, keys=f"{output}/keys")
    return sealed | "Base64" >> beam.Map(to_base64) | beam.io.WriteToText(f"{output}/part", num_shards=shards)


JOBS = {
    job.__name__: job
    for job in (copy_files, encrypt_files, plain_text, encrypted_text, plain_records, encrypted_records)
}


def main():
    """Run one job; print how long it took, in JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--shards", type=int, default=0)
    arguments, options = parser.parse_known_args()
    start = time.monotonic()
    pipeline = jobs.make_pipeline(PipelineOptions(options))
    _ = JOBS[arguments.job](pipeline, arguments.data, arguments.output, arguments.shards)
    with jobs.fail_when_a_worker_dies():
        result = pipeline.run()
        state = result.wait_until_finish() or result.state
    if state != PipelineState.DONE:
        sys.exit(f"the job ended as {state}")
    sys.stdout.write(json.dumps({"seconds": time.monotonic() - start}) + "\n")


if __name__ == "__main__":
    main()
