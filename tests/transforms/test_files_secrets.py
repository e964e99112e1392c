"""What must not get out: data keys and plaintext, by pickles, pipeline protos, logs and temporary files."""

import base64
import bz2
import logging
import pickle
import tempfile
import zlib

import apache_beam as beam
import pytest
from apache_beam.internal import pickler
from apache_beam.internal.cloudpickle import cloudpickle
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2

from beam_envelope import DataKeyPolicy, DecryptFiles, EncryptFiles, keys
from beam_envelope.formats.output import LocalOutput
from beam_envelope.keys import cache
from beam_envelope.testing import find_plaintext
from beam_envelope.transforms.plan import Task
from tests.running import decrypt, encrypt, listing, run, write_files

CANARY = b"CANARY-7f3a-4111111111111111"
CONTEXT = {"dataset": "flights"}


@pytest.fixture
def data(tmp_path):
    """A source that holds the canary, in several chunks."""
    return write_files(tmp_path / "data", {"a.csv": b"line of text\n" * 3000 + CANARY + b"\n" + b"more\n" * 9000})


@pytest.fixture
def data_keys(monkeypatch):
    """The bytes of every data key that this process makes or unwraps."""
    made = []
    init = keys.provider.DataKey.__init__

    def remember(self, material, wrapped_keys=()):
        init(self, material, wrapped_keys)
        made.append(bytes(material))

    monkeypatch.setattr(keys.provider.DataKey, "__init__", remember)
    return made


def forms(secret):
    """Return a secret as it would look in bytes and in texts."""
    return [
        secret,
        secret.hex().encode(),
        base64.b64encode(secret),
        repr(secret)[2:-1].encode(),
        repr(list(secret))[1:-1].encode(),
    ]


def unpacked(packed):
    """Return bytes and what they hold if they are one of Beam's pickles: base64 of bz2 or zlib."""
    for unpack in (bz2.decompress, zlib.decompress):
        try:
            return packed + unpack(base64.b64decode(packed))
        except (OSError, ValueError, zlib.error):
            pass
    return packed


def assert_no_secret(text, *secrets):
    for secret in secrets:
        for form in forms(secret):
            assert form not in text


def test_the_search_finds_a_key_in_a_pickle():
    secret = bytes(range(100, 132))
    for pickled in (cloudpickle.dumps({"key": secret}), unpacked(pickler.dumps({"key": secret}))):
        with pytest.raises(AssertionError):
            assert_no_secret(pickled, secret)


# ------------------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("policy", [DataKeyPolicy("bundle"), DataKeyPolicy("worker")])
def test_an_encrypting_dofn_has_no_key_in_its_pickle_at_any_time_of_its_life(
    tmp_path, data, local_key, data_keys, policy
):
    transform = EncryptFiles(f"{tmp_path}/sealed", key=local_key, context=CONTEXT, policy=policy)
    dofn = transform.work
    size = (data / "a.csv").stat().st_size
    lives = [cloudpickle.dumps(dofn)]
    dofn.start_bundle()
    lives.append(cloudpickle.dumps(dofn))
    for number in range(2):
        target = f"{tmp_path}/sealed/{number}"
        (result,) = dofn.process((target, [Task(f"{data}/a.csv", size, target, 0, size)]))
        lives += [cloudpickle.dumps(dofn), pickle.dumps(dofn), cloudpickle.dumps(transform), cloudpickle.dumps(result)]
    with dofn._sources.of(())[0].take() as current:  # of the one choice that there is without templates
        assert not current.closed
        assert bytes(current.material) in data_keys  # it holds a key, and yet:
    for pickled in lives:
        assert_no_secret(pickled, CANARY, *data_keys)
    revived = pickle.loads(lives[-3])
    assert revived._sources is None
    revived.start_bundle()
    target = f"{tmp_path}/sealed/again"
    list(revived.process((target, [Task(f"{data}/a.csv", size, target, 0, size)])))
    revived.finish_bundle()
    dofn.finish_bundle()
    assert_no_secret(cloudpickle.dumps(dofn), CANARY, *data_keys)
    dofn.teardown()


def test_a_bundles_key_is_erased_at_its_end(tmp_path, local_key):
    dofn = EncryptFiles(f"{tmp_path}/sealed", key=local_key).work
    dofn.start_bundle()
    source, _ = dofn._sources.of(())
    source.take().close()
    current = source._current
    assert not current.closed
    dofn.finish_bundle()
    assert current.closed
    dofn.start_bundle()
    source, _ = dofn._sources.of(())
    source.take().close()
    current = source._current
    dofn.teardown()  # of a bundle that failed
    assert current.closed


def test_a_decrypting_dofn_has_no_key_in_its_pickle_before_and_after_use(tmp_path, data, local_key, data_keys):
    encrypt(data, tmp_path / "sealed", local_key, context=CONTEXT)
    cache.clear_caches()
    transform = DecryptFiles(f"{tmp_path}/opened", key=local_key, context=CONTEXT)
    lives = [cloudpickle.dumps(transform)]
    size = (tmp_path / "sealed/a.csv").stat().st_size
    target = f"{tmp_path}/opened/a.csv"
    (result,) = transform.work.process((target, [Task(f"{tmp_path}/sealed/a.csv", size, target, 0, size)]))
    lives += [cloudpickle.dumps(transform), cloudpickle.dumps(transform.work), cloudpickle.dumps(result)]
    assert len(data_keys) >= 2
    for pickled in lives:
        assert_no_secret(pickled, CANARY, *data_keys)


# ---------------------------------------------------------------------------------------------- the pipeline


def payloads(pipeline):
    """Return the serialised pipeline, with the pickles that are in it unpacked."""
    proto, _ = pipeline.to_runner_api(return_context=True)
    parts = [proto.SerializeToString()]
    for transform in proto.components.transforms.values():
        parts.append(unpacked(transform.spec.payload))
        if transform.spec.urn == common_urns.primitives.PAR_DO.urn:
            payload = beam_runner_api_pb2.ParDoPayload.FromString(transform.spec.payload)
            parts.append(unpacked(payload.do_fn.payload))
    return b"".join(parts)


def test_the_serialised_pipeline_holds_no_key_and_no_plaintext_before_and_after_use(
    tmp_path, data, local_key, data_keys
):
    sealing = EncryptFiles(f"{tmp_path}/sealed", key=local_key, context=CONTEXT)
    opening = DecryptFiles(f"{tmp_path}/opened", key=local_key, context=CONTEXT)
    pipelines = []
    for label, transform, source in (("Seal", sealing, f"{data}/*"), ("Open", opening, f"{tmp_path}/sealed/*")):
        pipeline = beam.Pipeline(runner="FnApiRunner")
        _ = pipeline | "Files" >> beam.Create([source]) | label >> transform
        before = payloads(pipeline)
        assert type(transform.work).__name__.encode() in before  # the pickles were found
        pipeline.run().wait_until_finish()
        pipelines += [before, payloads(pipeline)]
    assert listing(tmp_path / "opened") == ["a.csv"]
    assert len(data_keys) >= 2
    keyring = base64.b64encode(local_key._key()[1])
    for serialised in pipelines:
        assert_no_secret(serialised, CANARY, local_key._key()[1], keyring, *data_keys)


# ---------------------------------------------------------------------------------------- logs and temporary files


def test_logs_at_debug_hold_no_key_and_no_plaintext(tmp_path, data, local_key, fake_kms, data_keys, caplog):
    caplog.set_level(logging.DEBUG)
    for name in ("apache_beam", "botocore", "urllib3"):  # what other tests may have set
        caplog.set_level(logging.DEBUG, logger=name)
    key_list = [f"aws-kms://{fake_kms.create_key('etl')}", local_key]
    encrypt(data, tmp_path / "sealed", key_list, context=CONTEXT)
    cache.clear_caches()
    decrypt(tmp_path / "sealed", tmp_path / "opened", key_list[0], context=CONTEXT)
    (tmp_path / "sealed/a.csv").write_bytes((tmp_path / "sealed/a.csv").read_bytes()[:-1])
    with pytest.raises(Exception, match=r"a\.csv"):  # an error's message and traceback are logged as well
        decrypt(tmp_path / "sealed", tmp_path / "opened2", key_list[0], context=CONTEXT)
    logged = "\n".join(f"{record.getMessage()} {record.exc_text}" for record in caplog.records).encode()
    assert len(data_keys) >= 2
    assert b"a.csv" in logged
    assert_no_secret(logged, CANARY, *data_keys)


def test_errors_hold_no_key_and_no_plaintext(tmp_path, data, local_key, data_keys, monkeypatch):
    def fail(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(LocalOutput, "commit", fail)
    with pytest.raises(RuntimeError) as caught:
        encrypt(data, tmp_path / "sealed", local_key)
    trace = caught.value.__traceback__
    texts = [str(caught.value)]
    while trace is not None:
        texts += [f"{name}={value!r}" for name, value in trace.tb_frame.f_locals.items() if name != "data_keys"]
        trace = trace.tb_next
    assert_no_secret("\n".join(texts).encode(), CANARY, *data_keys)


def test_no_plaintext_reaches_a_temporary_file_or_the_output_folder_at_any_time(tmp_path, data, local_key, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    looks = []
    commit = LocalOutput.commit

    def look_and_commit(self):
        looks.append(find_plaintext([temporary, tmp_path / "sealed"], CANARY, b"line of text"))
        assert [
            name for name in listing(tmp_path / "sealed") if name.startswith("_TMP_")
        ]  # it looked while it mattered
        commit(self)
        looks.append(find_plaintext([temporary, tmp_path / "sealed"], CANARY, b"line of text"))

    monkeypatch.setattr(LocalOutput, "commit", look_and_commit)
    assert tempfile.gettempdir() == str(temporary)
    run(EncryptFiles(f"{tmp_path}/sealed", key=local_key, split_lines=20_000), f"{data}/*")
    assert looks == [[]] * 12  # before and after: of five shards, and of the manifest
    assert find_plaintext([data], CANARY) == [data / "a.csv"]
