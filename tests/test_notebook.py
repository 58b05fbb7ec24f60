"""examples/optical_flow.ipynb runs from top to bottom, in a kernel of its own, and is committed with small outputs."""

import json
import os
import re

import pytest
from conftest import PROJECT

NOTEBOOK = PROJECT / "examples" / "optical_flow.ipynb"
SMALLER = {  # what is replaced, so that the test takes seconds
    r"^STEPS = 100$": "STEPS = 2",
    r"--synthetic_num_pairs 12\"": '--synthetic_num_pairs 2"',
    r"^pairs = list\(FlowVideo\(model, VIDEO, max_side=256\)\)$": (
        "pairs = list(FlowVideo(model, VIDEO, max_side=128, num_flow_updates=2))"
    ),
    r"outputs/notebook": "{folder}/notebook",
}


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="notebooks need nbclient and ipykernel, of the extra test")
    nbclient = pytest.importorskip("nbclient", reason="notebooks need nbclient and ipykernel, of the extra test")
    pytest.importorskip("ipykernel", reason="notebooks need nbclient and ipykernel, of the extra test")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for pattern, replacement in SMALLER.items():
        count = 0
        for cell in notebook.cells:
            replaced = replacement.replace("{folder}", str(tmp_path))
            cell.source, found = re.subn(pattern, lambda match, text=replaced: text, cell.source, flags=re.MULTILINE)
            count += found
        assert count, pattern
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(PROJECT)}})
    client.execute()
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "flow (2, 256, 384)" in text and "after 2 steps" in text
    assert (tmp_path / "notebook" / "model.safetensors").is_file()


def test_the_committed_outputs_are_small_and_of_no_machine():
    """Images are there to be seen where notebooks are only shown; nothing names a folder of a machine."""
    assert os.path.getsize(NOTEBOOK) < 600_000
    notebook = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert not [output for output in outputs if output["output_type"] == "error"]
    words = "".join(map(json.dumps, (output.get("text", "") for output in outputs)))
    assert not re.search(r"/(home|root|tmp|work|usr)/", words)
    assert re.search(r"end-point error [\d.]+ px after 100 steps", words)
