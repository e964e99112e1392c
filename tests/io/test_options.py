"""EnvelopeOptions: an argument comes before the option, the option before the environment, for every setting."""

import re
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from beam_envelope import (
    ANY_CONTEXT,
    AwsKms,
    AwsKmsSecret,
    DecryptFiles,
    DecryptRecords,
    DecryptTables,
    EncryptFiles,
    EncryptRecords,
    EncryptTables,
    EnvelopeOptions,
    ReadEncryptedParquet,
    ReadEncryptedText,
    VerifyShards,
    WriteEncryptedFiles,
    WriteEncryptedParquet,
    WriteEncryptedText,
    open_key,
    open_parquet,
)
from beam_envelope.arguments import parse_context
from beam_envelope.io.options import current_settings
from beam_envelope.keys.aws_credentials import s3_identity
from beam_envelope.keys.defaults import environment, option
from beam_envelope.settings import chosen_keys, expected_context, settings_of, written_context
from tests.running import listing, read_files

ROLE = "arn:aws:iam::111122223333:role/{}"
ARGUMENT, OPTION, ENVIRONMENT = "aws-kms://argument", "aws-kms://option", "aws-kms://environment"
AWS = ("region", "profile", "endpoint_url", "role_arn", "external_id", "session_name", "web_identity", "audience")


def options(*words, **settings):
    FileSystems.set_options(PipelineOptions(list(words), **settings))


def test_the_order_is_argument_option_environment_for_keys(monkeypatch):
    with pytest.raises(
        ValueError, match=r"^no key is set: pass key='aws-kms://alias/NAME' \(--key\), give --envelope_key"
    ):
        chosen_keys(None)
    monkeypatch.setenv("BEAM_ENVELOPE_KEY", f"{ENVIRONMENT} aws-kms://second")
    assert chosen_keys(None) == (open_key(ENVIRONMENT), open_key("aws-kms://second"))
    options(f"--envelope_key={OPTION}")
    assert chosen_keys(None) == (open_key(OPTION),)
    assert chosen_keys(ARGUMENT) == (open_key(ARGUMENT),)


def test_the_order_is_argument_option_environment_for_contexts(monkeypatch):
    assert written_context(None) == expected_context(None) == {}
    monkeypatch.setenv("BEAM_ENVELOPE_CONTEXT", "from=environment,b=2")
    assert written_context(None) == expected_context(None) == {"b": "2", "from": "environment"}
    options("--envelope_context=from=option", "--envelope_context=c=3,4")
    assert written_context(None) == expected_context(None) == {"c": "3,4", "from": "option"}
    assert written_context({"from": "argument"}) == expected_context({"from": "argument"}) == {"from": "argument"}
    assert written_context({}) == expected_context({}) == {}, "no context is said, too"


@pytest.mark.parametrize("where", ["option", "environment"])
def test_readers_take_any_context_where_it_is_set_and_no_context_is_given(where, monkeypatch):
    if where == "option":
        options("--envelope_any_context", "--envelope_context=a=b")
    else:
        monkeypatch.setenv("BEAM_ENVELOPE_ANY_CONTEXT", "1")
    assert expected_context(None) is ANY_CONTEXT
    assert settings_of(key=ARGUMENT, missing="").expected_context is ANY_CONTEXT
    assert settings_of(key=ARGUMENT, any_context=False, context={}, missing="").expected_context == {}
    assert expected_context({}) == {}
    assert expected_context(ANY_CONTEXT) is ANY_CONTEXT


@pytest.mark.parametrize("name", AWS)
def test_the_order_is_argument_option_environment_for_aws(name, monkeypatch):
    value = {"role_arn": ROLE.format, "web_identity": lambda _: "google"}.get(name, str)
    assert getattr(AwsKms("alias/etl")._full(), name) is None
    monkeypatch.setenv(f"BEAM_ENVELOPE_AWS_{name.upper()}", value("environment"))
    assert getattr(AwsKms("alias/etl")._full(), name) == value("environment")
    assert getattr(open_key("aws-kms://alias/etl"), name) is None, "it stays on the machine whose environment it is"
    options(f"--envelope_aws_{name}={value('option')}")
    assert getattr(AwsKms("alias/etl")._full(), name) == value("option")
    assert getattr(open_key("aws-kms://alias/etl"), name) == value("option"), "it goes along to the workers"
    assert getattr(open_key(AwsKms("alias/etl")), name) == value("option")
    given = AwsKms("alias/etl", **{name: value("argument")})
    assert getattr(given._full(), name) == getattr(open_key(given), name) == value("argument")


def test_the_role_for_s3_is_an_option_too(monkeypatch):
    options(f"--envelope_aws_role_arn={ROLE.format('etl')}")
    assert s3_identity().role_arn is None
    options(f"--envelope_aws_role_arn={ROLE.format('etl')}", "--envelope_aws_role_for_s3")
    assert s3_identity().role_arn == ROLE.format("etl")


def test_options_reach_a_process_in_each_form_that_beam_gives_them():
    words = PipelineOptions([f"--envelope_key={OPTION}", "--envelope_context=a=b"])
    plain = {"envelope_key": [OPTION], "envelope_context": ["a=b"]}
    forms = [words, PipelineOptions([], **plain), plain, PipelineOptions.from_dictionary(words.get_all_options())]
    # A YAML pipeline's `options:` may hold texts and mappings as well.
    forms += [PipelineOptions([], envelope_key=OPTION, envelope_context={"a": "b"})]
    forms += [PipelineOptions([], envelope_key=OPTION, envelope_context="a=b")]
    for form in forms:
        FileSystems.set_options(form)
        assert (chosen_keys(None), written_context(None)) == ((open_key(OPTION),), {"a": "b"})
        assert current_settings(form) == settings_of(missing="")
    FileSystems.set_options(None)
    assert option("key") is None


def test_an_option_that_is_changed_later_holds_from_then_on():
    changing = PipelineOptions([f"--envelope_key={OPTION}"])
    FileSystems.set_options(changing)
    assert chosen_keys(None) == (open_key(OPTION),)
    changing.view_as(EnvelopeOptions).envelope_key = [ARGUMENT]
    assert chosen_keys(None) == (open_key(ARGUMENT),)


TRANSFORMS = {
    "EncryptFiles": lambda: EncryptFiles("out").work,
    "DecryptFiles": lambda: DecryptFiles("out").work,
    "EncryptTables": lambda: EncryptTables("out").work,
    "DecryptTables": lambda: DecryptTables("out").work,
    "EncryptRecords": lambda: EncryptRecords(keys="keys")._keys,
    "DecryptRecords": lambda: DecryptRecords(keys="keys")._keys,
    "EncryptMessages": lambda: EncryptRecords(format="aws-encryption-sdk")._keys,
    "DecryptMessages": lambda: DecryptRecords(format="aws-encryption-sdk")._keys,
    "WriteEncryptedText": lambda: WriteEncryptedText("out")._settings,
    "ReadEncryptedText": lambda: ReadEncryptedText("out", validate=False),
    "WriteEncryptedParquet": lambda: WriteEncryptedParquet("out")._settings,
    "ReadEncryptedParquet": lambda: ReadEncryptedParquet("out", validate=False),
    "WriteEncryptedFiles": lambda: WriteEncryptedFiles("out", sink=beam.io.fileio.TextSink())._settings_of,
    "VerifyShards": lambda: VerifyShards().verifier,
    "AwsKmsSecret": lambda: AwsKmsSecret(keys="keys"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_without_a_key_takes_what_is_set_along(name):
    with pytest.raises(ValueError, match=r"^no key is set: "):
        TRANSFORMS[name]()
    options(
        f"--envelope_key={OPTION}", "--envelope_context=from=option", f"--envelope_aws_role_arn={ROLE.format('etl')}"
    )
    pickled = beam.internal.pickler.dumps(TRANSFORMS[name](), enable_trace=False)
    options()  # as on a worker that options do not reach
    held = _texts(beam.internal.pickler.loads(pickled))
    assert {"option", ROLE.format("etl"), "from"} <= held


def _texts(thing, seen=None):
    """Return all texts that an object holds."""
    seen = set() if seen is None else seen
    if isinstance(thing, str):
        return {thing}
    if id(thing) in seen:
        return set()
    seen.add(id(thing))
    if isinstance(thing, dict):
        parts = [*thing.keys(), *thing.values()]
    elif isinstance(thing, (list, tuple, set, frozenset)):
        parts = list(thing)
    elif type(thing).__module__.startswith(("beam_envelope", "apache_beam.io", "apache_beam.options")):
        slots = (getattr(thing, name, None) for name in getattr(type(thing), "__slots__", ()))
        parts = [*vars(thing).values(), *slots] if hasattr(thing, "__dict__") else list(slots)
    else:
        parts = []
    return set().union(*(_texts(part, seen) for part in parts)) if parts else set()


def test_a_pipeline_encrypts_and_decrypts_with_nothing_but_options(tmp_path, local_key):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("hello")
    given = PipelineOptions([f"--envelope_key={local_key}", "--envelope_context=dataset=test", "--runner=FnApiRunner"])
    with beam.Pipeline(options=given) as p:
        _ = p | beam.Create([f"{tmp_path}/in/*"]) | EncryptFiles(f"{tmp_path}/sealed")
    with beam.Pipeline(options=given) as p:
        _ = p | beam.Create([f"{tmp_path}/sealed/*"]) | DecryptFiles(f"{tmp_path}/opened")
    assert read_files(tmp_path / "opened") == {"a.txt": b"hello"}


def test_a_yaml_pipeline_takes_the_same_names(tmp_path, local_key):
    pytest.importorskip("docstring_parser", reason="needs apache-beam[yaml]")
    from apache_beam.yaml import main

    path = tmp_path / "pipeline.yaml"
    path.write_text(
        "pipeline:\n  type: chain\n  transforms:\n"
        "    - {type: Create, config: {elements: [{name: a, amount: 1}, {name: b, amount: 2}]}}\n"
        "    - type: PyTransform\n"
        "      config:\n        constructor: beam_envelope.WriteEncryptedParquet\n"
        f"        kwargs: {{prefix: {tmp_path}/sealed/part}}\n"
        f'options: {{envelope_key: "{local_key}", envelope_context: ["dataset=yaml"]}}\n'
    )
    main.run([f"--yaml_pipeline_file={path}", "--runner=FnApiRunner"])
    (name,) = [name for name in listing(tmp_path / "sealed") if name.endswith(".parquet")]
    with open_parquet(tmp_path / "sealed" / name, key=local_key, context={"dataset": "yaml"}) as file:
        assert file.read().num_rows == 2


# The page that lists them


def test_the_page_lists_each_option_with_its_environment_variable():
    page = Path(__file__).parents[2].joinpath("docs", "configuration.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `--(envelope_\w+)[^`]*` \| `(BEAM_ENVELOPE_\w+)[^`]*` \|", page, re.MULTILINE))
    names = EnvelopeOptions([]).get_all_options(current_only=True)
    assert rows == {name: f"BEAM_{name.upper()}" for name in names}


def test_no_option_takes_a_secret():
    names = set(EnvelopeOptions([]).get_all_options(current_only=True))
    assert names == {
        "envelope_key",
        "envelope_context",
        "envelope_any_context",
        "envelope_aws_role_for_s3",
        *(f"envelope_aws_{name}" for name in AWS),
    }


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("BEAM_ENVELOPE_KEY", "")
    assert environment("key") is None
    assert parse_context([]) == {}
