"""Settings: typed, layered, and an error that says where and what was meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from umm.config import choice_settings, config_hash, first_difference, load, to_yaml
from umm.errors import ConfigError, UmmError, UnknownName


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.imges=3", r"unknown setting 'train.imges' \(command line\). Did you mean 'train.images'"),
        ("trian.images=3", r"unknown setting 'trian.images' .* Did you mean 'train.images'"),
        ("depth=3", r"Did you mean 'recon.decoder.depth'"),
        ("recon.optim.lr=fast", r"'recon.optim.lr' \(command line\) must be float, got 'fast'"),
        ("train.images=1.5", r"must be int, got 1.5"),
        ("train.precision=fp8", r"must be one of 'fp32', 'bf16', got 'fp8'"),
        ("recon.optim.betas=[1]", r"'recon.optim.betas' .* must be Tuple\[float, float\]"),
        ("latent.layers=[a]", r"'latent.layers' .* must be List\[int\]"),
        ("recon=3", r"'recon' \(command line\) is a section, not a value: set e.g. recon.decoder"),
        ("data=folder", r"'data' .* is a section, not a value: write data.name=folder"),
        ("train.images.x=3", r"'train.images' .* is a value, not a section"),
        ("seed=x", r"'seed' .* must be int"),
        ("recon.noise=null", r"'recon.noise' .* must be float, got None"),
        ("nonsense", r"'nonsense' is not an override: write key=value"),
        ("task=gen", r"is for task 'gen', not 'recon'"),
        ("train.batch_size=0", r"'train.batch_size' \(command line\) must be at least 1, got 0"),
        ("train.images=-5", r"must be at least 1, got -5"),
        ("recon.optim.lr=-1", r"must be at least 0, got -1"),
        ("recon.adversarial.optim.betas=[0.9,2]", r"betas' \(command line\) must be from 0 to 0.999999, got 2"),
        ("recon.ema=2", r"'recon.ema' .* must be from 0 to 1"),
        ("train.images=${nope}", r"'train.images' cannot be resolved: .*nope"),
    ],
)
def test_a_wrong_setting_is_one_sentence_with_its_source(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load("recon", None, [override])
    assert "\n" not in str(caught.value)


def test_an_unknown_choice_names_the_nearest_and_all():
    with pytest.raises(UnknownName, match=r"latent.name: nothing .* 'dinov'.* Did you mean 'dinov[23]'.* There are"):
        load("recon", None, ["latent.name=dinov"])
    with pytest.raises(UnknownName, match=r"Did you mean 'shapes'"):
        load("recon", None, ["data.name=shape"])


def test_an_unknown_metric_is_an_error_before_the_training():
    with pytest.raises(UnknownName, match=r"eval.metrics \(command line\): .* 'psrn'. Did you mean 'psnr'"):
        load("recon", None, ["eval.metrics=[ssim,psrn]"])


def test_interpolations_are_resolved_so_that_a_run_can_go_on():
    config = load("recon", None, ["data.image_size=96", "latent.image_size=${data.image_size}"])
    assert first_difference(OmegaConf.create(to_yaml(config)), config) is None


def test_an_error_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train: {imges: 3}")
    with pytest.raises(ConfigError, match=r"mine.yaml\). Did you mean 'train.images'"):
        load("recon", file)
    file.write_text("train: [1, 2")
    with pytest.raises(ConfigError, match=r"mine.yaml is not valid YAML"):
        load("recon", file)
    with pytest.raises(ConfigError, match="no configuration file"):
        load("recon", tmp_path / "none.yaml")


def test_the_command_line_has_the_last_word(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("data: {name: folder, root: /pictures}\ntrain: {images: 10, batch_size: 2}")
    config = load("recon", file, ["train.images=20", "data.root=/others"])
    assert (config.train.images, config.train.batch_size) == (20, 2)
    assert (config.data.name, config.data.root) == ("folder", "/others")
    assert "columns" not in config.data, "the section has the fields of the choice and no others"


def test_scientific_notation_is_a_number():
    """PyYAML alone reads 1e-4 as a string."""
    assert load("recon", None, ["recon.optim.lr=1e-4"]).recon.optim.lr == 1e-4


def test_a_map_of_the_users_own_takes_any_key():
    config = load("recon", None, ["data.name=hub", "data.columns.image=img"])
    assert config.data.columns == {"image": "img"}


def test_a_part_from_an_import_path_brings_its_settings():
    config = load("recon", None, ["latent.name=fakes.space", "latent.channels=5"])
    assert config.latent.channels == 5
    with pytest.raises(ConfigError, match=r"unknown setting 'latent.weights'"):
        load("recon", None, ["latent.name=fakes.space", "latent.weights=x"])


def test_a_printed_configuration_repeats_itself(tmp_path):
    config = load("recon", None, ["data.name=hub", "data.columns.image=img", "recon.optim.betas=[0.5,0.9]"])
    file = tmp_path / "printed.yaml"
    file.write_text(to_yaml(config))
    again = load("recon", file)
    assert to_yaml(again) == to_yaml(config)
    assert config_hash(again) == config_hash(config)
    assert first_difference(OmegaConf.load(file), config) is None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lr=st.floats(1e-8, 10), images=st.integers(1, 10**9), layers=st.lists(st.integers(-12, 11), max_size=4))
def test_any_values_survive_printing_and_reading(tmp_path_factory, lr, images, layers):
    file = tmp_path_factory.mktemp("yaml") / "c.yaml"
    config = load("recon", None, [f"recon.optim.lr={lr!r}", f"train.images={images}", f"latent.layers={layers}"])
    file.write_text(to_yaml(config))
    assert first_difference(load("recon", file), config) is None


def test_the_hash_sees_settings_and_not_the_folder():
    base = config_hash(load("recon"))
    assert config_hash(load("recon", None, ["run=elsewhere"])) == base
    assert config_hash(load("recon", None, ["seed=1"])) != base


def test_every_shipped_configuration_loads():
    files = sorted((Path(__file__).parents[1] / "configs").glob("*/*.yaml"))
    assert files
    for file in files:
        task = OmegaConf.load(file).get("task", file.stem.split("_")[0])
        load(task, file)
        first = file.read_text().splitlines()[0]
        assert re.match(r"# .*umm train --task", first), f"{file} must open with its command"


def test_the_settings_of_a_class_are_the_ones_the_command_line_reads():
    """`Config` beside the class and the lookup that avoids importing torch must agree."""
    import umm

    for section, folder in (("latent", "latents"), ("data", "data")):
        for name in umm.names(folder):
            assert choice_settings(section, name) is umm.find(folder, name).Config


def test_errors_are_value_errors():
    assert issubclass(UmmError, ValueError)
