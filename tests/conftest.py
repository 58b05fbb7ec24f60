"""Where the real samples are, and the process settings that tests share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports the Hub's client: no test may reach for the network, or be slowed by trying.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

PROJECT = Path(__file__).resolve().parents[1]
SHARED = PROJECT.parent / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="of the tests marked gpu (default: cuda where there is one, else cpu)")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":  # all other tests are of the CPU, on a machine with a GPU too
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """Folder of real pairs with ground truth; it lies beside a checkout and is never part of it."""
    return _present(SHARED / "data")


@pytest.fixture(scope="session")
def sample_weights() -> Path:
    """Folder of original checkpoints, which lies there, too."""
    return _present(SHARED / "weights")


@pytest.fixture
def default_signals() -> Iterator[None]:
    """For this test, the handlers of a program that a terminal starts: below nohup, say, some signals are ignored."""
    defaults = dict.fromkeys((signal.SIGTERM, signal.SIGHUP), signal.SIG_DFL) | {
        signal.SIGINT: signal.default_int_handler
    }
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _present(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f"the sample files are not there: {folder.relative_to(PROJECT.parent)}")
    return folder
