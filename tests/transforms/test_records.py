"""EncryptRecords and DecryptRecords in pipelines."""

import logging
import pickle
import re
import time
import traceback
import typing
from collections import Counter, defaultdict
from typing import Any

import apache_beam as beam
import pytest
from apache_beam import coders
from apache_beam.internal.cloudpickle import cloudpickle
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.direct.direct_runner import BundleBasedDirectRunner
from apache_beam.testing.test_stream import TestStream as Stream
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.error_handling import CollectingErrorHandler
from apache_beam.transforms.window import FixedWindows, TimestampedValue

from beam_envelope import (
    ANY_CONTEXT,
    AwsKms,
    DataKeyPolicy,
    DecryptRecords,
    EncryptRecords,
    create_records,
    jobs,
    open_records,
)
from beam_envelope.errors import FormatError
from beam_envelope.formats.esdk_header import WRITTEN_SUITE, read_header
from beam_envelope.formats.keystore import LocalKeyStore
from beam_envelope.keys import cache, provider
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.keys.provider import kms_calls
from beam_envelope.testing import find_plaintext
from beam_envelope.transforms.elements import FailedRecord
from tests.running import listing
from tests.transforms.test_files_secrets import assert_no_secret, payloads

CANARY = b"CANARY-7f3a-4111111111111111"
CONTEXT = {"dataset": "orders"}
MESSAGES = "aws-encryption-sdk"
_kept = []


class Card(typing.NamedTuple):
    """A record with a schema."""

    number: str
    year: int


coders.registry.register_coder(Card, coders.RowCoder)


class Unregistered(typing.NamedTuple):
    """A record whose coder is pickle."""

    number: str


def shown(value):
    """A test's id, the same in every process: functions by their names."""
    return re.sub(r"<(?:function|built-in function) ([\w.<>]+?)(?: at 0x\w+)?>", r"\1", str(value))


def keep(element):
    """Keep an element; a function of a module is pickled by its name, so the list is this process's own."""
    _kept.append(element)


def message_key_as_text(message_key):
    return f"order {message_key}"


def fail(element):
    raise ValueError(f"cannot do {element}")


@pytest.fixture
def keys(tmp_path):
    return str(tmp_path / "keys")


def pipeline(*options):
    return beam.Pipeline("FnApiRunner", options=PipelineOptions(list(options)))


def run(transforms, elements):
    """Run transforms one after another on elements; return what comes out, and our metrics."""
    _kept.clear()
    p = pipeline()
    found = p | beam.Create(elements)
    for number, transform in enumerate(transforms):
        found = found | str(number) >> transform
    _ = found | beam.Map(keep)
    result = p.run()
    result.wait_until_finish()
    return list(_kept), jobs.counters(result)


def outcome(transforms, elements):
    return run(transforms, elements)[0]


def error_of(transforms, elements):
    """Run what must fail and return the whole text of the error."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  # the caller looks at the text
        run(transforms, elements)
    return "".join(traceback.format_exception(caught.value))


class Stages:
    """The transforms of a test, with its key and key store."""

    def __init__(self, key, keys):
        self.settings = {"key": key, "keys": keys, "context": CONTEXT}

    def encrypt(self, **more):
        return EncryptRecords(**{**self.settings, **more})

    def decrypt(self, **more):
        return DecryptRecords(**{**self.settings, **more})


@pytest.fixture
def stages(local_key, keys):
    return Stages(local_key, keys)


@pytest.fixture
def kms_stages(fake_kms, keys):
    fake_kms.create_key("etl")
    return Stages("aws-kms://alias/etl", keys)


# --------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    ("elements", "coder"),
    [
        ([b"", b"a", bytes(range(256))], None),
        ([b"a", b"\xff"], bytes),
        (["", "größe", "\U0001f600"], str),
        (["größe"], "str"),
        ([0, -1, 2**62], int),
        ([1, 2], coders.VarIntCoder()),
        ([1.5, -0.0], "float"),
        ([Card("4111", 27), Card("", 0)], Card),
        ([("a", 1), ("b", 2)], tuple[str, int]),
        ([["a"], []], list[str]),
        ([{"a": 1}], dict[str, int]),
        ([None, "a"], str | None),
    ],
    ids=shown,
)
@pytest.mark.parametrize("more", [{}, {"deterministic": True}, {"format": MESSAGES, "keys": None}], ids=shown)
def test_elements_of_every_kind_come_back(stages, elements, coder, more):
    if "deterministic" in more and coder == dict[str, int]:
        pytest.skip("the coder of dicts is not deterministic")
    read = {name: value for name, value in more.items() if name != "deterministic"}
    found = outcome([stages.encrypt(coder=coder, **more), stages.decrypt(coder=coder, **read)], elements)
    assert sorted(map(repr, found)) == sorted(map(repr, elements))


def test_text_is_utf_8_and_comes_back_as_bytes_or_text(stages):
    sealed = outcome([stages.encrypt()], ["größe"])
    assert outcome([stages.decrypt()], sealed) == ["größe".encode()]
    assert outcome([stages.decrypt(coder=str)], sealed) == ["größe"]


def test_what_a_pipeline_encrypts_a_program_without_beam_reads_and_the_other_way_round(stages, local_key, keys):
    (sealed,) = outcome([stages.encrypt(aad="here")], [b"4111"])
    assert len(sealed) == 4 + 45
    assert open_records(key=local_key, keys=keys, context=CONTEXT).decrypt(sealed, b"\x00here") == b"4111"
    sealed = create_records(key=local_key, keys=keys, context=CONTEXT).encrypt(b"4111")
    assert outcome([stages.decrypt()], [sealed]) == [b"4111"]


def test_timestamps_and_windows_stay(stages):
    with pipeline() as p:
        stamped = p | beam.Create([1, 12, 13]) | beam.Map(lambda number: TimestampedValue(b"%d" % number, number))
        sealed = stamped | beam.WindowInto(FixedWindows(10)) | stages.encrypt()
        opened = (
            sealed | stages.decrypt() | beam.WithKeys("all") | beam.GroupByKey() | beam.MapTuple(lambda _, v: sorted(v))
        )
        assert_that(opened, equal_to([[b"1"], [b"12", b"13"]]))


def test_message_keys_stay_and_may_bind_their_records(stages):
    pairs = [(1, b"one"), (2, b"two")]
    sealed = outcome([stages.encrypt(keyed=True, aad=message_key_as_text)], pairs)
    assert sorted(key for key, _ in sealed) == [1, 2]
    assert sorted(outcome([stages.decrypt(keyed=True, aad=message_key_as_text)], sealed)) == pairs
    (_, one), (_, two) = sorted(sealed)
    swapped = [(1, two), (2, one)]
    assert "TamperedError" in error_of([stages.decrypt(keyed=True, aad=message_key_as_text)], swapped)
    assert "TamperedError" in error_of([stages.decrypt(keyed=True)], sealed)
    unbound = outcome([stages.encrypt(keyed=True)], [(1, b"one")])
    assert outcome([stages.decrypt(keyed=True)], [(7, unbound[0][1])]) == [(7, b"one")]  # nobody asked for it


def test_a_place_is_the_same_as_bytes_text_or_by_a_function(stages):
    sealed = outcome([stages.encrypt(keyed=True, aad=message_key_as_text)], [(1, b"one")])
    assert outcome([stages.decrypt(aad=b"order 1")], [sealed[0][1]]) == [b"one"]
    assert outcome([stages.decrypt(aad="order 1", keyed=True)], sealed) == [(1, b"one")]
    assert "TamperedError" in error_of([stages.decrypt(aad="order 2", keyed=True)], sealed)


@pytest.mark.parametrize("more", [{}, {"deterministic": True}, {"format": MESSAGES, "keys": None}], ids=shown)
def test_another_context_does_not_open(stages, more):
    sealed = outcome([stages.encrypt(**more)], [b"4111"])
    more = {name: value for name, value in more.items() if name != "deterministic"}
    text = error_of([stages.decrypt(**{**more, "context": {"dataset": "x"}})], sealed)
    assert "ContextMismatchError" in text
    assert outcome([stages.decrypt(**{**more, "context": ANY_CONTEXT})], sealed) == [b"4111"]


def test_a_record_moved_to_another_key_store_does_not_open(stages, tmp_path):
    sealed = outcome([stages.encrypt()], [b"4111"])
    assert "KeyFileMissingError" in error_of([stages.decrypt(keys=str(tmp_path / "other"))], sealed)


def test_grouping_and_joining_need_not_open_anything(stages, fake_kms):
    """Two encrypted datasets are joined by a deterministic column, by a job that has no key."""
    left, right = [("a", b"1"), ("b", b"2"), ("a", b"3")], [("a", b"x"), ("c", b"y")]

    def sealed(pairs):
        names = outcome([stages.encrypt(deterministic=True)], [name for name, _ in pairs])
        values = outcome([stages.encrypt()], [value for _, value in pairs])
        return list(zip(names, values, strict=True))

    sealed_left, sealed_right = sealed(left), sealed(right)
    kms_calls.counts.clear()
    joined = []
    with pipeline() as p:
        both = {"left": p | "L" >> beam.Create(sealed_left), "right": p | "R" >> beam.Create(sealed_right)}
        _kept.clear()
        _ = both | beam.CoGroupByKey() | beam.Map(keep)
    joined += _kept
    assert kms_calls.counts == {}
    opened = open_records(key=stages.settings["key"], keys=stages.settings["keys"], context=CONTEXT)
    found = {
        opened.decrypt(name): {side: sorted(map(opened.decrypt, group[side])) for side in ("left", "right")}
        for name, group in joined
    }
    assert found == {
        b"a": {"left": [b"1", b"3"], "right": [b"x"]},
        b"b": {"left": [b"2"], "right": []},
        b"c": {"left": [], "right": [b"y"]},
    }


def test_deterministic_envelopes_are_equal_across_jobs_and_differ_between_places(stages, tmp_path):
    def sealed(**more):
        cache.clear_caches()
        return outcome([stages.encrypt(deterministic=True, **more)], [b"4111"])[0]

    one = sealed()
    assert sealed() == one
    assert sealed(aad="x")[17:] != one[17:]
    assert sealed(dataset_key="second")[17:] != one[17:]
    assert sealed(keys=str(tmp_path / "other"))[17:] != one[17:]
    assert sealed(keys=str(tmp_path / "third"), context={})[17:] != one[17:]


# ------------------------------------------------------------------------------------------------------- KMS calls


@pytest.mark.parametrize("more", [{}, {"format": MESSAGES, "keys": None}], ids=shown)
def test_a_bounded_bundle_has_one_data_key_and_a_process_unwraps_it_once(kms_stages, fake_kms, more):
    elements = [b"%d" % number for number in range(500)]
    sealed, counts = run([kms_stages.encrypt(**more)], elements)
    assert fake_kms.calls == {"GenerateDataKey": 1}
    assert counts["kms_GenerateDataKey"] == 1
    found, counts = run([beam.Reshuffle(), kms_stages.decrypt(**more)], sealed)
    assert Counter(found) == Counter(elements)
    assert fake_kms.calls == {"GenerateDataKey": 1, "Decrypt": 1}
    assert counts["kms_Decrypt"] == 1
    run([kms_stages.encrypt(**more)], elements)
    assert fake_kms.calls["GenerateDataKey"] == 2  # another bundle, another data key


@pytest.mark.parametrize("more", [{}, {"format": MESSAGES, "keys": None}], ids=shown)
def test_the_bundles_of_unbounded_input_have_two_data_keys_at_most(kms_stages, fake_kms, keys, more):
    bundles = 100  # this runner takes its time
    stream = Stream()
    for number in range(bundles):
        stream = stream.add_elements([b"%d" % number])
    p = beam.Pipeline(BundleBasedDirectRunner(), options=PipelineOptions(["--streaming"]))
    _kept.clear()
    _ = p | stream.advance_watermark_to_infinity() | kms_stages.encrypt(**more) | beam.Map(keep)
    p.run().wait_until_finish()
    assert len(_kept) == bundles
    assert 1 <= fake_kms.calls["GenerateDataKey"] <= 2
    assert set(fake_kms.calls) == {"GenerateDataKey"}
    if not more:
        assert len({envelope[:29] for envelope in _kept}) == bundles
        assert len(listing(keys)) <= 2
    assert sorted(map(int, outcome([kms_stages.decrypt(**more)], list(_kept)))) == list(range(bundles))


@pytest.mark.parametrize("more", [{}, {"format": MESSAGES, "keys": None}], ids=shown)
def test_ten_thousand_bundles_of_one_element_have_two_data_keys_at_most(kms_stages, fake_kms, keys, more):
    dofn = encrypting_dofn(kms_stages.encrypt(policy=DataKeyPolicy("worker"), **more))
    found = []
    for _ in range(10_000):
        dofn.start_bundle()
        found += dofn.process(b"same")
        dofn.finish_bundle()
    assert 1 <= fake_kms.calls["GenerateDataKey"] <= 2
    assert len(set(found)) == 10_000
    if not more:
        assert len({envelope[:29] for envelope in found}) == 10_000


def test_a_policy_that_is_given_stays(kms_stages, fake_kms):
    for _ in range(3):
        run([kms_stages.encrypt(policy=DataKeyPolicy("worker"))], [b"a"])
    assert fake_kms.calls == {"GenerateDataKey": 1}
    run([kms_stages.encrypt(policy=DataKeyPolicy(max_records=2))], [b"a"] * 5)
    assert fake_kms.calls == {"GenerateDataKey": 4}


@pytest.mark.parametrize("max_records", [1, 3])
def test_messages_have_limits_too(kms_stages, fake_kms, max_records):
    more = {"format": MESSAGES, "keys": None}
    sealed = outcome([kms_stages.encrypt(policy=DataKeyPolicy(max_records=max_records), **more)], [b"a"] * 7)
    assert fake_kms.calls == {"GenerateDataKey": -(-7 // max_records)}
    assert outcome([kms_stages.decrypt(**more)], sealed) == [b"a"] * 7


@pytest.mark.parametrize(
    ("limits", "sizes", "times", "at_least", "at_most"),
    [
        ({"max_records": 256}, [1], 700, 3, 3),
        ({"max_records": 257}, [1], 700, 3, 3),
        ({"max_records": 300}, [1, 100_000], 350, 3, 9),
        ({"max_bytes": 99}, [10], 27, 3, 3),
        ({"max_bytes": 200_000}, [60_000], 9, 3, 5),
        ({"max_bytes": 300_000}, [100_000, 50_000], 6, 3, 6),
        ({"max_bytes": 300_000}, [10, 290_000], 4, 4, 8),
        ({}, [1, 70_000], 600, 1, 1),
    ],
    ids=str,
)
def test_messages_that_are_counted_in_advance_keep_to_the_limits(
    kms_stages, fake_kms, limits, sizes, times, at_least, at_most
):
    """Where a limit is tight, a new data key comes early, never late."""
    policy = DataKeyPolicy(**limits)
    dofn = encrypting_dofn(kms_stages.encrypt(policy=policy, format=MESSAGES, keys=None))
    dofn.start_bundle()
    under_each_key = defaultdict(list)
    for size in sizes * times:
        message = dofn.process(bytes(size))[0]
        under_each_key[message[read_header(message, WRITTEN_SUITE, "it").section]].append(size)
    dofn.finish_bundle()
    assert at_least <= fake_kms.calls["GenerateDataKey"] == len(under_each_key) <= at_most
    for sizes_of_key in under_each_key.values():
        assert len(sizes_of_key) <= policy.max_records
        assert sum(sizes_of_key) <= policy.max_bytes


def test_messages_that_are_counted_in_advance_keep_to_the_age(kms_stages, fake_kms):
    dofn = encrypting_dofn(kms_stages.encrypt(policy=DataKeyPolicy(max_age_s=0.2), format=MESSAGES, keys=None))
    dofn.start_bundle()
    for wanted in (1, 2):
        dofn.process(b"one")
        dofn.process(b"more")
        assert fake_kms.calls == {"GenerateDataKey": wanted}
        time.sleep(0.25)


def test_bundles_that_share_a_data_key_count_their_own_messages_only(kms_stages, fake_kms):
    policy = DataKeyPolicy("worker", max_records=20)
    dofn = encrypting_dofn(kms_stages.encrypt(policy=policy, format=MESSAGES, keys=None))
    for _ in range(20):
        dofn.start_bundle()
        dofn.process(b"one")
        dofn.finish_bundle()
    assert fake_kms.calls == {"GenerateDataKey": 1}


def test_metrics_tell_what_was_done(stages):
    sealed, counts = run([stages.encrypt()], [b"four"] * 10)
    assert counts == {
        "records_encrypted": 10, "records_failed": 0, "bytes_plaintext": 40, "bytes_ciphertext": 490,
        "kms_GenerateDataKey": 1,
    }  # fmt: skip
    cache.clear_caches()
    _, counts = run([stages.decrypt()], sealed)
    assert counts == {
        "records_decrypted": 10, "records_failed": 0, "bytes_plaintext": 40, "bytes_ciphertext": 490, "kms_Decrypt": 1
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- retries


@pytest.mark.parametrize("policy", [DataKeyPolicy("bundle"), DataKeyPolicy("worker")], ids=shown)
def test_nonces_never_repeat_over_bundles_retries_and_copies(stages, policy):
    transform = stages.encrypt(policy=policy)
    dofn = encrypting_dofn(transform)
    pickled, found = cloudpickle.dumps(dofn), []
    for _ in range(3):  # a bundle that is tried again, by a DoFn that is kept or made anew
        for each in (dofn, pickle.loads(pickled), pickle.loads(pickle.dumps(dofn))):
            each.start_bundle()
            for _ in range(20):
                found += each.process(b"same")
            travelled = pickle.loads(cloudpickle.dumps(each))  # in the middle of its bundle
            travelled.start_bundle()
            found += travelled.process(b"same")
            if len(found) % 2:
                each.finish_bundle()  # otherwise it failed
                travelled.finish_bundle()
            else:
                each.teardown()
    assert len({envelope[:29] for envelope in found}) == len(found)
    assert len({envelope[:17] for envelope in found}) == (1 if policy.reuse == "worker" else 18)


def encrypting_dofn(transform):
    """The DoFn that a transform puts into a pipeline."""
    found = []

    class Finder(beam.pipeline.PipelineVisitor):
        def visit_transform(self, node):
            if isinstance(node.transform, beam.ParDo) and "Records" in node.full_label:
                found.append(node.transform.fn)

    p = pipeline()
    _ = p | beam.Create([b"a"]) | transform
    p.visit(Finder())
    return next(dofn for dofn in found if hasattr(dofn, "_keyed"))


# ------------------------------------------------------------------------------------------------- what goes wrong


def failures(transform, elements):
    """Run a transform with an error handler; return what came out and what failed."""
    _kept.clear()
    p = pipeline()
    with CollectingErrorHandler() as handler:
        untyped = p | beam.Create(elements) | "Untyped" >> beam.Map(lambda element: element).with_output_types(Any)
        done = untyped | transform.with_error_handler(handler)
    _ = done | "Done" >> beam.Map(keep)
    _ = handler.output() | "Failed" >> beam.Map(keep)
    result = p.run()
    result.wait_until_finish()
    failed = [element for element in _kept if hasattr(element, "record_id")]
    return [element for element in _kept if not hasattr(element, "record_id")], failed, jobs.counters(result)


def name_of(element):
    return f"a {type(element).__name__}"


def test_an_element_that_cannot_be_encoded_becomes_a_failed_record_without_data(stages):
    done, failed, counts = failures(stages.encrypt(coder=int, record_id=name_of), [1, CANARY.decode(), 2])
    assert len(done) == 2
    (record,) = failed
    assert tuple(record) == (
        "a str",
        "FormatError",
        (
            "an element of type str cannot be encoded as bytes (TypeError). "
            "Elements are bytes or str, or what coder= can encode"
        ),
        "",
        None,
    )
    assert counts["records_failed"] == 1
    assert counts["records_encrypted"] == 2


@pytest.mark.parametrize(
    ("settings", "element"),
    [
        ({}, "\ud800" + CANARY.decode()),
        ({"coder": coders.VarIntCoder()}, CANARY.decode()),
        ({"coder": coders.BytesCoder()}, CANARY.decode()),
        ({"coder": coders.StrUtf8Coder()}, 7),
        ({"keyed": True}, CANARY),
        ({"keyed": True, "aad": fail}, (CANARY.decode(), b"x")),
        ({"keyed": True, "aad": len}, (CANARY.decode(), b"x")),
    ],
    ids=shown,
)
def test_errors_of_encoding_hold_no_plaintext(stages, settings, element):
    dofn = encrypting_dofn_for(stages, settings)
    dofn.start_bundle()
    with pytest.raises(FormatError) as caught:
        dofn.process(element)
    text = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert "CANARY" not in text
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


def encrypting_dofn_for(stages, settings):
    from beam_envelope.transforms.records import _EncryptDoFn

    transform = stages.encrypt(**settings)
    return _EncryptDoFn(transform._keys, transform._form, None, siv=False)


def test_a_record_id_that_fails_is_a_random_one(stages):
    _, failed, _ = failures(stages.encrypt(coder=int, record_id=fail), ["a", "b"])
    assert len({record.record_id for record in failed}) == 2
    assert all(len(record.record_id) == 36 for record in failed)


def test_an_envelope_that_does_not_open_becomes_a_failed_record_with_its_bytes(stages):
    sealed = outcome([stages.encrypt()], [b"4111", b"4222", b"4333"])
    broken = [sealed[0], sealed[1][:-1], b"not encrypted " + CANARY, sealed[2][:20], b"\xf8" + bytes(60)]
    done, failed, counts = failures(stages.decrypt(), broken)
    assert done == [b"4111"]
    found = {record.error: record for record in failed}
    assert sorted(found) == ["KeyFileMissingError", "NotEncryptedError", "TamperedError", "TruncatedError"]
    assert found["TamperedError"].ciphertext == sealed[1][:-1]
    assert found["TruncatedError"].ciphertext == sealed[2][:20]
    assert found["KeyFileMissingError"].ciphertext == b"\xf8" + bytes(60)
    assert found["NotEncryptedError"].ciphertext is None  # it may be plaintext
    assert "CANARY" not in repr(failed)
    assert (counts["records_decrypted"], counts["records_failed"]) == (1, 4)


def test_a_record_of_another_coder_does_not_show_what_it_is(stages):
    sealed = outcome([stages.encrypt()], [b"\xff" + CANARY])
    text = error_of([stages.decrypt(coder=str)], sealed)
    assert "this record was decrypted, but coder= cannot decode it (UnicodeDecodeError)" in text
    assert "CANARY" not in text
    _, failed, _ = failures(stages.decrypt(coder=str), sealed)
    assert [record.error for record in failed] == ["FormatError"]
    assert failed[0].ciphertext == sealed[0]
    assert "CANARY" not in repr(failed)


def test_elements_that_are_no_bytes_are_no_envelopes(stages):
    done, failed, _ = failures(stages.decrypt(), [CANARY.decode()])
    assert done == []
    assert [record.message for record in failed] == ["envelopes are bytes; this element is a str"]
    assert "CANARY" not in repr(failed)


def test_failed_records_have_a_schema():
    assert isinstance(coders.registry.get_coder(FailedRecord), coders.RowCoder)


@pytest.mark.parametrize("operation", ["GenerateDataKey", "Decrypt"])
def test_errors_of_the_kms_fail_the_bundle_even_with_a_handler(kms_stages, fake_kms, operation):
    sealed = outcome([kms_stages.encrypt()], [b"4111"])
    cache.clear_caches()
    fake_kms.deny(operation)
    transform, element = (
        (kms_stages.encrypt(), b"4111") if operation == "GenerateDataKey" else (kms_stages.decrypt(), sealed[0])
    )
    with pytest.raises(Exception, match="not allowed to use KMS key"):
        failures(transform, [element])


def test_a_dataset_key_of_another_context_fails_the_bundle_and_drops_nothing(stages):
    run([stages.encrypt(deterministic=True)], [b"a"])
    with pytest.raises(Exception, match=r"ContextMismatch|written with another encryption context"):
        failures(stages.encrypt(deterministic=True, context={}), [b"a"])


def test_a_key_store_that_cannot_be_written_fails_the_bundle(stages, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Exception, match=r"Not a directory|File exists"):
        failures(stages.encrypt(keys=str(tmp_path / "file")), [b"a"])


def test_encrypting_twice_is_an_error(stages):
    assert "AlreadyEncryptedError" in error_of([stages.encrypt(), stages.encrypt()], [b"4111"])


# --------------------------------------------------------------------------------------------------------- arguments


def test_without_a_key_store_it_says_why_one_is_needed(local_key):
    for transform in (EncryptRecords, DecryptRecords):
        with pytest.raises(
            ValueError, match="keys= is missing: a compact envelope only names its key, so without a key"
        ):
            transform(key=local_key)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "jwe"}, "format is one of compact, aws-encryption-sdk, not 'jwe'"),
        ({"format": MESSAGES}, "has no key store: each message holds its wrapped data key"),
        ({"format": MESSAGES, "keys": None, "aad": "x"}, "has no place for aad="),
        ({"aad": message_key_as_text}, "needs keyed=True"),
        ({"keys": ""}, "keys= is one folder"),
        ({"context": {"": "x"}}, "empty key or value"),
        ({"coder": "json"}, "coder= as a text is one of"),
        ({"coder": object}, "unpickles"),
        ({"coder": Unregistered}, r"register_coder\(Type, coders.RowCoder\)"),
        ({"coder": dict[str, object]}, "unpickles"),
        ({"coder": coders.PickleCoder()}, "unpickles"),
        ({"coder": coders.TupleCoder([coders.VarIntCoder(), coders.FastPrimitivesCoder()])}, "unpickles"),
    ],
    ids=shown,
)
def test_what_does_not_go_together_is_refused(stages, settings, message):
    for transform in (stages.encrypt, stages.decrypt):
        with pytest.raises(ValueError, match=message):
            transform(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"deterministic": True, "policy": DataKeyPolicy()}, "neither policy= nor"),
        ({"deterministic": True, "format": MESSAGES, "keys": None}, "neither policy= nor"),
        ({"deterministic": True, "coder": dict[str, int]}, "does not encode equal elements as equal bytes"),
        ({"dataset_key": "../x"}, "the name of a key"),
    ],
    ids=shown,
)
def test_what_an_encrypting_transform_cannot_do_is_refused(stages, settings, message):
    with pytest.raises(ValueError, match=message):
        stages.encrypt(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coder": coders.VarIntCoder}, r"give VarIntCoder\(\), not the class"),
        ({"coder": 3}, "not a int"),
        ({"aad": 3}, "not a int"),
    ],
    ids=shown,
)
def test_arguments_of_other_types_are_refused(stages, settings, message):
    for transform in (stages.encrypt, stages.decrypt):
        with pytest.raises(TypeError, match=message):
            transform(**settings)


def test_an_unknown_commitment_policy_is_refused(local_key):
    with pytest.raises(ValueError, match="commitment_policy is one of"):
        DecryptRecords(key=local_key, format=MESSAGES, commitment_policy="none")


@pytest.mark.parametrize(
    ("elements", "settings", "sealed_type", "opened_type"),
    [
        ([b"a"], {}, bytes, bytes),
        (["a"], {"coder": str}, bytes, str),
        ([1], {"coder": int}, bytes, int),
        ([("a", 1)], {"coder": int, "keyed": True}, beam.typehints.Tuple[str, bytes], beam.typehints.Tuple[str, int]),
        ([Card("a", 1)], {"coder": Card}, bytes, Card),
    ],
    ids=shown,
)
@pytest.mark.parametrize("with_handler", [False, True])
def test_element_types_are_told(stages, elements, settings, sealed_type, opened_type, with_handler):
    p = pipeline()
    sealed, opened = stages.encrypt(**settings), stages.decrypt(**settings)
    if with_handler:
        handlers = [CollectingErrorHandler(), CollectingErrorHandler()]
        sealed, opened = sealed.with_error_handler(handlers[0]), opened.with_error_handler(handlers[1])
    out = p | beam.Create(elements) | sealed
    back = out | opened
    assert out.element_type == sealed_type
    assert back.element_type == opened_type


def test_elements_of_another_type_are_refused_when_the_pipeline_is_built(stages):
    with pytest.raises(beam.typehints.TypeCheckError, match="requires"):
        _ = pipeline() | beam.Create([1]) | stages.encrypt()
    with pytest.raises(beam.typehints.TypeCheckError, match="requires"):
        _ = pipeline() | beam.Create(["a"]) | stages.decrypt()
    with pytest.raises(beam.typehints.TypeCheckError, match="requires"):
        _ = pipeline() | beam.Create([b"a"]) | stages.encrypt(keyed=True)


def test_display_data_names_settings_and_no_values(stages, local_key, keys):
    for transform in (stages.encrypt(aad="CANARY"), stages.decrypt(aad="CANARY")):
        shown = transform.display_data()
        assert shown["key"] == str(local_key)
        assert shown["keys"] == keys
        assert shown["context"] == "dataset"
        assert "orders" not in repr(shown)
        assert "CANARY" not in repr(shown)
    assert stages.decrypt(context=ANY_CONTEXT).display_data()["context"] == "any"
    assert stages.encrypt(format=MESSAGES, keys=None).display_data()["format"] == MESSAGES


# ----------------------------------------------------------------------------------------- what must not get out


@pytest.fixture
def data_keys(monkeypatch):
    """The bytes of every data key that this process makes or unwraps."""
    made = []
    init = provider.DataKey.__init__

    def remember(self, material, wrapped_keys=()):
        init(self, material, wrapped_keys)
        made.append(bytes(material))

    monkeypatch.setattr(provider.DataKey, "__init__", remember)
    return made


MODES = [{}, {"policy": DataKeyPolicy("worker")}, {"deterministic": True}, {"format": MESSAGES, "keys": None}]


@pytest.mark.parametrize("more", MODES, ids=shown)
def test_a_dofn_pickles_without_keys_in_the_middle_of_a_bundle(stages, data_keys, more):
    dofn = encrypting_dofn(stages.encrypt(**more))
    dofn.start_bundle()
    (envelope,) = dofn.process(CANARY)
    pickled = cloudpickle.dumps(dofn) + pickle.dumps(dofn)
    assert data_keys
    assert_no_secret(pickled, CANARY, *data_keys)
    assert not hasattr(pickle.loads(pickle.dumps(dofn)), "bundle")
    dofn.finish_bundle()
    dofn.start_bundle()
    dofn.process(CANARY)
    dofn.teardown()
    assert not hasattr(dofn, "bundle")
    reading = encrypting_dofn(stages.decrypt(**{name: more[name] for name in ("format", "keys") if name in more}))
    reading.start_bundle()
    assert reading.process(envelope) == (CANARY,)
    assert_no_secret(cloudpickle.dumps(reading), CANARY, *data_keys)


@pytest.mark.parametrize("more", MODES, ids=shown)
def test_pipeline_logs_and_files_hold_no_key_and_no_plaintext(stages, data_keys, caplog, tmp_path, monkeypatch, more):
    caplog.set_level(logging.DEBUG)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    transform = stages.encrypt(**more)
    p = beam.Pipeline(runner="FnApiRunner")
    _kept.clear()
    _ = p | beam.Create([b"x"]) | beam.Map(make_canary) | transform | beam.Map(keep)
    before = payloads(p)
    p.run().wait_until_finish()
    (envelope,) = _kept
    broken = envelope[:-1]
    error_of([stages.decrypt(**{name: more[name] for name in ("format", "keys") if name in more})], [broken])
    logged = "\n".join(f"{record.getMessage()} {record.exc_text}" for record in caplog.records).encode()
    for text in (before, payloads(p), logged, envelope):
        assert_no_secret(text, CANARY, *data_keys)
    assert find_plaintext([tmp_path], CANARY) == []


def make_canary(_):
    return bytes.fromhex("43414e4152592d376633612d34313131313131313131313131313131")


def test_a_bundles_keys_are_dropped_at_its_end(stages):
    for more in ({}, {"format": MESSAGES, "keys": None}):
        dofn = encrypting_dofn(stages.encrypt(**more))
        dofn.start_bundle()
        work = dofn.bundle
        (first,) = dofn.process(b"a")
        dofn.finish_bundle()
        owner = work.crypt.__self__
        if more:
            assert owner._encryptor is None
            assert owner._source._current is None
        else:
            (second,) = (owner.encrypt(b"a"),)
            assert second[:17] != first[:17]


# ----------------------------------------------------------------------------------------------------------- runners


def test_worker_processes_encrypt_and_decrypt(stages, tmp_path):
    options = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    elements = [b"CANARY-%d" % number for number in range(40)]
    p = beam.Pipeline("DirectRunner", options=PipelineOptions(options))
    sealed = p | beam.Create(elements) | beam.Reshuffle() | "Seal" >> stages.encrypt()
    equal = (
        p
        | "Same" >> beam.Create([b"same"] * 20)
        | "R" >> beam.Reshuffle()
        | "SIV" >> stages.encrypt(deterministic=True)
    )
    opened = sealed | "Again" >> beam.Reshuffle() | "Open" >> stages.decrypt()
    messages = opened | "Message" >> stages.encrypt(format=MESSAGES, keys=None)
    back = messages | "Read" >> stages.decrypt(format=MESSAGES, keys=None)
    assert_that(back, equal_to(elements))
    assert_that(equal | beam.combiners.Count.PerElement() | beam.Values(), equal_to([20]), label="one envelope")
    p.run().wait_until_finish()
    assert find_plaintext([tmp_path], b"CANARY-") == []


def test_it_runs_on_dask(stages):
    pytest.importorskip("dask")
    pytest.importorskip("distributed")
    from apache_beam.runners.dask.dask_runner import DaskRunner

    with beam.Pipeline(runner=DaskRunner(), options=PipelineOptions([])) as p:
        opened = p | beam.Create([b"a", b"b"]) | stages.encrypt() | stages.decrypt()
        assert_that(opened, equal_to([b"a", b"b"]))


def test_keys_and_stores_may_be_objects(keys, local_key, fake_kms):
    arn = fake_kms.create_key("etl")
    other = LocalKms(local_key.path, "other")
    generate_local_key(other)
    sealed = outcome([EncryptRecords(key=[AwsKms(arn), other], keys=LocalKeyStore(keys))], [b"4111"])
    for key in (f"aws-kms://{arn}", other, [local_key, other]):
        assert outcome([DecryptRecords(key=key, keys=keys)], sealed) == [b"4111"]
