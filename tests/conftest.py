"""For all tests."""

import gc
import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support.amounts import Amounts
from support.amounts import amounts as amounts_of
from support.diagonal import beside_it
from support.left_behind import left_behind, own_temporary_folder
from support.order import dealt

# The same examples each time, however long a busy machine takes for one.
settings.register_profile("here", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What is too long for every run."""
    parser.addoption(
        "--long", action="store_true", help="full amounts where tests move data or count operations: 1 GiB, not 16 MiB"
    )
    parser.addoption("--quick", action="store_true", help="a fraction of CI's amounts (tests/support/amounts.py)")


_OWN_FOLDER = pytest.StashKey[Path]()
_LEFT = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """The run has a temporary folder of its own; xdist's workers have that of the process that started them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.stash[_OWN_FOLDER] = own_temporary_folder()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Where there was no session, as with ``--help``, nothing has looked at that folder and removed it."""
    if (folder := config.stash.get(_OWN_FOLDER, None)) is not None:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is read here stays: the collector would go through ever more of it, a fifth of the time that this takes."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(tryfirst=True, specname="pytest_collection_modifyitems")
def pytest_mark_what_is_beside_the_diagonal(items: list[pytest.Item]) -> None:
    """See `support.diagonal`; before pytest looks at the marks that ``-m`` names."""
    for item in beside_it(with_parameters(items)):
        item.add_marker(pytest.mark.variant)


def with_parameters(items: list[pytest.Item]) -> Iterator[tuple[pytest.Item, str, dict[str, tuple[int, ...]]]]:
    """The items of a diagonal, the name of their test, and which object each of its parameters is.

    Without those over libvfio-user: where that is missing they are skipped, and stand for nothing.
    """
    for item in items:
        mark = item.get_closest_marker("diagonal")
        if mark is not None and isinstance(item, pytest.Function) and "libvfio-user" not in item.name:
            # By identity: a value need not be hashable, and is the same object in all of the product.
            params = {names: tuple(id(item.callspec.params[name]) for name in names.split(",")) for names in mark.args}
            yield item, item.nodeid.partition("[")[0], params


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several workers begin with what takes long: a virtual machine."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        items[:] = dealt(items, workers, lambda item: item.get_closest_marker("qemu") is not None)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run that leaves files or processes behind has failed. (xdist's workers have ended here.)"""
    if (folder := session.config.stash.get(_OWN_FOLDER, None)) is None:
        return
    session.config.stash[_LEFT] = left = left_behind(folder)
    if left and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left behind."""
    if left := config.stash.get(_LEFT, []):
        terminalreporter.section("left behind by the tests", red=True)
        for line in left:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def long_run(request: pytest.FixtureRequest) -> bool:
    """Whether full amounts are wanted (``--long``), not those that a run of the whole suite has time for."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="session")
def amounts(request: pytest.FixtureRequest) -> Amounts:
    """How much to do of what could go on for as long as one likes."""
    option = request.config.getoption
    return amounts_of(long=bool(option("--long")), quick=bool(option("--quick")))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Garbage of earlier tests goes now: collected later, its descriptors would vanish while a test counts its own.

    What is not garbage lives until the end of the session (modules, caches, reports), and is not looked at again:
    else this took most of the time of a quick test.
    """
    gc.collect()
    gc.freeze()
