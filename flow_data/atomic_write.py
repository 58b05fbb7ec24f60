"""Files that are either complete or not there."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a path to write to; its file becomes `path` when the block ends well, and is removed otherwise.

    Args:
        path: Of the file; its folder exists. One that is there is replaced.

    Raises:
        OSError: It cannot be written; the message names `path`.
    """
    # In the same folder, as os.replace must not cross file systems; with the suffix by which Pillow knows the format.
    partial = path.with_name(f".{uuid.uuid4().hex}.tmp{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
