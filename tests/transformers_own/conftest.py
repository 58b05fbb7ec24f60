"""Makes the tests of the installed transformers importable: `make test-hf` fetches them (fetch_tests.py).

The source distribution has the files at the top of `tests/`, not the folders that some of them import from. What is
imported from there stands here, in its smallest form.
"""

import sys
from types import ModuleType
from typing import Any

import pytest
from fetch_tests import PACKAGE, tests_folder

MARKERS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test")

# A value other than the default for every field that all configurations share.
COMMON_FIELDS: dict[str, Any] = {
    "output_hidden_states": True,
    "return_dict": False,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "is_encoder_decoder": True,
    "architectures": ["RaftForOpticalFlow"],
    "id2label": {0: "still", 1: "moving"},
    "label2id": {"still": 0, "moving": 1},
    "problem_type": "regression",
}


class ExportTesterMixin:
    """Tests of transformers' exporters; tests/test_export_onnx.py tests our export."""


class GenerationTesterMixin:
    """Tests of models that generate text; only asked whether a test class is one of these."""


def url_to_local_path(url: str) -> str:
    raise OSError(f"no test reaches for the network: {url}")


STAND_INS: dict[str, dict[str, Any]] = {
    f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    f"{PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": COMMON_FIELDS},
    "fetch_hub_objects_for_ci": {"url_to_local_path": url_to_local_path},
}


def pytest_configure(config: pytest.Config) -> None:
    if not tests_folder().is_dir():
        raise pytest.UsageError("the tests of transformers are not there: run them by `make test-hf`")
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: a mark of transformers' tests")
    sys.path.insert(0, str(tests_folder()))
    for name, contents in STAND_INS.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(contents)
