"""Fixtures of the engines. `make engines` builds them, `make test-engines` runs these tests, `make test` neither."""

import contextlib
import os
import signal
import threading

import pytest

from beam_envelope.testing import FakeKms
from tests.engines import build
from tests.engines.engine import ENGINES, start_engine
from tests.engines.flink import FlinkCluster
from tests.engines.matrix import Matrix
from tests.engines.server import children, stop_all, tail
from tests.engines.worker_pool import WorkerPool

NEEDS = {
    "Prism": ["prism"],
    "pool": ["container"],
    "Flink": ["flink", "container"],
    "Spark": ["spark", "container"],
}
_matrix = Matrix()


def pytest_configure(config):
    """Let a polite end of the tests end the engines too."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)


def _end(*_):
    """End the other processes of the tests, or the servers, as well; SIGINT may be ignored, as in the background."""
    for child in children(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
    raise KeyboardInterrupt


def pytest_unconfigure(config):
    """Leave no process behind, whatever happened."""
    stop_all()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Begin with the longest single tests, so that none of several processes is left alone with them."""
    items.sort(key=lambda item: item.path.stem not in {"test_kills", "test_s3_for_real"})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of several processes, let one have all tests of an engine."""
    from xdist.scheduler import LoadScopeScheduling

    class ByEngine(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            function, _, parameters = nodeid.partition("[")
            named = [name for name in ENGINES if name in parameters]
            return max(named, key=len, default=function)  # the name of one is the beginning of another's

    return ByEngine(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Show the ends of the engine's logs where a test failed."""
    report = yield
    folders = [getattr(item.funcargs.get(name), "folder", None) for name in ("engine", "run", "flink_cluster")]
    for folder in dict.fromkeys(folders):
        if report.failed and folder is not None:
            for log in sorted(folder.rglob("*.log")):
                report.sections.append((f"the end of {log}", tail(log)))
    return report


def pytest_runtest_logreport(report):
    """Note what became of the cells of the matrix that a test has as its property `cell`."""
    if report.when == "call" or report.outcome != "passed":
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.outcome == "skipped" else ""
        for name, cell in report.user_properties:
            if name == "cell":
                _matrix.add(cell, report.outcome, reason)


def pytest_sessionfinish(session):
    """Note what ran in the JSON file that BEAM_ENVELOPE_MATRIX names, if it is set."""
    path = os.environ.get("BEAM_ENVELOPE_MATRIX")
    if path and not hasattr(session.config, "workerinput"):
        _matrix.save(path)


@pytest.fixture(scope="session")
def kms():
    """A strict KMS over HTTP, which counts the calls of all processes, with the keys `etl`, `new` and `other`."""
    with FakeKms() as kms:
        for name in ("etl", "new", "other"):
            kms.create_key(f"alias/{name}")
        yield kms


@pytest.fixture(scope="session", params=list(ENGINES))
def engine(request, kms, tmp_path_factory):
    """Each engine in turn; skipped if it was not built."""
    wanted = {part for word, parts in NEEDS.items() if word in request.param for part in parts}
    if missing := sorted(wanted.intersection(build.missing())):
        pytest.skip(f"{', '.join(missing)} not built: run `make engines`")
    folder = tmp_path_factory.mktemp("engine")
    engine = start_engine(request.param, folder, kms.environment())
    yield engine
    engine.close()


@pytest.fixture
def worker_pool(kms, tmp_path):
    """An external worker pool with Beam's boot program."""
    if "container" in build.missing():
        pytest.skip("container is not built: run `make engines`")
    pool = WorkerPool(tmp_path / "pool", boot=True, environment=kms.environment())
    yield pool
    pool.stop()


@pytest.fixture
def flink_cluster(kms, tmp_path):
    """A Flink cluster of one JobManager and two TaskManagers, for tests that kill parts of it."""
    if {"flink", "container"}.intersection(build.missing()):
        pytest.skip("flink is not built: run `make engines`")
    cluster = FlinkCluster(tmp_path / "flink", environment=kms.environment())
    yield cluster
    cluster.stop()
