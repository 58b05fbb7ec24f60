"""Settings: from files and flags, one typed path; every mistake is named."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from flow_training.config import TrainingConfig, parse_config
from flow_training.processes import split_batch

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
REQUIRED = ["--output_dir", "out", "--train_mix", "{synthetic: 1}"]


def parse_yaml(tmp_path: Path, text: str, *flags: str) -> TrainingConfig:
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: out\ntrain_mix: {synthetic: 1}\n" + text)
    return parse_config(["--config", str(path), *flags])


def test_defaults_are_the_original_scripts():
    config = parse_config(REQUIRED)
    assert (config.learning_rate, config.weight_decay, config.max_grad_norm) == (2e-5, 5e-5, 1.0)
    assert (config.total_batch_size, config.max_train_steps, config.num_flow_updates) == (6, 100000, 12)
    assert (config.crop_size, config.zoom_range_of("sintel_clean")) == ([384, 512], (-0.2, 0.5))
    assert (config.gamma, config.max_flow, config.seed, config.add_noise) == (0.8, 400.0, 1234, False)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load(path):
    settings = yaml.safe_load(path.read_text())
    config = parse_config(["--config", str(path), "--data_root", "elsewhere"])
    for key, value in settings.items():  # what is written is what is used, in value and type
        resolved = getattr(config, key)
        assert resolved == (list(value) if isinstance(value, tuple) else value), key
        assert type(resolved) is type(value) or isinstance(resolved, dict), key
    for source in config.train_mix:
        config.zoom_range_of(source)


@pytest.mark.parametrize(
    ("stage", "steps", "batch", "rate", "crop", "decay", "gamma"),
    [
        ("chairs", 100000, 10, 4e-4, [368, 496], 1e-4, 0.8),
        ("things", 100000, 6, 1.25e-4, [400, 720], 1e-4, 0.8),
        ("sintel", 100000, 6, 1.25e-4, [368, 768], 1e-5, 0.85),
        ("kitti", 50000, 6, 1e-4, [288, 960], 1e-5, 0.85),
        ("chairs_mixed", 120000, 8, 2.5e-4, [368, 496], 1e-4, 0.8),
        ("things_mixed", 120000, 5, 1e-4, [400, 720], 1e-4, 0.8),
        ("sintel_mixed", 120000, 5, 1e-4, [368, 768], 1e-5, 0.85),
        ("kitti_mixed", 50000, 5, 1e-4, [288, 960], 1e-5, 0.85),
    ],
)
def test_stages_have_the_published_numbers(stage, steps, batch, rate, crop, decay, gamma):
    config = parse_config(["--config", str(CONFIGS / f"{stage}.yaml")])
    assert (config.max_train_steps, config.total_batch_size, config.learning_rate) == (steps, batch, rate)
    assert (config.crop_size, config.weight_decay, config.gamma) == (crop, decay, gamma)
    assert config.freeze_batch_norm == (not stage.startswith("chairs"))
    assert config.mixed_precision == ("fp16" if stage.endswith("mixed") else None)
    assert config.flip == (not stage.startswith("kitti"))
    assert not config.add_noise


def test_flags_win_over_the_file(tmp_path):
    text = "learning_rate: 4e-4\ncrop_size: [64, 72]\nflip: false\nfreeze_batch_norm: true\nmixed_precision: no\n"
    config = parse_yaml(tmp_path, text)
    assert (config.learning_rate, config.crop_size, config.flip) == (4e-4, [64, 72], False)
    assert (config.freeze_batch_norm, config.mixed_precision) == (True, "no")
    flags = ["--learning_rate", "1e-5", "--flip", "--no_freeze_batch_norm", "--mixed_precision", "bf16"]
    config = parse_yaml(tmp_path, text, *flags, "--crop_size", "80", "88", "--train_mix", "{flying_chairs: 2}")
    assert (config.learning_rate, config.crop_size, config.flip) == (1e-5, [80, 88], True)
    assert (config.freeze_batch_norm, config.mixed_precision) == (False, "bf16")
    assert config.train_mix == {"flying_chairs": 2}


@pytest.mark.parametrize("written", ["[-0.5, 0.25]", "{default: [-0.5, 0.25], kitti_2015: [-1e-5, 0]}"])
def test_zoom_range_is_one_or_a_mapping(tmp_path, written):
    flags = written.strip("[]").split(", ") if written.startswith("[") else [written]
    for config in (parse_yaml(tmp_path, f"zoom_range: {written}"), parse_yaml(tmp_path, "", "--zoom_range", *flags)):
        assert config.zoom_range_of("hd1k") == (-0.5, 0.25)
        if written.startswith("{"):
            low, high = config.zoom_range_of("kitti_2015")
            assert (float(low), high) == (-1e-5, 0)


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("learning_rat: 1", [], "unknown key learning_rat; did you mean learning_rate?"),
        ("", ["--learning_rat", "1"], "unknown flag --learning_rat; did you mean --learning_rate?"),
        ("", ["--max_train", "1"], "unknown flag --max_train"),  # no abbreviations
        ("learning_rate: fast", [], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        ("learning_rate: true", [], "learning_rate must be a value and not a switch; got True"),
        ("learning_rate: [1, 2]", [], "learning_rate must be one value; got [1, 2]"),
        ("max_train_steps: 1.5", [], "argument --max_train_steps/--max-train-steps: invalid int value: '1.5'"),
        ("flip: 3", [], "flip must be true or false; got 3"),
        ("mixed_precision: fp8", [], "argument --mixed_precision/--mixed-precision: invalid choice: 'fp8'"),
        ("crop_size: [60, 64]", [], "crop_size must be a height and a width, multiples of 8; got [60, 64]"),
        ("crop_size: [64]", [], "crop_size must be a height and a width"),
        ("zoom_range: [0.5, -0.5]", [], "zoom_range must be [lo, hi]"),
        ("zoom_range: {sintel_clean: [0, 1]}", [], "zoom_range must have synthetic or default; got sintel_clean"),
        ("zoom_range: {default: [0, 1], sintle_clean: [0, 1]}", [], "did you mean 'sintel_clean'?"),
        ("total_batch_size: 0", [], "total_batch_size must be from 1 to 1000000000; got 0"),
        ("learning_rate: -1", [], "learning_rate must be positive and finite; got -1"),
        ("validation_sets: [kitti_2016]", [], "did you mean 'kitti_2015'?"),
        ("validation_sets: ['sintel_clean:validation']", [], "sintel_clean: split must be one of training, test, all"),
        ("train_split: testing", [], "synthetic: split must be one of"),
        ("", ["--train_mix", "{flying_chair: 1}"], "did you mean 'flying_chairs'?"),
        ("", ["--train_mix", "{flying_chairs: 0.5}"], "flying_chairs must be a whole number of at least 1; got 0.5"),
        ("", ["--train_mix", "flying_chairs"], "must be a mapping"),
        ("", ["--train_mix", "{}"], "train_mix is required"),
        ("", ["--streaming"], "streaming needs dataset_name"),
        (
            "",
            ["--report_to", "none", "tensorboard"],
            "report_to must be none or trackers, not both; got none tensorboard",
        ),
        ("", ["--train_mix", "{synthetic: 1"], "is no YAML"),
        ("", ["stray"], "'stray' belongs to no flag"),
        ("- a list", [], "is no YAML"),
        ("config_overrides: {loss_gamma: 0.5}", [], "loss_gamma is set by the run's gamma"),
        ("seed: 1\nseed: 2", [], "the key seed occurs twice"),
        ("crop_size: []", [], "crop_size must not be an empty list"),
        ("data_root: ''", [], "data_root is empty"),
        ("zoom_range: [0, 6]", [], "zoom_range must be [lo, hi] in log2 with -5 <= lo <= hi <= 5"),
        ("", ["--train_mix", "{1: 2}"], "unknown source 1: did you mean"),
        (
            "",
            ["--synthetic_displacement", "1", "inf"],
            "synthetic_displacement must be (lowest, highest) in px",
        ),
        ("", ["--synthetic_num_pairs", "9" * 20], "synthetic_num_pairs must be from 1 to 1000000000"),
        ("synthetic_ego_motion: 1.5", [], "synthetic_ego_motion must be between 0 and 1; got 1.5"),
        ("", ["--seed", "4294967296"], "seed must be from 0 to 4294967295"),
        ("ema_decay: 1", [], "ema_decay must be between 0 and 1, 0.999 say; got 1"),
        ("ema_decay: 0.0", [], "ema_decay must be between 0 and 1"),
        ("ema_decay: .nan", [], "ema_decay must be between 0 and 1"),
        ("weight_decay: .inf", [], "weight_decay must be"),
        ("learning_rate: .inf", [], "learning_rate must be positive and finite; got inf"),
        ("validation_sets: ['synthetic:']", [], "names no split"),
        ("validation_sets: [synthetic, synthetic]", [], "names synthetic twice"),
        ("", ["--hub_token", "--secret"], "hub_token"),
        ("", ["--hub-token=secret", "--sed", "3"], "unknown flag --sed; did you mean --seed?"),
        ("config_overrides: {a: 1}\nmodel_name_or_path: x", [], "config_overrides shape a model from scratch"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, capsys, text, flags, message):
    with pytest.raises(SystemExit) as error:
        parse_yaml(tmp_path, text, *flags)
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed and printed.count("\n") == 1 and "secret" not in printed


def test_text_of_yaml_is_a_range_and_an_empty_list_switches_off(tmp_path):
    config = parse_yaml(tmp_path, "validation_sets: [synthetic]", "--zoom_range", "[-0.1, 0.2]", "--validation_sets")
    assert config.zoom_range_of("synthetic") == (-0.1, 0.2) and config.validation_sets == []


def test_required_settings_and_missing_files_are_named(tmp_path, capsys):
    for arguments, message in (
        (["--output_dir", "out"], "train_mix is required"),
        (["--train_mix", "{synthetic: 1}"], "required: --output_dir"),
        (["--config", str(tmp_path / "none.yaml")], f"no such file: {tmp_path / 'none.yaml'}"),
    ):
        with pytest.raises(SystemExit):
            parse_config(arguments)
        assert message in capsys.readouterr().err


def test_what_is_written_down_is_the_same_run(tmp_path):
    config = parse_yaml(
        tmp_path, "zoom_range: {default: [0, 1]}\nconfig_overrides: {corr_levels: 3}\nlearning_rate: 1.0e-7\n",
        "--hub_token", "secret", "--no_flip", "--validation_sets", "synthetic", "sintel_clean:all",
    )  # fmt: skip
    written = yaml.safe_dump(config.to_dict())
    assert "secret" not in written and "hub_token" not in written
    (tmp_path / "run_config.yaml").write_text(written)
    again = parse_config(["--config", str(tmp_path / "run_config.yaml")])
    assert again == dataclasses.replace(config, hub_token=None)


def test_batches_are_split_over_processes_and_passes():
    assert split_batch(6, None, 1) == (6, 1)
    assert split_batch(6, None, 2) == (3, 1)
    assert split_batch(12, 2, 3) == (2, 2)
    for arguments, message in (
        ((6, 4, 1), "the next that can is 8"),
        ((6, None, 4), "4 process"),
        ((1, None, 2), "is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            split_batch(*arguments)


def test_a_data_set_on_the_hub_takes_the_place_of_the_mix(tmp_path, caplog):
    config = parse_yaml(tmp_path, "", "--dataset_name", "user/name", "--streaming")
    assert config.train_mix == {} and config.streaming and "user/name" in caplog.text
    config = parse_yaml(tmp_path, "zoom_range: {user/name: [0, 1], default: [-1, 0]}", "--dataset_name", "user/name")
    assert config.zoom_range_of("user/name") == (0, 1)
