"""What two processes do at the same time to one S3: `python -m tests.engines.races ME N GATE`.

Both wait for the other to come to the gate, a folder, before each of N steps of each race, and print what they did as
lines of JSON.
"""

import json
import sys
import time
from pathlib import Path

from beam_envelope import create_dataset_key
from beam_envelope.formats.keyfile import MAX_KEY_FILE_BYTES
from beam_envelope.formats.manifest import ManifestEntry
from beam_envelope.formats.shard import open_sealed
from beam_envelope.formats.shard_writer import ShardWriter
from beam_envelope.io.keystore import open_key_store
from beam_envelope.io.manifest import WrittenShard, add_to_manifest
from beam_envelope.io.s3 import S3Store
from beam_envelope.io.store import key_file_path, read_small
from beam_envelope.keys.cache import generate_data_key
from beam_envelope.keys.uri import open_keys
from tests.engines.branches import CONTEXT, KEY


def write_shard(path, *, overwrite=False):
    """Return a writer of a shard in S3."""
    with generate_data_key(open_keys(KEY), CONTEXT) as data_key:
        output = S3Store().create(path, overwrite=overwrite, size_hint=0)
        return ShardWriter(output, data_key, CONTEXT, compression="none", name=path)


def read_shard(path):
    """Return what is in a shard in S3."""
    key_file = read_small(key_file_path(path), MAX_KEY_FILE_BYTES + 1)
    with S3Store().open(path) as stream:
        return open_sealed(stream, key_file, open_keys(KEY), CONTEXT, path).read()


def dataset_key(me, step):
    """Make the dataset key of a step, or find it."""
    return create_dataset_key(key=KEY, keys="s3://race/keys", context=CONTEXT, name=f"dataset-{step}")


def key_file(me, step):
    """Create a file of the key store that must be made once; say whose is there then."""
    return open_key_store("s3://race/once").create_once(str(step), f"by {me}".encode()).decode()


def shard(me, step):
    """Write a shard that must not be there; say whether it could."""
    try:
        with write_shard(f"s3://race/shards/{step}") as shard:
            shard.write(f"by {me}".encode())
    except FileExistsError:
        return False
    return True


def manifest(me, step):
    """Add a shard of this process's own to the manifest of both."""
    root = "s3://race/listed/"
    entry = ManifestEntry(f"{step:031x}{me}", 100)
    return add_to_manifest(root, [WrittenShard(f"{root}{me}-{step}", entry)], open_keys(KEY), CONTEXT)


RACES = {"dataset key": dataset_key, "key file": key_file, "shard": shard, "manifest": manifest}


def main(me, number, gate):
    """Do all steps."""
    for what, race in RACES.items():
        for step in range(int(number)):
            Path(gate, f"{what}-{step}-{me}").touch()
            while len(list(Path(gate).glob(f"{what}-{step}-*"))) < 2:
                time.sleep(0.001)
            print(json.dumps([what, race(me, step)]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
