"""The Flex Templates: their parameters are the programs' arguments, their files agree, and what they launch runs."""

import json
import re
from pathlib import Path

import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from packaging.requirements import Requirement

import pipelines
from beam_envelope import open_shard
from pipelines.dataflow.launch import launch
from pipelines.dataflow.metadata import FOLDER, metadata_of, text_of
from pipelines.dataflow.parameters import TEMPLATES, parameters_of, words_of

ROOT = Path(pipelines.__file__).parent.parent
IMAGE = ROOT / "pipelines" / "dataflow"
KEYS = {"name", "label", "helpText", "isOptional", "regexes", "paramType", "enumOptions", "defaultValue", "groupName"}
NEEDED = ["--input=gs://raw/*", "--output=gs://sealed/", "--key=aws-kms://alias/etl", "--sdk_container_image=r/i:1"]
SETTINGS = ["--output=gs://sealed/", "--key=aws-kms://alias/etl"]


# ------------------------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_metadata_files_are_those_of_the_arguments(template):
    assert (FOLDER / f"{template}.json").read_text() == text_of(template), (
        "the arguments of a program have changed: run `python -m pipelines.dataflow.metadata`"
    )


def test_there_are_no_other_metadata_files():
    assert {path.name for path in FOLDER.iterdir()} == {f"{template}.json" for template in TEMPLATES}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_metadata_have_the_form_that_dataflow_documents(template):
    metadata = metadata_of(template)
    assert set(metadata) == {"name", "description", "streaming", "parameters"}
    assert metadata["description"].endswith(".")
    names = [parameter["name"] for parameter in metadata["parameters"]]
    assert len(set(names)) == len(names)
    for parameter in metadata["parameters"]:
        assert set(parameter) <= KEYS
        assert re.fullmatch(r"[a-z][a-z0-9_]*", parameter["name"])
        assert parameter["label"]
        assert parameter["helpText"]
        assert isinstance(parameter["isOptional"], bool)
        assert parameter["paramType"] in {"TEXT", "NUMBER", "BOOLEAN", "ENUM"}
        assert ("enumOptions" in parameter) == (parameter["paramType"] == "ENUM")
        (regex,) = parameter["regexes"]
        assert regex.startswith("^")
        assert regex.endswith("$")
        if "defaultValue" in parameter:
            assert re.match(regex, parameter["defaultValue"])
        for option in parameter.get("enumOptions", ()):
            assert re.match(regex, option["value"])


def test_the_parameters_that_a_template_needs():
    needed = {
        template: [one.name for one in parameters_of(template) if not one.optional and one.name != "key"]
        for template in TEMPLATES
    }
    assert needed == {
        "encrypt": ["input", "output", "sdk_container_image"],
        "decrypt": ["input", "output", "sdk_container_image"],
        "rotate": ["input", "from", "sdk_container_image"],
        "verify": ["input", "sdk_container_image"],
    }


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_secret_is_a_parameter(template):
    for parameter in parameters_of(template):
        assert not re.search(r"secret|password|token|credential|access_key|session_token", parameter.name)
        assert "local-kms" not in parameter.text, "no worker has the launcher's keyring"
        assert "--" not in parameter.text, "the console knows no options"


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_parameter_has_the_name_of_another_option_of_beam(template):
    taken = set(PipelineOptions([]).get_all_options()) - {"dry_run"}  # the launcher never gives Beam's
    ours = {one.name for one in parameters_of(template) if not one.name.startswith(("sdk_", "s3_", "envelope_"))}
    assert ours & taken == set()


@pytest.mark.parametrize(
    ("name", "fits", "does_not"),
    [
        ("input", ["gs://raw/*", "gs://a/x s3://b/**", '["s3://a/b c.csv"]'], ["data/*.csv", "gs://a\n"]),
        ("output", ["s3://sealed/"], ["sealed/", ""]),
        ("key", ["aws-kms://alias/etl", "hcvault://transit/keys/etl"], ["local-kms://keyring.json", "alias/etl"]),
        ("format", ["shard", "parquet"], ["csv", "parquet "]),
        ("header_lines", ["1"], ["-1", "one"]),
        ("cells", ["true", "false"], ["yes"]),
    ],
)
def test_regexes(name, fits, does_not):
    (parameter,) = [one for one in parameters_of("encrypt") if one.name == name]
    for text in fits:
        assert re.match(parameter.regex, text), text
    for text in does_not:
        assert not re.fullmatch(parameter.regex, text), text


# ----------------------------------------------------------------------------------------------- parameters


def test_parameters_become_arguments():
    given = [*NEEDED, "--if_exists=skip", "--split_lines=256MiB", "--runner=DataflowRunner", "--job_name=j"]
    words = words_of("encrypt", given)
    assert words[0] == "gs://raw/*"
    assert words[-2:] == ["--runner=DataflowRunner", "--job_name=j"]
    assert sorted(words[1:-2]) == sorted(
        ["--sdk_container_image=r/i:1", *SETTINGS, "--split-lines=256MiB", "--if-exists=skip"]
    )


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a=1", ["a=1"]),
        (" a=1  b=2\n", ["a=1", "b=2"]),
        ('["a=1 2", "b=3"]', ["a=1 2", "b=3"]),
        ("[0-9]=1", ["[0-9]=1"]),
        ("[1, 2]", ["[1,", "2]"]),
    ],
)
def test_texts_that_hold_several(text, values):
    words = words_of("encrypt", [*NEEDED, f"--context={text}"])
    assert [word for word in words if word.startswith("--context")] == [f"--context={value}" for value in values]


def test_flags_are_true_or_false_and_empty_texts_nothing():
    assert "--cells" in words_of("encrypt", [*NEEDED, "--cells=true"])
    for text in ("false", "", " "):
        assert not [word for word in words_of("encrypt", [*NEEDED, f"--cells={text}"]) if "cells" in word]
    assert not [word for word in words_of("encrypt", [*NEEDED, "--relative_to="]) if "relative" in word]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([*NEEDED, "--cells=yes"], "the parameter cells is true or false, not 'yes'"),
        (NEEDED[1:], "the parameter input is missing"),
        (NEEDED[:-1], "the parameter sdk_container_image is missing: The image of the workers"),
    ],
)
def test_wrong_parameters_end_the_launch(given, message, capsys):
    with pytest.raises(SystemExit) as ended:
        words_of("encrypt", given)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- launch


def test_what_is_launched_runs(tmp_path, local_key, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a b.csv").write_text("a,b\n1,2\n")
    key = f"--key=local-kms://{local_key.path}"
    common = [key, '--context=["owner=Data Team", "dataset=flights"]', "--sdk_container_image=r/i:1"]
    common.append("--direct_num_workers=1")
    sealed, opened = tmp_path / "sealed", tmp_path / "opened"

    monkeypatch.setenv("BEAM_ENVELOPE_PIPELINE", "encrypt")
    inputs = json.dumps([str(tmp_path / "data" / "a b.csv")])
    launch([f"--input={inputs}", f"--output={sealed}", "--if_exists=error", *common]).wait_until_finish()
    context = {"owner": "Data Team", "dataset": "flights"}
    assert open_shard(sealed / "a b.csv", key=local_key, context=context).read() == b"a,b\n1,2\n"

    monkeypatch.setenv("BEAM_ENVELOPE_PIPELINE", "decrypt")
    launch([f"--input={sealed}/*", f"--output={opened}", *common]).wait_until_finish()
    assert (opened / "a b.csv").read_text() == "a,b\n1,2\n"

    monkeypatch.setenv("BEAM_ENVELOPE_PIPELINE", "verify")
    launch([f"--input={sealed}", f"--log={tmp_path}/log", "--quick=true", *common]).wait_until_finish()
    rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted((row["kind"], row["ok"]) for row in rows) == [("manifest", True), ("shard", True)]


def test_an_image_without_a_program_says_so(monkeypatch):
    monkeypatch.delenv("BEAM_ENVELOPE_PIPELINE", raising=False)
    with pytest.raises(ValueError, match=r"^BEAM_ENVELOPE_PIPELINE is one of encrypt, decrypt, rotate, verify, not ''"):
        launch(NEEDED)


# ---------------------------------------------------------------------------------------------------- image


@pytest.fixture(scope="module")
def pins():
    """The pinned versions of the image, by name."""
    lines = (IMAGE / "requirements.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    return {one.name.lower().replace("_", "-").replace(".", "-"): one.specifier for one in found}


def test_every_requirement_of_the_image_is_one_version(pins):
    assert len(pins) > 50
    for name, specifier in pins.items():
        assert re.fullmatch(r"==[0-9][0-9a-z.+]*", str(specifier)), name


def test_the_image_has_all_that_the_package_needs(pins):
    (block,) = re.findall(
        r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )
    dependencies = re.findall(r'^    "(.*?)"', block, re.MULTILINE)
    assert len(dependencies) > 4
    for dependency in map(Requirement, dependencies):
        name = dependency.name.lower().replace(".", "-")
        version = str(pins[name]).removeprefix("==")
        assert dependency.specifier.contains(version), f"{dependency} and {name} {version}"


def test_beam_is_that_of_the_image_that_it_starts_from(pins):
    (beam,) = re.findall(r"^FROM apache/beam_python3\.11_sdk:(\S+)$", (IMAGE / "Dockerfile").read_text(), re.MULTILINE)
    assert str(pins["apache-beam"]) == f"=={beam}"


def test_what_the_image_copies_is_there():
    dockerfile = (IMAGE / "Dockerfile").read_text()
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert "pyproject.toml" in sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    (program,) = re.findall(r"^ENV FLEX_TEMPLATE_PYTHON_PY_FILE=/template/(.*)$", dockerfile, re.MULTILINE)
    assert (ROOT / program).is_file()
