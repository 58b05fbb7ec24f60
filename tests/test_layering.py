"""Data flows one way: which package may import which."""

import ast
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = {"modeling_raft", "flow_data", "flow_training", "flow_inference"}
MAY_IMPORT = {
    "modeling_raft": set(),
    "flow_data": set(),
    "flow_training": {"flow_data", "flow_inference", "modeling_raft"},
    "flow_inference": {"flow_data", "modeling_raft"},
}
KNOW_ACCELERATE = {
    *("train_flow.py", "evaluate_flow.py", "evaluation.py", "checkpoints.py"),
    *("processes.py", "data.py", "logger.py", "run.py"),
}


def imported(path: Path) -> set[str]:
    """Top-level names of what a file imports absolutely, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_import_only_what_is_below_them(package):
    files = list((PROJECT / package).rglob("*.py"))
    assert files
    for path in files:
        others = imported(path) & PACKAGES - {package}
        assert others <= MAY_IMPORT[package], path


def test_the_model_needs_torch_and_transformers_only():
    """What its files import becomes a requirement for everyone who loads a model as remote code."""
    allowed = {
        "torch",
        "transformers",
        "huggingface_hub",
        "numpy",  # transformers depends on it
        *("collections", "copy", "dataclasses", "functools", "io", "math", "os", "pathlib", "typing", "urllib"),
        *("warnings", "zlib"),
    }
    optional = {"PIL", "torchvision", "cv2"}  # under `if is_..._available():`, or in a `try`
    for path in (PROJECT / "modeling_raft").glob("*_raft.py"):
        assert set(get_imports(path)) <= allowed, path
        assert imported(path) <= allowed | optional, path


@pytest.mark.slow
def test_few_files_know_accelerate():
    files = [path for package in PACKAGES for path in (PROJECT / package).rglob("*.py")] + list(PROJECT.glob("*.py"))
    assert {path.name for path in files if "accelerate" in imported(path)} <= KNOW_ACCELERATE
