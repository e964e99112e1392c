"""What must not get out of EncryptFields and DecryptFields: keys and plaintext, by pickles, pipelines, logs."""

import base64
import logging
import pickle

import apache_beam as beam
import pytest
from apache_beam.internal.cloudpickle import cloudpickle
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.error_handling import CollectingErrorHandler
from apache_beam.typehints import typehints

from beam_envelope import DataKeyPolicy, DecryptFields, EncryptFields, jobs
from beam_envelope.keys.cache import clear_caches
from tests.transforms.test_files_secrets import assert_no_secret, data_keys, payloads  # noqa: F401  # a fixture

CANARY = b"CANARY-7f3a-4111111111111111"
ELEMENT = {"id": 1, "card": CANARY.decode(), "email": CANARY.decode()}


@pytest.fixture
def settings(tmp_path, local_key):
    """A key, a key store and a context."""
    return {"key": local_key, "keys": tmp_path / "keys", "context": {"dataset": "people"}}


def dofn_of(transform):
    """Return the DoFn that a transform would run."""
    seen = []
    transform.apply = lambda label, dofn, *_: seen.append(dofn)
    transform.expand(beam.pvalue.PCollection(None, element_type=typehints.Any, is_bounded=True))
    del transform.apply
    return seen[0]


@pytest.mark.parametrize("policy", [DataKeyPolicy("bundle"), DataKeyPolicy("worker")])
def test_a_dofn_has_no_key_and_no_plaintext_in_its_pickle_at_any_time(settings, policy, data_keys):  # noqa: F811
    sealing = dofn_of(EncryptFields(["card", "email"], deterministic=["email"], policy=policy, **settings))
    opening = dofn_of(DecryptFields(["card", "email"], **settings))
    lives = []
    element = ELEMENT
    for dofn in (sealing, opening):
        lives.append(cloudpickle.dumps(dofn))
        dofn.start_bundle()
        lives.append(cloudpickle.dumps(dofn))
        (element,) = dofn.process(element)
        lives += [cloudpickle.dumps(dofn), pickle.dumps(dofn)]
        revived = pickle.loads(lives[-1])
        assert not hasattr(revived, "bundle")
        dofn.finish_bundle()
        lives.append(cloudpickle.dumps(dofn))
    assert element == ELEMENT
    revived.start_bundle()
    assert len(data_keys) >= 2
    for life in lives:
        assert_no_secret(life, CANARY, *data_keys)


def test_the_pipeline_the_dead_letters_and_the_logs_hold_nothing(settings, data_keys, caplog, tmp_path):  # noqa: F811
    caplog.set_level(logging.DEBUG)
    for name in ("apache_beam", "botocore", "urllib3"):  # what other tests may have set
        caplog.set_level(logging.DEBUG, logger=name)
    letters = tmp_path / "letters"
    letters.mkdir()
    sealing = EncryptFields(["card", "email"], deterministic=["email"], **settings)
    opening = DecryptFields(["card", "email"], **settings)
    pipeline = jobs.make_pipeline(PipelineOptions([]), 1, 0)
    source = pipeline | beam.Create([1, 2, 3, 4]) | beam.Map(element_of)
    with CollectingErrorHandler() as handler:
        sealed = source | sealing.with_error_handler(handler) | beam.Map(moved)
        _ = sealed | opening.with_error_handler(handler) | beam.Map(write_letter, str(letters / "opened"))
    _ = handler.output() | "Letters" >> beam.Map(write_letter, str(letters / "failed"))
    before = payloads(pipeline)
    assert b"_EncryptDoFn" in before
    assert b"_DecryptDoFn" in before
    pipeline.run().wait_until_finish()
    failed = (letters / "failed").read_bytes()
    logged = "\n".join(f"{record.getMessage()} {record.exc_text}" for record in caplog.records).encode()
    assert failed.count(b"FailedRecord") == 3
    assert CANARY in (letters / "opened").read_bytes()  # what was right came through, and the search would find it
    assert len(data_keys) >= 2
    for text in (before, payloads(pipeline), failed, logged):
        assert_no_secret(text, CANARY, base64.b64encode(CANARY), *data_keys)


def element_of(number):
    """Return an element: the first is right, the second and the third cannot be encrypted, the fourth is changed."""
    card = {2: {CANARY}, 3: bytearray(CANARY)}.get(number, CANARY.decode())
    return {**ELEMENT, "id": number, "card": card}


def moved(element):
    """Move a cell of the fourth."""
    return {**element, "card": element["email"]} if element["id"] == 4 else element


def write_letter(element, path):
    """Append what came out to a file."""
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(f"{element!r}\n")


@pytest.mark.parametrize("bad", [{CANARY}, [bytearray(CANARY)], {"a": {1, CANARY}}])
def test_the_error_of_a_job_that_fails_holds_no_plaintext(settings, caplog, bad):
    caplog.set_level(logging.DEBUG)
    pipeline = jobs.make_pipeline(PipelineOptions([]), 1, 0)
    _ = (
        pipeline
        | beam.Create([pickle.dumps({"card": bad})])
        | beam.Map(pickle.loads)
        | EncryptFields(["card"], **settings)
    )
    with pytest.raises(Exception, match="the field card: a value of the class") as caught:
        pipeline.run().wait_until_finish()
    error, texts = caught.value, []
    while error is not None:
        texts.append(repr(error))
        error = error.__context__
    texts += [f"{record.getMessage()} {record.exc_text}" for record in caplog.records]
    assert_no_secret("\n".join(texts).encode(), CANARY)


def test_after_a_fork_or_a_clearing_of_caches_a_bundle_goes_on_with_a_new_key(settings, tmp_path):
    dofn = dofn_of(EncryptFields(["card"], policy=DataKeyPolicy("worker"), **settings))
    dofn.start_bundle()
    (one,) = dofn.process(ELEMENT)
    clear_caches()
    (two,) = dofn.process(ELEMENT)
    assert one["card"][:17] != two["card"][:17]
    opening = dofn_of(DecryptFields(["card"], **settings))
    opening.start_bundle()
    assert [opening.process(sealed) for sealed in (one, two)] == [[ELEMENT], [ELEMENT]]


@pytest.mark.parametrize(("reuse", "kept"), [("bundle", False), ("worker", True)])
def test_a_bundles_key_is_dropped_at_its_end(settings, reuse, kept):
    dofn = dofn_of(EncryptFields(["card"], policy=DataKeyPolicy(reuse), **settings))
    dofn.start_bundle()
    dofn.process(ELEMENT)
    _, encryptor = dofn.bundle.chosen(())  # what is open where no template is to be filled
    assert encryptor._left.records > 0
    dofn.finish_bundle()
    assert (encryptor._left.records > 0) is kept
