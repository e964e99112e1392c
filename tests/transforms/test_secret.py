"""AwsKmsSecret for Beam's GroupByEncryptedKey."""

import base64
import pickle

import apache_beam as beam
import pytest
from apache_beam.internal.cloudpickle import cloudpickle
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to
from cryptography.fernet import Fernet

from beam_envelope import AwsKmsSecret
from beam_envelope.errors import ContextMismatchError, FormatError, KeyAccessError, TamperedError
from beam_envelope.formats.dataset_key import create_dataset_key
from beam_envelope.formats.keystore import LocalKeyStore
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.provider import kms_calls
from beam_envelope.transforms.secret import SECRET_NAME
from tests.children import Child
from tests.running import listing
from tests.transforms.test_files_secrets import assert_no_secret, payloads

PAIRS = [("a", 1), ("b", 2), ("a", 3), ("c", 4), ("b", 5)]
GROUPED = [("a", [1, 3]), ("b", [2, 5]), ("c", [4])]


@pytest.fixture
def keys(tmp_path):
    return str(tmp_path / "keys")


@pytest.fixture
def secret(fake_kms, keys):
    fake_kms.create_key("etl")
    return AwsKmsSecret(key="aws-kms://alias/etl", keys=keys, context={"job": "orders"})


def group(p, secret):
    pairs = p | beam.Create(PAIRS).with_output_types(tuple[str, int])
    return pairs | beam.GroupByEncryptedKey(secret) | beam.MapTuple(lambda key, values: (key, sorted(values)))


def test_it_groups_and_asks_the_kms_once(secret, fake_kms, keys):
    p = beam.Pipeline("FnApiRunner", options=PipelineOptions([]))
    assert_that(group(p, secret), equal_to(GROUPED))
    p.run().wait_until_finish()
    assert fake_kms.calls == {"GenerateDataKey": 1, "Decrypt": 1}
    assert listing(keys) == [f"_KEY_FOR_{SECRET_NAME}.json"]


def test_worker_processes_group_with_the_same_key(secret, fake_kms):
    options = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    p = beam.Pipeline("DirectRunner", options=PipelineOptions(options))
    assert_that(group(p, secret), equal_to(GROUPED))
    p.run().wait_until_finish()
    assert 1 <= fake_kms.calls["GenerateDataKey"] <= 2  # two that race may both ask, and one of the keys stays
    assert 1 <= fake_kms.calls["Decrypt"] <= 3


def test_its_bytes_are_a_fernet_key_and_always_the_same(secret, fake_kms):
    found = secret.get_secret_bytes()
    assert len(base64.urlsafe_b64decode(found)) == 32
    assert Fernet(found).decrypt(Fernet(found).encrypt(b"x")) == b"x"
    assert secret.get_bytes() == secret.get_str().encode() == found
    assert fake_kms.calls == {"GenerateDataKey": 1, "Decrypt": 1}
    clear_caches()
    assert pickle.loads(pickle.dumps(secret)).get_secret_bytes() == found
    assert fake_kms.calls == {"GenerateDataKey": 1, "Decrypt": 2}
    assert Child(secret.get_secret_bytes).result() == found


def test_processes_that_race_get_the_same_secret(local_key, keys):
    secret = AwsKmsSecret(key=local_key, keys=keys)
    children = [Child(secret.get_secret_bytes) for _ in range(4)]
    assert len({child.result() for child in children}) == 1


def test_other_names_stores_and_contexts_are_other_secrets(local_key, keys, tmp_path):
    secrets = [
        AwsKmsSecret(key=local_key, keys=keys),
        AwsKmsSecret(key=local_key, keys=keys, name="second"),
        AwsKmsSecret(key=local_key, keys=keys, name="third", context={"job": "a"}),
        AwsKmsSecret(key=local_key, keys=str(tmp_path / "more")),
    ]
    assert len({secret.get_secret_bytes() for secret in secrets}) == 4


def test_what_travels_holds_no_key(secret):
    found = secret.get_bytes(cacheSecret=True)
    raw = base64.urlsafe_b64decode(found)
    for pickled in (pickle.dumps(secret), cloudpickle.dumps(secret), repr(secret).encode()):
        assert_no_secret(pickled, found, raw)
    p = beam.Pipeline("FnApiRunner", options=PipelineOptions([]))
    group(p, secret)
    assert_no_secret(payloads(p), found, raw)


def test_it_is_equal_by_its_settings(local_key, keys):
    one, other = (AwsKmsSecret(key=local_key, keys=keys) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != AwsKmsSecret(key=local_key, keys=keys, name="second")
    assert repr(one) == f"AwsKmsSecret(key={local_key}, keys={keys}, name={SECRET_NAME})"


def test_no_key_serves_two_purposes(local_key, keys):
    store = LocalKeyStore(keys)
    create_dataset_key([local_key], store, {}, "dataset")
    with pytest.raises(FormatError, match="is of the cipher record-aes-256-siv"):
        AwsKmsSecret(key=local_key, keys=keys, name="dataset").get_secret_bytes()


def test_what_is_wrong_is_named(secret, fake_kms, keys):
    secret.get_secret_bytes()
    with pytest.raises(ContextMismatchError):
        AwsKmsSecret(key="aws-kms://alias/etl", keys=keys).get_secret_bytes()
    clear_caches()
    fake_kms.deny("Decrypt")
    with pytest.raises(KeyAccessError, match="kms:Decrypt"):
        secret.get_secret_bytes()
    fake_kms.allow("Decrypt")
    store = LocalKeyStore(keys)
    raw = store.get(SECRET_NAME)
    at = raw.index(b'"salt": "') + 9
    store.put(SECRET_NAME, raw[:at] + (b"0" if raw[at : at + 1] != b"0" else b"1") + raw[at + 1 :])
    with pytest.raises(TamperedError):
        secret.get_secret_bytes()


def test_arguments_are_checked_at_once(local_key):
    with pytest.raises(ValueError, match="the name of a key"):
        AwsKmsSecret(key=local_key, keys="keys/", name="a/b")
    with pytest.raises(ValueError, match="keys= is one folder"):
        AwsKmsSecret(key=local_key, keys="")
    kms_calls.counts.clear()
    AwsKmsSecret(key=local_key, keys="keys/")
    assert kms_calls.counts == {}
