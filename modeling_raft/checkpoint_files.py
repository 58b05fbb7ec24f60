"""Read files of weights of any origin by their content, not by their suffix, without running code in them.

Pickles are read by torch's restricted unpickler (`weights_only=True`). It refuses even harmless objects that training
scripts save beside the weights: arguments, paths, dates, numbers of NumPy. Here, the class of each such object is
replaced by a stand-in that accepts anything and keeps nothing, so neither the class nor its library is needed or run.
(Allowing the classes themselves would be unsafe: `numpy.ndarray` can be made of raw addresses.) Other classes are
refused.
"""

import json
import os
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# The pickled integer with which every file of torch.save began until torch 1.6 changed to zip archives.
LEGACY_TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
ARCHIVES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf\x27\x1c", b"Rar!", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, ...
BINARY_FORMATS = {
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"\x93NUMPY": "an array of NumPy",
    b"GGUF": "a GGUF file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
}
GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
CONTROL_CHARACTERS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # that do not occur in text
# Opcodes of pickle protocols 3 to 5, which torch's restricted unpickler does not know.
LATER_OPCODES = {ord("B"), ord("C"), *range(0x8C, 0x99)}
MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, the format's own limit
RETRY = "download or copy it again"
DAMAGED = f"is cut short or damaged: {RETRY}"


class _Discarded:
    """Stand-in for an object that is not needed."""

    def __new__(cls, *args: Any) -> "_Discarded":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _PlainDict:
    """Stand-in for subclasses of dict: a dictionary whose items are read, since they may be the weights."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


class _PlainList:
    """Stand-in for deque, in which training loops keep their latest losses: the unpickler appends to lists only."""

    def __new__(cls, *args: Any) -> Any:
        return []


def _discard_attribute(*args: Any) -> type[_Discarded]:
    """Stand-in for getattr, by which pickles refer to methods, as those of OneCycleLR of torch 1 do."""
    return _Discarded


def _names(module: str, names: str) -> list[str]:
    return [f"{module}.{name}" for name in names.split()]


DISCARDED = [
    "argparse.Namespace",
    "types.SimpleNamespace",
    *("decimal.Decimal", "fractions.Fraction", "uuid.UUID"),
    *_names("builtins", "bool bytes dict float frozenset int list object range slice str tuple"),
    *_names("datetime", "date datetime time timedelta timezone"),
    *_names("pathlib", "PosixPath PurePosixPath PureWindowsPath WindowsPath"),
    *_names("pathlib._local", "PosixPath PurePosixPath PureWindowsPath WindowsPath"),  # Python 3.13
    *_names("numpy", "dtype ndarray bool bool_ bytes_ str_ complex64 complex128 float16 float32 float64 longdouble"),
    *_names("numpy", "int8 int16 int32 int64 longlong uint8 uint16 uint32 uint64 ulonglong datetime64 timedelta64"),
    *_names("numpy._core.multiarray", "_reconstruct scalar"),
    *_names("numpy.core.multiarray", "_reconstruct scalar"),  # NumPy 1
    *_names("numpy.random", "_mt19937.MT19937 _pcg64.PCG64 _philox.Philox"),
    *_names("numpy.random.bit_generator", "SeedSequence __pyx_unpickle_SeedSequence"),
    *_names("numpy.random._pickle", "__bit_generator_ctor __generator_ctor __randomstate_ctor"),
    *_names("torch", "optim.lr_scheduler.OneCycleLR torch_version.TorchVersion"),
    # Configurations that trainers keep: Hydra's, and the classes of callbacks that Lightning once used as keys.
    *_names("omegaconf", "base.ContainerMetadata base.Metadata listconfig.ListConfig nodes.AnyNode nodes.BooleanNode"),
    *_names("omegaconf.nodes", "BytesNode FloatNode IntegerNode PathNode StringNode"),
    "omegaconf.dictconfig.DictConfig",
    "typing.Any",
    *_names("pytorch_lightning.callbacks", "early_stopping.EarlyStopping model_checkpoint.ModelCheckpoint"),
]
PLAIN_DICTS = [
    "collections.defaultdict",
    "addict.addict.Dict",
    "easydict.EasyDict",
    "yacs.config.CfgNode",
    *_names("pytorch_lightning.utilities.parsing", "AttributeDict"),
    *_names("lightning_fabric.utilities.data", "AttributeDict"),
]
STAND_INS: list[Any] = [
    *((_Discarded, name) for name in DISCARDED),
    *((_PlainDict, name) for name in PLAIN_DICTS),
    (_PlainList, "collections.deque"),
    (_discard_attribute, "builtins.getattr"),
]


def read_weight_file(path: str | os.PathLike[str]) -> Any:
    """Read a file of weights: its tensors, on the CPU, in the dictionaries and lists in which they were saved.

    Args:
        path: A file of safetensors or of `torch.save`, of any version and name.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: The file cannot be opened.
        ValueError: The file is of another format, incomplete, or refers to code; the message, of one line, names the
            file and the reason.
    """
    path = Path(path)
    if check_weight_file(path) == "safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is a damaged safetensors file ({error}): {RETRY}") from error
    try:
        # Opened here, since torch would take a file named .safetensors for that format.
        with path.open("rb") as file, _only_stand_ins(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that old formats cause
            return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # damaged files raise errors of many types
        reason = DAMAGED if _has_broken_pickle(path) else _describe_failure(str(error))
        raise ValueError(f"{path} {reason}") from None


def check_weight_file(path: Path) -> str:
    """Recognize the format of a file of weights, "safetensors" or "torch", by its first bytes and its size.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: The file cannot be opened.
        ValueError: The file is of neither format, or incomplete; the message describes it.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file of weights")
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    if not head:
        raise ValueError(f"{path} is empty: {RETRY}")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_SAFETENSORS_HEADER:
        _check_safetensors(path)
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
    elif LEGACY_TORCH_MAGIC not in head[:32]:
        raise ValueError(f"{path} {_describe_foreign(head, path.stat().st_size)}")
    return "torch"


def few(names: list[str], shown: int = 3) -> str:
    """List the first names and how many more there are, for messages; names of any content become printable."""
    names = [name if name.isprintable() and len(name) <= 120 else ascii(name)[:120] for name in names]
    more = f", and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _check_safetensors(path: Path) -> None:
    """Raise ValueError where a file is shorter than its header says, or the header is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    needed = 8 + length
    if len(header) == length:
        try:
            entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
            needed += max((entry["data_offsets"][1] for entry in entries), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError(f"{path} is a damaged safetensors file, whose header cannot be read: {RETRY}") from None
    if size < needed:
        raise ValueError(f"{path} is cut short: {size:,} bytes of a safetensors file of at least {needed:,}; {RETRY}")


def _check_zip(path: Path) -> None:
    """Raise ValueError unless a zip archive is one of torch.save.

    Raises:
        ValueError: The file is cut short, a TorchScript program, or another archive; the message says which.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        size = path.stat().st_size
        raise ValueError(f"{path} is cut short or damaged: it ends after {size:,} bytes; {RETRY}") from None
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        raise ValueError(
            f"{path} is a TorchScript program, which is refused since loading it runs its code: "
            "save the state dict of the model with the program that wrote it"
        )
    if "data.pkl" not in inner:
        raise ValueError(f"{path} is a zip archive of {few(names)}: unpack it and give the file of weights in it")


def _describe_foreign(head: bytes, size: int) -> str:
    """Describe a file that holds no weights by its first bytes, and what to do about it."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    lower = text.lower()
    if lower.startswith(GIT_LFS_POINTER):
        return (
            "is a Git LFS pointer, not the weights: run `git lfs pull` in its repository, or download the file itself"
        )
    if lower.startswith(b"<"):
        kind = "a web page" if re.search(rb"<!doctype html|<(html|head|body|title)\b", lower) else "XML"
        title = re.search(rb"<title[^>]*>([^<]*)", text, re.IGNORECASE)
        heading = " ".join(title[1].decode(errors="replace").split())[:60] if title else ""
        quoted = f' ("{heading}")' if heading else ""
        return f"is {kind}{quoted}, not weights: the server has answered with it; download the file again"
    if head.startswith(ARCHIVES):
        return "is a compressed archive: unpack it and give the file of weights in it"
    if head[257:262] == b"ustar":
        if head[:8].rstrip(b"\0") in (b"sys_info", b"pickle", b"storages", b"tensors"):
            return "is in the .tar format that torch wrote until 2016, which it cannot read safely: save it again"
        return "is a tar archive: unpack it and give the file of weights in it"
    for magic, kind in BINARY_FORMATS.items():
        if head.startswith(magic):
            return f"is {kind}, not weights of PyTorch"
    if not head.strip(b"\0"):
        return f"holds nothing but zeros, as interrupted downloads do: {RETRY}"
    if head[0] == 0x80 and head[1:2] <= b"\x05" and len(head) > 32:
        return (
            "is a pickle that torch.save did not write; it is refused, since unpickling can run code: "
            "save the state dict with torch.save in the program that wrote it"
        )
    if not CONTROL_CHARACTERS.search(head):
        line = text.decode(errors="replace").partition("\n")[0].strip()
        return f"is text that begins {line[:40]!r}, not weights"
    if b"onnx" in lower or b"pytorch" in lower[:64]:
        return "is an ONNX model: its weights cannot be converted back"
    return f"is no file of weights that is known here ({size:,} bytes), or is damaged: {RETRY}"


def _describe_failure(message: str) -> str:
    """Describe why torch has not read a file. Its own messages are not used: they recommend running its code."""
    if name := re.search(r"GLOBAL ([\w.]+)", message):
        return (
            f"asks for {name[1]}, which is no weight, and is refused, since it could run code: "
            "save only the state dict with the program that wrote the file"
        )
    if (operand := re.search(r"Unsupported operand (\d+)", message)) and int(operand[1]) in LATER_OPCODES:
        return (
            "is pickled in another protocol than torch.save's own, 2, which cannot be read safely: "
            "save it again without pickle_protocol"
        )
    if "WeightsUnpickler error" in message or "Weights only load failed" in message:
        return (
            "holds objects that are no weights, and is refused, since they could run code; or it is damaged: "
            "save only the state dict with the program that wrote the file"
        )
    return DAMAGED


def _has_broken_pickle(path: Path) -> bool:
    """Whether a file that is not a zip archive is cut off or damaged within the four pickles at its beginning."""
    if zipfile.is_zipfile(path):
        return False
    with path.open("rb") as file:
        try:
            for _ in range(4):  # magic number, protocol, system information, and the object itself
                for _ in pickletools.genops(file):
                    pass
        except Exception:  # damaged arguments of opcodes raise errors of many types
            return True
    return False


@contextmanager
def _only_stand_ins() -> Iterator[None]:
    """Temporarily allow torch to unpickle the stand-ins only, instead of what the process has allowed."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(STAND_INS):
            yield
    finally:
        torch.serialization.add_safe_globals(before)
