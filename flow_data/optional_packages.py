"""Packages that only some installations have, and the extra of setup.cfg that brings them."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PROJECT = "raft-flow-trainer"
TRAIN_PACKAGES = ("accelerate", "cv2", "datasets", "psutil", "pyarrow")  # what commands of the extra `train` import


class MissingPackageError(ImportError):
    """A package of an extra is not installed; the message is one line that says how to install it."""


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Import packages of an extra: `with needs_extra("video"): import av`.

    Args:
        extra: Its name in setup.cfg.

    Raises:
        MissingPackageError: In the block, a package was imported that is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None:  # transformers' for whatever went wrong in an import, memory that ran out for example
            raise
        package = error.name.partition(".")[0]
        raise MissingPackageError(_describe_missing(package, extra), name=error.name) from error


def require_packages(prog: str) -> None:
    """Exit with one line where the extra `train` is not installed. It takes no time: nothing is imported.

    Args:
        prog: Name of the command.
    """
    for package in TRAIN_PACKAGES:
        if importlib.util.find_spec(package) is None:
            sys.exit(f"{prog}: error: {_describe_missing(package, 'train')}")


def _describe_missing(package: str, extra: str) -> str:
    return f"{package} is not installed; install it with: pip install '{PROJECT}[{extra}]'"
