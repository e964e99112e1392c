"""Every transform and every program of ours on every engine: what is written is read again, and nothing leaks."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from beam_envelope.keys.cache import clear_caches
from beam_envelope.testing import find_plaintext
from tests.engines.branches import BRANCHES, CANARY, KEY, N_FILES, NEW_KEY, OTHER_KEY, expected, prepare, read_back
from tests.engines.leaks import LeakWatch

REFUSED = "did not wrap this data key. Give the key that the key file names"
SETTINGS = ["--envelope_key={key}", "--envelope_context=dataset=people"]

MANIFEST = 1  # one more file in each dataset, which is rotated and verified too


class Outcome(NamedTuple):
    """What a job did."""

    error: str | None
    calls: dict
    leaks: list


class Run:
    """The jobs of one engine, each run when a test first asks for it.

    Engines that are slow to submit to have all branches in one job; the others have a job for each.
    """

    def __init__(self, engine, place, kms):
        self.engine, self.place, self._kms = engine, place, kms
        self.folder = engine.folder
        self._outcomes = {}

    def group(self, name):
        """Return the branches that share a job with a branch."""
        return list(BRANCHES) if self.engine.slow else [name]

    def outcome(self, step, name):
        """Run a step of a branch, unless it was, and return what the job did."""
        group = self.group(name)
        if step == "wrong key":
            group = [name]
        elif step == "wrong keys":
            group = [name for name in BRANCHES if BRANCHES[name].handler or name == "verify"]
        job = (step, *group)
        if job not in self._outcomes:
            self._outcomes[job] = self._run(step, group)
        return self._outcomes[job]

    def _run(self, step, group):
        key = OTHER_KEY if step.startswith("wrong") else KEY
        settings = [word.format(key=key) for word in SETTINGS] if self.engine.options_reach_workers else []
        before = self._kms.calls
        if step != "encrypt":
            error, leaks = self.engine.run(step, group, self.place, *settings), []
        else:
            with LeakWatch([self.engine.folder], CANARY.encode()) as watch:
                error = self.engine.run(step, group, self.place, *settings)
            assert watch.looked_into, "the engine made no file, not even a log?"
            leaks = sorted(watch.found)
        return Outcome(error, dict(self._kms.calls - before), leaks)


@pytest.fixture(scope="session")
def run(engine, kms, tmp_path_factory):
    """The jobs of an engine."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in kms.environment().items():
            patch.setenv(name, value)
        clear_caches()
        prepare(place)
        clear_caches()
    return Run(engine, place, kms)


@pytest.fixture
def cell(request, record_property):
    """Which cell of the matrix a test is about."""
    name = request.node.callspec.params.get("name") or request.function.cell
    record_property("cell", [name, request.node.callspec.params["engine"]])


def of(program):
    """Say which row of the matrix a test is about."""

    def mark(function):
        function.cell = program
        return function

    return mark


@pytest.mark.usefixtures("cell")
@pytest.mark.parametrize("name", BRANCHES)
class TestTransform:
    def test_it_encrypts_and_nothing_leaks(self, run, name):
        outcome = run.outcome("encrypt", name)
        assert outcome.error is None
        assert outcome.leaks == []
        assert find_plaintext([run.place / name / "sealed", run.place / name / "keys"], CANARY.encode()) == []
        assert outcome.calls.get("GenerateDataKey", 0) <= sum(BRANCHES[each].bundles for each in run.group(name))

    def test_what_it_wrote_is_read_again(self, run, name):
        data_keys = run.outcome("encrypt", name).calls.get("GenerateDataKey", 0)
        outcome = run.outcome("decrypt", name)
        assert outcome.error is None
        assert read_back(run.place, name) == expected(run.place, name)
        there_before = N_FILES * len({"rotate", "verify"}.intersection(run.group(name)))
        assert 0 < outcome.calls["Decrypt"] <= (data_keys + there_before) * run.engine.workers

    def test_a_wrong_key_is_refused_with_our_error(self, run, name):
        if name == "envelope+file" and not run.engine.options_reach_workers:
            pytest.skip("the key of these workers is in their environment")
        if name == "verify" or (run.engine.slow and BRANCHES[name].handler):
            outcome = run.outcome("wrong keys", name)
            assert outcome.error is None
            opened = run.place / name / "opened"
            reasons = [line for path in opened.glob("*") for line in path.read_text().splitlines()]
            assert reasons
            assert all(REFUSED in reason for reason in reasons)
            assert name == "verify" or all(reason.startswith("WrongKeyError: ") for reason in reasons)
        elif run.engine.slow and name != "text":
            pytest.skip("one failing job is enough where jobs are slow to submit")
        else:
            error = run.outcome("wrong key", name).error
            assert error is not None
            assert "WrongKeyError: " in error
            assert REFUSED in error


@pytest.mark.usefixtures("cell")
class TestProgram:
    """`python -m pipelines.NAME ... --runner=...`, one after the other."""

    @of("pipelines.encrypt")
    def test_encrypt(self, run):
        words = ["--output", run.place / "programs/sealed", "--key", KEY, "--context", "dataset=people"]
        with LeakWatch([run.engine.folder, run.place / "programs"], CANARY.encode()) as watch:
            status, said = run.engine.command("pipelines.encrypt", run.place / "files/data", *words)
        assert status == 0, said
        assert watch.found == set()

    @of("pipelines.decrypt")
    def test_decrypt_with_a_wrong_key(self, run):
        words = ["--output", run.place / "programs/wrong", "--key", OTHER_KEY, "--context", "dataset=people"]
        words += ["--no-check"]  # by the launcher: the job is to meet it
        status, said = run.engine.command("pipelines.decrypt", run.place / "programs/sealed", *words)
        assert status == 1
        assert "WrongKeyError: " in said
        assert REFUSED in said
        assert not list(Path(run.place, "programs").glob("wrong/*"))

    @of("pipelines.rotate")
    def test_rotate(self, run):
        log = run.place / "programs/rotate.jsonl"
        words = ["--from", KEY, "--to", NEW_KEY, "--log", log]
        status, said = run.engine.command("pipelines.rotate", run.place / "programs/sealed", *words)
        assert status == 0, said
        assert [json.loads(line)["changed"] for line in log.read_text().splitlines()] == [True] * (N_FILES + MANIFEST)

    @of("pipelines.verify")
    def test_verify(self, run):
        log = run.place / "programs/verify.jsonl"
        words = ["--key", NEW_KEY, "--context", "dataset=people", "--log", log]
        status, said = run.engine.command("pipelines.verify", run.place / "programs/sealed", *words)
        assert status == 0, said
        assert [json.loads(line)["ok"] for line in log.read_text().splitlines()] == [True] * (N_FILES + MANIFEST)

    @of("pipelines.decrypt")
    def test_decrypt(self, run):
        words = ["--output", run.place / "programs/opened", "--key", NEW_KEY, "--context", "dataset=people"]
        status, said = run.engine.command("pipelines.decrypt", run.place / "programs/sealed", *words)
        assert status == 0, said
        opened = {path.name: path.read_bytes() for path in Path(run.place, "programs/opened").iterdir()}
        assert opened == expected(run.place, "files")
