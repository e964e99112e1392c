"""Parquet files with KMS-wrapped keys in the footer: software with a plain KmsClient reads ours, and we read theirs."""

import base64
import io
import json
import re
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from beam_envelope.errors import (
    EnvelopeError,
    FormatError,
    KeyAccessError,
    KeyFileMissingError,
    KmsUnavailableError,
    NotEncryptedError,
    TamperedError,
    TruncatedError,
    WrongKeyError,
)
from beam_envelope.formats.keyfile import key_file_name
from beam_envelope.formats.parquet import create_parquet, open_parquet
from beam_envelope.formats.parquet_footer import KeyMaterial, first_row_group
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.context import ANY_CONTEXT
from tests.formats.parquets import PEOPLE, SealedParquet
from tests.formats.sealed import names

MAIN, PII, GEO = "aws-kms://alias/main", "aws-kms://alias/pii", "aws-kms://alias/team/geo"
COLUMNS = {"ssn": PII, "address.geo": GEO, "visits.list.element.place": PII, "scores": PII}
MATERIAL = rb'\{"keyMaterialType":[^{}]*\}'
DENIED = {
    *("ssn", "visits.list.element.place", "scores.key_value.key", "scores.key_value.value"),
    *("address.geo.lat", "address.geo.lon"),
}


class PlainClient(pe.KmsClient):
    """What other software has: KMS's ciphertext in base64, and the key by the name in the file."""

    def __init__(self, context=None):
        super().__init__()
        self.kms, self.context = boto3.client("kms"), context or {}

    def wrap_key(self, key_bytes, name):
        answer = self.kms.encrypt(KeyId=name, Plaintext=key_bytes, EncryptionContext=self.context)
        return base64.b64encode(answer["CiphertextBlob"]).decode()

    def unwrap_key(self, wrapped, name):
        blob = base64.b64decode(wrapped)
        return self.kms.decrypt(KeyId=name, CiphertextBlob=blob, EncryptionContext=self.context)["Plaintext"]


def read_with_pyarrow(file, columns=None):
    factory = pe.CryptoFactory(lambda _: PlainClient())
    properties = factory.file_decryption_properties(pe.KmsConnectionConfig())
    opened = pq.ParquetFile(io.BytesIO(file), decryption_properties=properties, pre_buffer=False)
    return pa.Table.from_batches(opened.iter_batches(columns=columns, use_threads=False))


def write_with_pyarrow(table=PEOPLE, context=None, footer="alias/main", row_group_size=4, **configuration):
    factory = pe.CryptoFactory(lambda _: PlainClient(context))
    settings = pe.EncryptionConfiguration(footer_key=footer, **configuration)
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), settings)
    stream = io.BytesIO()
    with pq.ParquetWriter(stream, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table, row_group_size)
    return stream.getvalue()


def write(table=PEOPLE, row_group_size=4, **settings):
    stream = io.BytesIO()
    with create_parquet(stream, table.schema, interop=True, **{"key": MAIN, **settings}) as writer:
        writer.write_table(table, row_group_size)
    return stream.getvalue()


def open_file(file, key=(MAIN, PII, GEO), **settings):
    return open_parquet(io.BytesIO(bytes(file)), key=list(key) if isinstance(key, tuple) else key, **settings)


def open_interop(file, key=(MAIN, PII, GEO), **settings):
    return open_file(file, key, interop=True, **settings)


@pytest.fixture(autouse=True)
def kms(fake_kms):
    fake_kms.arns = {name: fake_kms.create_key(name) for name in ("main", "pii", "team/geo")}
    return fake_kms


@pytest.fixture
def calls(kms):
    """Return the calls since the last time."""
    seen = kms.calls

    def since():
        nonlocal seen
        new = kms.calls - seen
        seen = kms.calls
        return dict(new)

    return since


# What is written


@pytest.mark.parametrize("columns", [{}, COLUMNS], ids=["uniform", "by column"])
def test_bare_pyarrow_reads_our_files(columns, calls):
    file = write(columns=columns)
    assert calls() == {"Encrypt": 1 + len(set(columns.values()))}
    table = read_with_pyarrow(file)
    assert (table.to_pylist(), table.schema.metadata) == (PEOPLE.to_pylist(), PEOPLE.schema.metadata)
    assert calls() == {"Decrypt": 1 + len(set(columns.values()))}
    assert b"123-45" not in file


def test_a_reader_who_may_use_one_key_reads_the_other_columns_with_bare_pyarrow(kms):
    file = write(columns=COLUMNS)
    kms.deny("Decrypt", "alias/pii")
    assert read_with_pyarrow(file, ["id", "name"]) == PEOPLE.select(["id", "name"])
    with pytest.raises(Exception, match="AccessDenied"):
        read_with_pyarrow(file, ["ssn"])


def test_key_material_is_that_of_parquets_key_tools(kms):
    file = write(columns={"ssn": f"aws-kms://{kms.arns['pii']}"})
    (document,) = map(json.loads, re.findall(MATERIAL, file))
    wrapped = document.pop("wrappedKEK")
    assert len(boto3.client("kms").decrypt(CiphertextBlob=base64.b64decode(wrapped))["Plaintext"]) == 16
    assert len(base64.b64decode(document.pop("wrappedDEK"))) == 12 + 32 + 16
    assert len(base64.b64decode(document.pop("keyEncryptionKeyID"))) == 16
    assert document == {
        "keyMaterialType": "PKMT1",
        "internalStorage": True,
        "isFooterKey": True,
        "kmsInstanceID": "DEFAULT",
        "kmsInstanceURL": "DEFAULT",
        "masterKeyID": "alias/main",
        "doubleWrapping": True,
    }


def test_each_file_has_keys_of_its_own(calls):
    tokens = {re.search(rb'"wrappedKEK":"([^"]*)"', write())[1] for _ in range(3)}
    assert len(tokens) == 3
    assert calls() == {"Encrypt": 3}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("alias/main", "alias/main"),
        ("arn:aws:kms:us-east-1:111122223333:alias/team/geo", "alias/team/geo"),
        ("1234abcd-12ab-34cd-56ef-1234567890ab", "1234abcd-12ab-34cd-56ef-1234567890ab"),
        ("arn:aws:kms:us-east-1:111122223333:key/mrk-1234", "mrk-1234"),
    ],
)
def test_names_of_kms_keys_go_without_account_and_region(key, name, monkeypatch):
    monkeypatch.setattr(
        AwsKms, "wrap", lambda _self, key, _context: type("Wrapped", (), {"wrapped": bytes(key.material)})
    )
    table = PEOPLE.select(["id", "ssn"])
    file = write(table, key=AwsKms(key, region="us-east-1"), columns={"ssn": "aws-kms://alias/other"})
    assert f'"masterKeyID":"{name}"'.encode() in file


def test_a_path_has_no_key_file(tmp_path):
    path = tmp_path / "a.parquet"
    with create_parquet(path, PEOPLE.schema, key=MAIN, columns=COLUMNS, interop=True) as writer:
        writer.write_table(PEOPLE)
    assert names(tmp_path) == ["a.parquet"]
    with pytest.raises(ValueError, match="its keys are in its footer, not in a key file"):
        _ = writer.key_file
    assert writer.columns["ssn"] == PII
    with open_parquet(path, key=[MAIN, PII, GEO], interop=True) as reader:
        assert reader.read().equals(PEOPLE)
        assert reader.metadata == {b"made by": b"a test"}
        with pytest.raises(ValueError, match="it has no key file"):
            _ = reader.key_file


def test_without_interop_a_reader_is_told_how_to_open_it(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(write())
    with pytest.raises(KeyFileMissingError) as caught:
        open_parquet(path, key=MAIN)
    assert str(caught.value) == (
        f"{path} has no key file: its keys are in its footer, wrapped by a KMS (under 'alias/main'), as interop=True "
        "and other software write it. Open it with open_parquet(..., interop=True)"
    )
    with pytest.raises(ValueError, match="or interop=True if its keys are in its footer"):
        open_file(write())


def test_a_default_file_that_lost_its_key_file_is_no_interop_file(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(SealedParquet(PEOPLE, key=MAIN).file)
    with pytest.raises(KeyFileMissingError, match=r"there is no key file _KEY_FOR_a.parquet.json beside"):
        open_parquet(path, key=MAIN)


def test_the_key_file_of_a_file_that_is_replaced_goes(tmp_path):
    path = tmp_path / "a.parquet"
    with create_parquet(path, PEOPLE.schema, key=MAIN) as writer:
        writer.write_table(PEOPLE)
    with pytest.raises(FileExistsError):
        create_parquet(path, PEOPLE.schema, key=MAIN, interop=True)
    with create_parquet(path, PEOPLE.schema, key=MAIN, interop=True, overwrite=True) as writer:
        assert key_file_name("a.parquet") in names(tmp_path)
    assert names(tmp_path) == ["a.parquet"]
    assert open_parquet(path, key=MAIN, interop=True).num_rows == 0


def test_a_lone_key_file_is_not_taken_over(tmp_path):
    (tmp_path / key_file_name("a.parquet")).write_text("another's")
    with pytest.raises(FileExistsError, match="readers would take it for this file's"):
        create_parquet(tmp_path / "a.parquet", PEOPLE.schema, key=MAIN, interop=True).close()
    assert names(tmp_path) == [key_file_name("a.parquet")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": {"a": "b"}}, "interop=True goes without an encryption context: readers with a plain KmsClient"),
        ({"key": [MAIN, PII]}, rf"not any of several \({MAIN}, {PII}\). Name one"),
        ({"key": None, "columns": {"ssn": PII, "id": MAIN}}, "columns= with different keys needs key="),
        ({"columns": {"ssn": [PII, GEO]}}, "takes one KMS key for the footer and one for each column"),
        ({"columns": {"ssn": f"{MAIN}?region=eu-west-1"}}, "two KMS keys are both called alias/main without"),
        ({"key": "aws-kms://alias/a;b"}, "has no name that Parquet libraries carry. Give it an alias"),
        ({"key": "local-kms://k.json"}, "interop=True is for keys of AWS KMS, .*; not local-kms://.*k.json"),
        ({"key_file": io.BytesIO()}, "with interop=True there is no key file: leave out key_file="),
    ],
)
def test_what_cannot_be_said_is_refused_before_anything_is_made(settings, message, tmp_path, calls):
    with pytest.raises(ValueError, match=message):
        create_parquet(tmp_path / "new" / "a", PEOPLE.schema, interop=True, **{"key": MAIN, **settings})
    assert names(tmp_path) == []
    assert calls() == {}


def test_columns_under_one_key_need_no_other(calls):
    file = write(key=None, columns={"ssn": PII, "address": PII})
    assert calls() == {"Encrypt": 1}
    with open_interop(file, PII) as reader:
        assert reader.read().equals(PEOPLE)
        assert reader.columns["id"] == "plain"
        assert reader.columns["ssn"] == reader.columns["address.zip"] == "readable"


@pytest.mark.parametrize("key", ["alias/main", "alias/pii"])
def test_a_denied_key_is_an_error_of_ours_and_leaves_nothing(kms, key, tmp_path):
    kms.deny("Encrypt", key)
    with pytest.raises(KeyAccessError, match="needs kms:Encrypt on it"):
        create_parquet(tmp_path / "a", PEOPLE.schema, key=MAIN, columns=COLUMNS, interop=True)
    assert names(tmp_path) == []


# What is read: ours, and theirs

WRITERS = {
    "ours": lambda: write(columns=COLUMNS),
    "double": lambda: write_with_pyarrow(column_keys=THEIR_COLUMNS),
    "single": lambda: write_with_pyarrow(column_keys=THEIR_COLUMNS, double_wrapping=False),
    "256 bits": lambda: write_with_pyarrow(column_keys=THEIR_COLUMNS, data_key_length_bits=256),
    "192 bits, single": lambda: write_with_pyarrow(
        column_keys=THEIR_COLUMNS, data_key_length_bits=192, double_wrapping=False
    ),
}
THEIR_COLUMNS = {
    "alias/pii": ["ssn", "visits.list.element.place", "scores"],
    "alias/team/geo": ["address.geo.lat", "address.geo.lon"],
}
DECRYPTS = {"ours": 3, "double": 3, "256 bits": 3, "single": 1 + 5, "192 bits, single": 1 + 5}


@pytest.mark.parametrize("which", WRITERS)
def test_a_file_opens_with_one_decrypt_for_each_wrapped_key(which, calls):
    file = WRITERS[which]()
    calls()
    with open_interop(file) as reader:
        assert calls() == {"Decrypt": 1}
        assert reader.read(["id", "tags"]).equals(PEOPLE.select(["id", "tags"]))
        assert calls() == {}
        table = reader.read()
        assert table.equals(PEOPLE)
        assert (reader.schema, reader.schema.metadata) == (PEOPLE.schema, PEOPLE.schema.metadata)
    assert calls() == {"Decrypt": DECRYPTS[which] - 1}
    with open_interop(file) as reader:
        assert reader.read(filter=pc.field("ssn") == "123-45-0003").num_rows == 1
    assert calls() == {}
    access = {leaf: value for leaf, value in reader.columns.items() if value != "plain"}
    assert set(access.values()) == {"readable"}
    assert access.keys() >= DENIED
    assert (len(access) == len(DENIED)) is (which != "ours")


@pytest.mark.parametrize("bits", [128, 256])
@pytest.mark.parametrize("double", [True, False])
def test_a_uniform_file_of_theirs_opens(bits, double, calls):
    file = write_with_pyarrow(uniform_encryption=True, data_key_length_bits=bits, double_wrapping=double)
    calls()
    with open_interop(file, MAIN) as reader:
        assert reader.read().equals(PEOPLE)
        assert set(reader.columns.values()) == {"readable"}
    assert calls() == {"Decrypt": 1}


@pytest.mark.parametrize("which", WRITERS)
@pytest.mark.parametrize("why", ["not given", "denied", "disabled"])
def test_columns_under_other_keys_are_denied(which, why, kms):
    file = WRITERS[which]()
    keys = (MAIN, PII, GEO)
    if why == "not given":
        keys = (MAIN,)
    for alias in ("alias/pii", "alias/team/geo"):
        if why == "denied":
            kms.deny("Decrypt", alias)
        elif why == "disabled":
            kms.disable_key(alias)
    with open_interop(file, keys) as reader:
        assert {leaf for leaf, access in reader.columns.items() if access == "denied"} == DENIED
        with pytest.raises((KeyAccessError, WrongKeyError), match=r"these columns of .*: ssn .*\(under alias/pii\)"):
            reader.read(["ssn", "id"])
        assert reader.read(["id"]).equals(PEOPLE.select(["id"]))
    with open_interop(file, keys, on_denied="null") as reader:
        assert reader.read(["ssn"]).column("ssn").null_count == 10
        assert reader.read().column("name").equals(PEOPLE.column("name"))
    with open_interop(file, keys, on_denied="drop") as reader:
        assert not {"ssn", "scores", "visits"} & set(reader.read().schema.names)
        with pytest.raises((KeyAccessError, WrongKeyError), match="which the filter needs"):
            reader.read(filter=pc.field("ssn") == "x")


def test_denied_columns_cost_no_more_calls_with_each_file(kms, calls):
    file = WRITERS["double"]()
    kms.deny("Decrypt", "alias/pii")
    calls()
    for _ in range(3):
        with open_interop(file, on_denied="null") as reader:
            reader.read()
    assert calls() == {"Decrypt": 3}
    with open_interop(file, MAIN, on_denied="null") as reader:  # of the names in the file it has one
        reader.read()
    assert calls() == {"Decrypt": 2}


def test_a_kms_that_is_down_is_no_denial(kms):
    file = write(columns=COLUMNS)
    with open_interop(file, on_denied="null") as reader:
        kms.fail(100)
        with pytest.raises(KmsUnavailableError):
            reader.read(["ssn"])


def test_the_callers_keys_decide_and_not_the_file(kms, calls):
    file = write(key=PII)
    calls()
    with pytest.raises(WrongKeyError, match="KMS key alias/main did not wrap the key under alias/pii"):
        open_interop(file, MAIN)
    assert calls() == {"Decrypt": 1}
    other = f"aws-kms://{kms.arns['main']}"
    named_by_id = write(key=f"aws-kms://{kms.arns['pii']}")
    calls()
    with pytest.raises(WrongKeyError, match=r"is encrypted under .*; the keys allowed here are aws-kms://arn"):
        open_interop(named_by_id, other)
    assert calls() == {}  # two ids that differ need no call


def test_the_name_in_a_file_chooses_among_the_callers_keys(kms, calls):
    ids = {name: f"aws-kms://{arn}" for name, arn in kms.arns.items()}
    file = write(columns=COLUMNS)
    calls()
    with open_interop(file, (GEO, PII, MAIN)) as reader:
        assert reader.read().equals(PEOPLE)
    assert calls() == {"Decrypt": 3}
    # An alias in the file and ARNs of the caller's: only KMS knows which is which.
    with open_interop(file, tuple(ids.values())) as reader:
        assert reader.read().equals(PEOPLE)
    assert calls()["Decrypt"] <= 6
    with open_interop(
        write(columns={name: ids[key.partition("alias/")[2]] for name, key in COLUMNS.items()})
    ) as reader:
        assert reader.read().equals(PEOPLE)


def test_a_file_opens_with_the_old_key_after_its_alias_went_to_another(kms):
    file = write(columns=COLUMNS)
    kms.create_key("main")
    with pytest.raises(WrongKeyError):
        open_interop(file)
    assert open_interop(file, (MAIN, PII, GEO, f"aws-kms://{kms.arns['main']}")).read().equals(PEOPLE)


def test_names_that_their_client_made_up_are_tried_with_the_callers_keys():
    class Renaming(PlainClient):
        def wrap_key(self, key_bytes, name):
            return super().wrap_key(key_bytes, {"footer": "alias/main", "people:1": "alias/pii"}[name])

    factory = pe.CryptoFactory(lambda _: Renaming())
    settings = pe.EncryptionConfiguration(footer_key="people:1", uniform_encryption=True)
    stream = io.BytesIO()
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), settings)
    with pq.ParquetWriter(stream, PEOPLE.schema, encryption_properties=properties) as writer:
        writer.write_table(PEOPLE)
    assert open_interop(stream.getvalue()).read().equals(PEOPLE)


def test_the_context_that_their_client_gave_is_given_again():
    context = {"dataset": "theirs"}
    file = write_with_pyarrow(context=context, column_keys=THEIR_COLUMNS)
    assert open_interop(file, context=context).read().equals(PEOPLE)
    clear_caches()
    for wrong in (None, {"dataset": "ours"}):
        with pytest.raises(
            TamperedError, match="or the encryption context is another: give that which the writer gave"
        ):
            open_interop(file, context=wrong)
    with pytest.raises(ValueError, match="does not say its context, so ANY_CONTEXT finds none"):
        open_interop(file, context=ANY_CONTEXT)


def test_a_file_without_row_groups_opens():
    assert open_interop(write(PEOPLE.slice(0, 0), columns=COLUMNS)).read().equals(PEOPLE.slice(0, 0))
    stream = io.BytesIO()
    create_parquet(stream, PEOPLE.schema, key=MAIN, columns=COLUMNS, interop=True).close()
    assert open_interop(stream.getvalue(), MAIN).read().equals(PEOPLE.slice(0, 0))


def test_keys_of_another_kms_open_nothing(local_key):
    with pytest.raises(ValueError, match="interop=True is for keys of AWS KMS"):
        open_interop(write(), local_key)


def test_a_default_file_says_how_it_is_opened(calls):
    file = SealedParquet(PEOPLE, key=MAIN).file
    calls()
    with pytest.raises(FormatError, match=r"has its keys in a key file, not wrapped .* Open it without interop=True"):
        open_interop(file)
    assert calls() == {}
    with pytest.raises(ValueError, match="interop=True opens files without key file: leave out key_file="):
        open_interop(file, key_file=b"")


def test_a_token_that_is_no_ciphertext_of_kms_is_denied(monkeypatch):
    class Mixed(PlainClient):
        def wrap_key(self, key_bytes, name):
            return "vault:v1:..." if name == "transit" else super().wrap_key(key_bytes, name)

    monkeypatch.setattr("tests.formats.test_parquet_interop.PlainClient", Mixed)
    file = write_with_pyarrow(column_keys={"transit": ["ssn"], "alias/pii": ["name"]})
    with open_interop(file, on_denied="drop") as reader:
        assert reader.columns["ssn"] == "denied"
        assert reader.read() == PEOPLE.drop_columns(["ssn"])


def test_what_kms_unwraps_and_is_no_key_is_refused(monkeypatch):
    class Short(PlainClient):
        def wrap_key(self, key_bytes, name):
            return super().wrap_key(key_bytes[:5], name)

    monkeypatch.setattr("tests.formats.test_parquet_interop.PlainClient", Short)
    file = write_with_pyarrow(uniform_encryption=True)
    with pytest.raises(TamperedError, match="what alias/main decrypted has 5 bytes, so it is no key"):
        open_interop(file)


def test_a_reader_passes_the_name_of_its_own_key(kms):
    file = write(key=PII)
    seen = []
    answer = type(kms)._answer

    def spy(self, operation, request, *caller):
        seen.append((operation, request.get("KeyId")))
        return answer(self, operation, request, *caller)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(kms), "_answer", spy)
        open_interop(file, PII)
        with pytest.raises(WrongKeyError):
            open_interop(file, MAIN)
    assert seen == [("Decrypt", "alias/pii"), ("Decrypt", "alias/main")]


def test_the_example_of_the_guide_runs(kms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kms.create_key("everyone")
    guide = (Path(__file__).parents[2] / "docs" / "parquet.md").read_text(encoding="utf-8")
    example = guide.partition("### Keys in the footer")[2].partition("```python\n")[2].partition("```")[0]
    names = {"people": PEOPLE, "create_parquet": create_parquet, "open_parquet": open_parquet}
    exec(compile(example, "parquet.md", "exec"), names)  # noqa: S102  # that is what is tested
    assert names["people"] is not PEOPLE
    assert names["people"].equals(PEOPLE)


# What is refused


@pytest.mark.parametrize(
    ("configuration", "error", "message"),
    [
        ({"encryption_algorithm": "AES_GCM_CTR_V1", "uniform_encryption": True}, FormatError, "AES_GCM_CTR_V1 changed"),
        (
            {"plaintext_footer": True, "column_keys": {"alias/pii": ["ssn"]}},
            NotEncryptedError,
            "is plain Parquet, or has a plain footer",
        ),
    ],
)
def test_forms_that_authenticate_too_little_are_refused(configuration, error, message, calls):
    file = write_with_pyarrow(**configuration)
    calls()
    with pytest.raises(error, match=message):
        open_interop(file)
    assert calls() == {}


def test_external_key_material_is_refused(tmp_path):
    from pyarrow import fs

    factory = pe.CryptoFactory(lambda _: PlainClient())
    settings = pe.EncryptionConfiguration("alias/main", uniform_encryption=True, internal_key_material=False)
    path = tmp_path / "f.parquet"
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), settings, str(path), fs.LocalFileSystem())
    with pq.ParquetWriter(path, PEOPLE.schema, encryption_properties=properties) as writer:
        writer.write_table(PEOPLE)
    with pytest.raises(FormatError, match=r"keeps its wrapped keys in a file of their own"):
        open_parquet(path, key=MAIN, interop=True)


def test_a_file_with_direct_keys_is_refused():
    properties = pe.create_encryption_properties(b"k" * 16)
    stream = io.BytesIO()
    with pq.ParquetWriter(stream, PEOPLE.schema, encryption_properties=properties) as writer:
        writer.write_table(PEOPLE)
    with pytest.raises(FormatError, match="AES_GCM_V1, an encrypted footer and keys that are wrapped in it"):
        open_interop(stream.getvalue())


def test_plain_parquet_in_its_place_is_refused():
    stream = io.BytesIO()
    pq.write_table(PEOPLE, stream)
    with pytest.raises(NotEncryptedError, match="is plain Parquet, or has a plain footer"):
        open_interop(stream.getvalue())


@pytest.mark.parametrize("which", ["ours", "single"])
def test_no_changed_byte_of_the_footer_passes(which):
    table = PEOPLE.select(["id", "ssn"]).slice(0, 4)
    file = (
        write(table, columns={"ssn": PII})
        if which == "ours"
        else write_with_pyarrow(table, column_keys={"alias/pii": ["ssn"]}, double_wrapping=False)
    )
    start = len(file) - 8 - int.from_bytes(file[-8:-4], "little")
    passed = set()
    for place in range(start, len(file)):
        changed = bytearray(file)
        changed[place] ^= 0x01
        try:
            with open_interop(changed) as reader:
                assert reader.read().equals(table)
                passed.add(chr(file[place]))
        except EnvelopeError:
            pass
    # Nothing authenticates the names of KMS keys and instances, nor of fields that nobody reads; the KMS decides.
    assert len(passed) < 40
    document = re.search(MATERIAL, file[start:])
    assert document is not None
    for place in range(document.end() + start, len(file)):
        changed = bytearray(file)
        changed[place] ^= 0x80
        with pytest.raises(EnvelopeError):
            open_interop(changed)


def test_a_file_that_is_cut_is_refused():
    file = write(columns=COLUMNS)
    for size in (0, 3, 4, 11, len(file) // 2, len(file) - 9, len(file) - 1):
        with pytest.raises((TruncatedError, TamperedError)):
            open_interop(file[:size])


def test_a_changed_page_is_refused():
    file = bytearray(write())
    file[40] ^= 1
    with open_interop(file) as reader, pytest.raises(TamperedError, match="was changed after it was written"):
        reader.read()


def test_a_footer_beside_keys_of_another_file_is_refused():
    one, other = (bytearray(write()) for _ in range(2))
    swapped = re.sub(MATERIAL, re.search(MATERIAL, bytes(other))[0], bytes(one))
    with pytest.raises(TamperedError, match="its footer does not open"):
        open_interop(swapped)


LONG_LIST = b"\x19\xf1\xff\xff\xff\xff\xff\xff\xff\x3f"  # of 2**62 - 1 bools


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\x19\xfc", b"\x49\xfc\xff\xff\xff\xff\xff\x7f", b"\x1d" * 99, b"\x1c" * 9999, LONG_LIST]
)
def test_a_footer_that_is_not_thrift_is_refused(data):
    with pytest.raises(FormatError, match="the footer of f cannot be parsed"):
        first_row_group(data, "f")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"x"', b"{}", b'{"keyMaterialType": "PKMT1"}', b"[" * 9999])
def test_key_metadata_of_another_form_is_refused(data):
    with pytest.raises(FormatError, match=r"does not say how its keys are wrapped as Parquet's key tools do"):
        KeyMaterial.parse(data, "f")
