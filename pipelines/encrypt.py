"""Encrypt a dataset of files: each becomes a shard, or encrypted Parquet, with its key file beside it.

    python -m pipelines.encrypt 'data/*.csv' --output sealed/ --key local-kms://keyring.json --context dataset=flights
    python -m pipelines.encrypt 's3://raw/2026/*' --output s3://sealed/2026/ --key aws-kms://alias/etl \
        --runner=FlinkRunner --flink_master=HOST:8081
    python -m pipelines.encrypt s3://raw/people/ --output s3://sealed/people/ --key aws-kms://alias/etl \
        --format=parquet --columns ssn=aws-kms://alias/pii

Any option of Beam may follow. With no runner named, the job uses all cores of this machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.runners.runner import PipelineResult

from beam_envelope import arguments, jobs, preflight


def run(argv: Sequence[str] | None = None) -> PipelineResult:
    """Start the job and return its result, without waiting for it on runners that do not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arguments.add_encrypt_arguments(parser)
    settings, options = jobs.parse(parser, argv)

    transform = jobs.encrypt_transform(settings)
    preflight.check_encrypt(settings, transform, options, tell=print)
    pipeline = jobs.make_pipeline(options)
    _ = pipeline | "Files" >> beam.Create(settings.patterns) | "EncryptFiles" >> transform
    with jobs.fail_when_a_worker_dies():
        return pipeline.run()


if __name__ == "__main__":
    run().wait_until_finish()
