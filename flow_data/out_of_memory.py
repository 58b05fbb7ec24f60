"""Errors of running out of memory, whichever library raised them: recognized, and explained in one line."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

# Python, NumPy, Pillow, PyArrow and PyAV raise a MemoryError, torch an OutOfMemoryError for some devices. The rest can
# be recognized by their text only: torch's allocator of the CPU (in two wordings), CUDA and its libraries, MPS,
# OpenCV, C++, the loader of shared libraries, oneDNN, whose code is made at run time, and what torch cannot raise
# again of what a worker has raised.
TYPE_NAMES = ("MemoryError", "OutOfMemoryError")
TEXTS = re.compile(
    r"DefaultCPUAllocator: (can't allocate memory|not enough memory)|(CUDA|HIP|XPU|MPS backend) out of memory|"
    r"CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED|Insufficient memory|std::bad_alloc|"
    r"failed to map segment from shared object|could not create a primitive$|"
    r"Caught [\w.]*MemoryError in DataLoader worker"
)
REQUEST = re.compile(r"(?:tried to|Unable to|Failed to) allocate ([\d.]+) ?(bytes|[KMGTP]i?B)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, is that memory ran out, of the machine or of a GPU."""
    return any(
        any(kind.__name__ in TYPE_NAMES for kind in type(link).__mro__)
        or (isinstance(link, OSError) and link.errno == errno.ENOMEM)
        or TEXTS.search(str(link)) is not None
        for link in _chain(error)
    )


@contextmanager
def attempt(description: str) -> Iterator[None]:
    """Note in an out-of-memory error what was attempted: for `explain_out_of_memory`, and below its traceback.

    Args:
        description: A noun phrase, with the sizes that memory depends on.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) and not _notes(error):
            error.add_note(description)
        raise


def explain_out_of_memory(error: BaseException, attempted: str, advice: str) -> str | None:
    """One line for the user where memory ran out; None for any other error.

    Args:
        error: As it was caught.
        attempted: A noun phrase, for errors in which `attempt` has noted nothing.
        advice: Whole sentences: what needs less memory.
    """
    if not is_out_of_memory(error):
        return None
    notes = next((notes for link in _chain(error) if (notes := _notes(link))), [attempted])
    return f"out of memory in {'; '.join(notes)}{_details(error)}. {advice}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and the errors that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def _details(error: BaseException) -> str:
    """The size of the failed allocation, or the error's first line, in brackets."""
    texts = [str(link).strip() for link in _chain(error)]
    request = next((match for text in texts if (match := REQUEST.search(text))), None)
    if request is not None:
        return f" (an allocation of {_size(request[1], request[2])} failed)"
    return f" ({texts[-1].splitlines()[0]})" if texts[-1] else ""


def _size(number: str, unit: str) -> str:
    number = number.rstrip(".")
    if unit != "bytes":
        return f"{number} {unit}"
    return f"{float(number) / 1e9:.2f} GB" if float(number) >= 1e9 else f"{float(number) / 1e6:.1f} MB"
