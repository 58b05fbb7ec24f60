"""The project installed as a wheel, used from a folder that is no checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

from flow_data.shipped_files import find_config, shipped_path


class Installation:
    """The project in an environment of its own, whose dependencies are those of the tests."""

    def __init__(self, folder: Path):
        source = folder / "source"  # a copy: building leaves files behind
        shutil.copytree(
            PROJECT, source, ignore=shutil.ignore_patterns(".*", "outputs", "tests", "build", "*.egg-info")
        )
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        install += ["--ignore-installed"]  # else pip takes the project out of the environment that runs the tests
        subprocess.run([*install, "--prefix", folder / "prefix", source], check=True, capture_output=True)
        shutil.rmtree(source)
        self.prefix, self.elsewhere = folder / "prefix", folder / "elsewhere"
        self.elsewhere.mkdir()
        (self.packages,) = self.prefix.rglob("site-packages")

    def run(self, code: str) -> str:
        """What a Python program prints that sees this installation, and the checkout not at all."""
        start = f"import sys; sys.path = [{str(self.packages)!r}] + [p for p in sys.path if p]\n"
        result = subprocess.run(
            [sys.executable, "-P", "-c", start + code],
            cwd=self.elsewhere,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": ""},
        )
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def installation(tmp_path_factory) -> Installation:
    return Installation(tmp_path_factory.mktemp("installation"))


@pytest.mark.slow
def test_shipped_files_travel_with_an_installation(installation):
    names = [
        "model_card.md",
        "configs",
        *(str(path.relative_to(PROJECT)) for path in PROJECT.glob("configs/**/*.yaml")),
        *(str(path.relative_to(PROJECT)) for path in PROJECT.glob("pretrained/*/*")),
        *(str(path.relative_to(PROJECT)) for path in PROJECT.glob("examples/frames/*.png")),
    ]
    assert len(names) > 15
    printed = installation.run(
        "import flow_data.shipped_files as shipped\n"
        "print(shipped.__file__)\n"
        f"for name in {names!r}: print(shipped.shipped_path(name))\n"
        "from flow_data.synthetic.textures import list_images\n"
        "print(len(list_images('examples/frames')))\n"
        "print(shipped.find_config('chairs'))"
    ).splitlines()
    module, *paths, num_frames, chairs = printed
    assert num_frames == "8"
    assert Path(module).is_relative_to(installation.prefix)
    for name, path in zip(names, map(Path, paths), strict=True):
        assert path == installation.prefix / "share/raft-flow-trainer" / name
        assert path.is_dir() or path.read_bytes() == (PROJECT / name).read_bytes()
    assert Path(chairs).read_bytes() == (PROJECT / "configs/chairs.yaml").read_bytes()


@pytest.mark.slow
def test_commands_and_type_hints_travel_with_an_installation(installation):
    for command, module in (("predict-flow", "predict_flow"), ("evaluate-flow", "evaluate_flow")):
        script = (installation.prefix / "bin" / command).read_text()
        assert f"from {module} import main" in script
    for package in ("modeling_raft", "flow_data", "flow_inference", "flow_training"):
        assert (installation.packages / package / "py.typed").is_file()
        for folder in (PROJECT / package).rglob("__init__.py"):  # a sub-package that is not installed, say
            assert (installation.packages / folder.relative_to(PROJECT)).is_file()
    printed = installation.run(
        "import sys; sys.argv = ['predict-flow', '--help']; import predict_flow; predict_flow.main()"
    )
    assert printed.startswith("usage: predict-flow [-h]")


@pytest.mark.slow
def test_prediction_uses_the_installed_weights_without_network(installation):
    frames = [str(PROJECT / f"examples/frames/frame_000{number}.png") for number in (1, 2)]
    printed = installation.run(
        "import os; os.environ['HF_HUB_OFFLINE'] = '1'\n"
        "import predict_flow\n"
        f"predict_flow.main([*{frames!r}, '--output', 'flow.flo'])\n"
        "from flow_inference import pretrained_path\n"
        "print(pretrained_path())"
    )
    shipped = "share/raft-flow-trainer/pretrained/raft-small-synthetic"
    assert printed.splitlines()[-1] == str(installation.prefix / shipped)
    assert (installation.elsewhere / "flow.flo").stat().st_size == 12 + 256 * 384 * 8


@pytest.mark.slow
def test_training_starts_from_an_installation_with_a_recipe_by_name(installation):
    """As `accelerate launch -m train_flow` does: found as a module, with a recipe that is nowhere near."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "train_flow",
        "--config",
        "chairs",
        "--output_dir",
        "out",
        "--data_root",
        "none",
    ]
    result = subprocess.run(
        command,
        cwd=installation.elsewhere,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(installation.packages), "ACCELERATE_USE_CPU": "true"},
    )
    assert result.returncode == 1, result.stderr
    assert "train_flow.py: error: " in result.stderr and "FlyingChairs_release" in result.stderr


@pytest.mark.slow
def test_files_beside_the_packages_are_found(installation):
    """`pip install --target` moves the shared files there, and leaves its record as it was."""
    beside = installation.packages / "share"
    shutil.move(installation.prefix / "share", beside)
    try:
        printed = installation.run("from flow_data.shipped_files import pretrained_path; print(pretrained_path())")
    finally:
        shutil.move(beside, installation.prefix / "share")
    assert Path(printed.strip()) == beside / "raft-flow-trainer/pretrained/raft-small-synthetic"


@pytest.mark.slow
def test_an_installation_without_a_file_names_it(installation):
    printed = installation.run(
        "from flow_data.shipped_files import shipped_path\n"
        "try: shipped_path('configs/none.yaml')\n"
        "except FileNotFoundError as error: print(error)"
    )
    assert printed.startswith("raft-flow-trainer ships no configs/none.yaml; it was looked for in ")


def test_a_checkout_has_its_own_files():
    assert shipped_path("configs/chairs.yaml") == PROJECT / "configs/chairs.yaml"
    with pytest.raises(FileNotFoundError, match="raft-flow-trainer ships no configs/none.yaml"):
        shipped_path("configs/none.yaml")


def test_recipes_are_found_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = PROJECT / "configs/chairs.yaml"
    assert find_config("chairs") == find_config("chairs.yaml") == shipped
    assert find_config("cpu", "configs/accelerate") == PROJECT / "configs/accelerate/cpu.yaml"
    assert find_config(str(shipped)) == shipped
    Path("chairs").write_text("gamma: 0.5\n")
    assert find_config("chairs") == Path("chairs")  # a file of the user's wins
    for name in ("chair", "configs/chairs.yaml", "../chairs", ""):
        with pytest.raises(FileNotFoundError, match=f"no such file: {name}$"):
            find_config(name)
