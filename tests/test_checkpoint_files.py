"""Files of weights: what other programs save beside the weights, what is no weights at all, and what asks for code."""

import argparse
import collections
import datetime
import decimal
import fractions
import gzip
import io
import os
import pathlib
import pickle
import random
import sys
import tarfile
import types
import uuid
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modeling_raft.checkpoint_files import STAND_INS, few, read_weight_file

WEIGHTS = {"conv.weight": torch.arange(12.0).reshape(3, 4), "norm.num_batches_tracked": torch.tensor(2**60 + 1)}


def assert_weights(read):
    assert read.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


class Reduced:
    """Pickled as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


HARMLESS = {
    "arguments": argparse.Namespace(lr=1e-4, out=pathlib.Path("x"), device=torch.device("cuda"), type=int),
    "namespace": types.SimpleNamespace(dtype=torch.float16, size=torch.Size([1, 2])),
    "paths": [pathlib.Path("a/b"), pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("c:/a")],
    "dates": [
        datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=1))),
        datetime.date(2026, 1, 1),
        datetime.time(1),
        datetime.timedelta(days=1),
    ],
    "dictionaries": [
        collections.defaultdict(list, a=[1]),
        collections.OrderedDict(a=1),
        collections.Counter("aab"),
        collections.deque([0.5, np.float32(1)], maxlen=20),
        {np.int64(3): 1},
    ],
    "builtins": [{1}, frozenset([1]), 1j, range(3), slice(1), b"abc", bytearray(b"abc"), 2**80, float, None],
    "numbers": [decimal.Decimal("0.1"), fractions.Fraction(1, 3), uuid.UUID(int=3)],
    "numpy scalars": [
        np.float64(1.5),
        np.float32(1),
        np.int64(3),
        np.bool_(True),
        np.str_("a"),
        np.datetime64("2026"),
    ],
    "numpy arrays": [np.eye(3), np.asfortranarray(np.ones((2, 3))), np.array([1, "a", None], object)],
    "numpy types": [np.dtype("float32"), np.float16, np.zeros(2, [("a", "f4"), ("b", "i8")])],
    "random states": [random.getstate(), np.random.get_state(), np.random.default_rng(0), torch.get_rng_state()],
    "version": torch.__version__,
    "scheduler of torch 1": {"anneal_func": Reduced(getattr, torch.optim.lr_scheduler.OneCycleLR, "_annealing_cos")},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", HARMLESS)
def test_what_lies_beside_the_weights_does_not_matter(kind, zipped, tmp_path):
    path = tmp_path / "file.pth"
    torch.save({"model": WEIGHTS, kind: HARMLESS[kind]}, path, _use_new_zipfile_serialization=zipped)
    assert_weights(read_weight_file(path)["model"])


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("pathlib._local.PosixPath", object),  # Python 3.13
        ("pathlib._local.WindowsPath", object),
        ("easydict.EasyDict", dict),
        ("yacs.config.CfgNode", dict),
        ("pytorch_lightning.utilities.parsing.AttributeDict", dict),
        ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", object),
        ("omegaconf.dictconfig.DictConfig", object),
    ],
)
def test_classes_of_libraries_that_are_not_installed(name, base, tmp_path, monkeypatch):
    module, _, qualified = name.rpartition(".")
    other = type(qualified, (base,), {"__module__": module})
    with monkeypatch.context() as patch:
        parts = module.split(".")
        for i in range(len(parts)):
            patch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(parts[i]))
        setattr(sys.modules[module], qualified, other)
        thing = other({"model": WEIGHTS}) if base is dict else other()
        thing.name = "something"
        torch.save({"thing": thing, "model": WEIGHTS, other: "as a key"}, tmp_path / "file.pth")
    read = read_weight_file(tmp_path / "file.pth")
    assert_weights(read["model"])
    if base is dict:
        assert_weights(read["thing"]["model"])  # which may be where the weights are


def test_names_of_numpy_1(tmp_path):
    path = tmp_path / "file.pth"
    torch.save({"epe": np.float64(1.5), "a": np.eye(2), **WEIGHTS}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    read = read_weight_file(path)
    assert_weights({name: read[name] for name in WEIGHTS})


class Network(torch.nn.Linear):
    pass


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (Reduced(os.system, "touch executed"), "system"),
        (Reduced(eval, "open('executed', 'w')"), "eval"),
        (Reduced(print, "executed"), "print"),
        (Reduced(pathlib.Path.touch, pathlib.Path("executed")), "pathlib.Path"),
        (Network(2, 2), "test_checkpoint_files.Network"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (os.path.join, "posixpath.join"),
    ],
)
def test_what_asks_for_code_is_named_and_refused(thing, name, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": WEIGHTS, "thing": thing}, "file.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"^file\.pth asks for [\w.]+, which is no weight, and is refused") as error:
        read_weight_file("file.pth")
    assert name in str(error.value) and "save only the state dict" in str(error.value)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert not os.path.exists("executed")


def test_no_class_of_a_library_is_made(tmp_path):
    """An array of objects over a buffer of bytes follows raw addresses; that of NumPy itself would crash here."""
    address = np.array([2**40], "<i8").tobytes()
    thing = Reduced(np.ndarray, (1,), np.dtype(object), address)
    torch.save({"model": WEIGHTS, "thing": thing}, tmp_path / "file.pth")
    read = read_weight_file(tmp_path / "file.pth")
    assert_weights(read["model"])
    assert repr(read["thing"]).startswith("<modeling_raft.checkpoint_files._Discarded")


def test_what_a_process_allows_itself_is_left_as_it_was(tmp_path):
    # One without the other: were both at work, NumPy's function would be called with a stand-in for its type.
    mine = [np._core.multiarray.scalar]
    torch.serialization.add_safe_globals(mine)
    try:
        torch.save({"model": WEIGHTS, "epe": np.float64(1.5)}, tmp_path / "file.pth")
        torch.save({"thing": Reduced(print)}, tmp_path / "other.pth")
        assert_weights(read_weight_file(tmp_path / "file.pth")["model"])
        with pytest.raises(ValueError, match="refused"):
            read_weight_file(tmp_path / "other.pth")
        assert set(mine) <= set(torch.serialization.get_safe_globals())
        assert not set(STAND_INS) & set(torch.serialization.get_safe_globals())
    finally:
        torch.serialization.clear_safe_globals()


def zip_of(names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return buffer.getvalue()


def tar_of(names):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><title>Quota\n exceeded</title></html>", r'is a web page \("Quota exceeded"\)'),
        (b"\xef\xbb\xbf\n <HTML lang='en'><body>Not found</body>", "is a web page, not weights"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3984814\n", "is a Git LFS pointer"),
        (b'{"metadata": {"total_size": 1}, "weight_map": {}}', 'is text that begins \'{"metadata"'),
        (b"Entry not found\nplease", "is text that begins 'Entry not found', not weights"),
        (gzip.compress(b"weights", mtime=0), "is a compressed archive"),
        (tar_of(["raft-things.pth"]), "is a tar archive: unpack it"),
        (tar_of(["sys_info", "pickle", "storages", "tensors"]), "format that torch wrote until 2016"),
        (
            zip_of(["models/raft-things.pth", "models/raft-small.pth"]),
            r"zip archive of models/raft-things\.pth, models",
        ),
        (
            zip_of(["net/data.pkl", "net/constants.pkl", "net/code/net.py"]),
            "is a TorchScript program, which is refused",
        ),
        (pickle.dumps({"fnet.conv1.weight": np.zeros(9)}), "is a pickle that torch.save did not write; it is refused"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file"),
        (b"\x93NUMPY\x01\x00" + bytes(99), "is an array of NumPy"),
        (bytes(5000), "holds nothing but zeros"),
        (bytes(range(256)), r"is no file of weights that is known here \(256 bytes\)"),
    ],
)
def test_what_is_no_weights_is_called_what_it_is(content, message, tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_weight_file(path)
    assert str(error.value).startswith(f"{path} ") and "\n" not in str(error.value)


def test_no_file_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^no such file: .*missing\.pth$"):
        read_weight_file(tmp_path / "missing.pth")
    with pytest.raises(IsADirectoryError, match="is a folder, not a file of weights"):
        read_weight_file(tmp_path)


def write(path, kind):
    if kind == "safetensors":
        save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_formats_are_known_by_their_content(kind, tmp_path):
    for name in ("file.pth", "FILE.PTH", "best.pth.tar", "last.ckpt", "pytorch_model.bin", "model.safetensors", "x"):
        write(tmp_path / name, kind)
        assert_weights(read_weight_file(tmp_path / name))


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_that_is_cut_anywhere_says_so(kind, tmp_path):
    write(tmp_path / "whole", kind)
    content = (tmp_path / "whole").read_bytes()
    path = tmp_path / "cut.pth"
    for length in {*range(1, len(content), 37), len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError) as error:
            read_weight_file(path)
        assert str(error.value).startswith(f"{path} ") and "weights_only" not in str(error.value)
        if length > 40:
            assert "cut short" in str(error.value), (length, error.value)


def test_damage_and_other_protocols_are_no_advice_to_run_code(tmp_path):
    path = tmp_path / "file.pth"
    torch.save({**WEIGHTS, "path": pathlib.Path("x")}, path, pickle_protocol=4)
    with pytest.raises(ValueError, match="is pickled in another protocol than torch.save's own, 2"):
        read_weight_file(path)
    write(path, "legacy")
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    failures = 0
    for position in rng.integers(0, len(content), 200):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            read_weight_file(path)
        except (ValueError, OSError) as error:
            failures += 1
            assert str(error).startswith(f"{path} ") and "\n" not in str(error) and "weights_only" not in str(error)
    assert failures > 50


def test_names_in_messages_stay_on_their_line():
    assert few(["a", "b"]) == "a, b"
    assert few(["a", "b", "c", "d", "e"]) == "a, b, c, and 2 more"
    assert few(["two\nlines\x1b[31m"]) == r"'two\nlines\x1b[31m'"
    assert len(few(["long" * 1000])) == 120
