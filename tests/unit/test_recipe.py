import ast
import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import tomli_w

import psla_fast
from psla_fast.pack import PackConfig, WorkConfig
from psla_fast.recipe import flat_config, packaged_recipes, parse_recipes, read_recipe, resolved
from psla_fast.train.config import TrainConfig

NEEDED = ["--data.shards", "S", "--run", "R"]


def parse(*arguments: str) -> TrainConfig:
    return parse_recipes(TrainConfig, arguments, "train")


def test_a_later_recipe_wins_over_an_earlier_one_and_a_flag_over_both(tmp_path: Path):
    (tmp_path / "mine.toml").write_text("[optim]\nlr = 0.25\nepochs = 7\n")
    config = parse("fsd50k", str(tmp_path / "mine.toml"), *NEEDED, "--optim.epochs", "9")
    assert (config.optim.lr, config.optim.epochs, config.optim.batch_size) == (0.25, 9, 24)
    assert config.model.name == "efficientnet_b2"


def test_the_fsd50k_recipe_has_psla_s_values():
    config = parse("fsd50k", *NEEDED)
    assert config.input.clip_frames == 3000
    optim = config.optim
    assert (optim.epochs, optim.batch_size, optim.lr, optim.betas) == (40, 24, 5e-4, (0.95, 0.999))
    assert (optim.weight_decay, optim.warmup_steps, optim.warmup_every_steps) == (5e-7, 1000, 50)
    assert (optim.halve_after_epoch, optim.halve_every_epochs) == (10, 5)
    assert (config.wa.start, config.wa.end) == (21, 40)
    assert (config.sampling.kind, config.sampling.mixup_rate, config.sampling.mixup_alpha) == (
        "balanced",
        0.5,
        10,
    )
    assert (config.augment.freq_mask_bins, config.augment.time_mask_frames) == (48, 192)
    assert (config.model.name, config.model.num_heads) == ("efficientnet_b2", 4)
    assert (config.augment.mask_value, config.input.pad_value, config.input.statistics) == (0, 0, "psla")


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_packaged_recipe_parses_and_its_resolved_form_repeats_it(name: str, tmp_path: Path):
    config = parse(name, *NEEDED)
    (tmp_path / "config.toml").write_text(tomli_w.dumps(resolved(config)))
    assert parse(str(tmp_path / "config.toml")) == config
    assert read_recipe(str(tmp_path / "config.toml")) == flat_config(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlearning_rate = 1\n", "unknown key 'optim.learning_rate'"),
        ("[model]\nbatch_size = 1\n", "unknown key 'model.batch_size'. Did you mean 'optim.batch_size'"),
        ("epochs = 3\n", "unknown key 'epochs'. Did you mean 'optim.epochs'"),
        ("[optim\n", "is not TOML"),
        ("[optim]\nepochs = 'many'\n", "optim.epochs"),
        ("[optim]\nepochs = 0\n", "optim.epochs is 0; give 1 or more"),
        ("[model]\nsame_padding = 'left'\n", "invalid choice 'left'"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_says_what(tmp_path: Path, text: str, message: str):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as caught:
        parse(str(tmp_path / "r.toml"), *NEEDED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim.batchsize", "3"], "unknown flag --optim.batchsize. Did you mean 'optim.batch-size'"),
        (["--model.nam=x"], "unknown flag --model.nam. Did you mean 'model.name'"),
        (["--optim.lr", "fast"], "Error parsing --optim.lr: could not convert string to float: 'fast'. See"),
        (["--log-every-steps", "0"], "log_every_steps is 0"),
        (["--seed", "-1"], "seed -1"),
    ],
)
def test_a_wrong_flag_is_one_line_with_a_suggestion(flags: list[str], message: str):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as caught:
        parse("fsd50k", *NEEDED, *flags)
    assert "\n" not in str(caught.value)
    assert "---" not in str(caught.value)


def test_a_missing_recipe_names_the_closest_one():
    with pytest.raises(ValueError, match="recipe 'fsd50' not found. Did you mean 'fsd50k'"):
        parse("fsd50", *NEEDED)


def test_a_missing_required_flag_is_named():
    with pytest.raises(
        ValueError, match="Missing from train: --run PATH Folder of the run; .* See train --help"
    ):
        parse("fsd50k", "--data.shards", "S")


def test_negative_numbers_pairs_and_booleans_pass_through_recipes(tmp_path: Path):
    text = "channels_last = false\n[input]\npad_value = -15.94\n[optim]\nbetas = [0.5, 0.25]\n"
    (tmp_path / "r.toml").write_text(text)
    config = parse(str(tmp_path / "r.toml"), *NEEDED)
    assert (config.channels_last, config.input.pad_value, config.optim.betas) == (False, -15.94, (0.5, 0.25))


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--profile"], (True, True, "")),
        (["--profile", "--channels-last", "False"], (True, False, "")),
        (["--profile", "False", "--channels-last"], (False, True, "")),
        (["--profile=True", "--wandb", "birds", "--channels_last=False"], (True, False, "birds")),
    ],
)
def test_a_yes_or_no_without_a_value_is_yes(flags: list[str], found: tuple[object, ...]):
    for arguments in ([*flags, *NEEDED], [*NEEDED, *flags]):
        config = parse("fsd50k", *arguments)
        assert (config.profile, config.channels_last, config.wandb) == found


def test_a_flag_that_lacks_its_value_is_named():
    with pytest.raises(ValueError, match="--wandb"):
        parse("fsd50k", *NEEDED, "--wandb")


def leaves(kind: Any) -> list[str]:
    names: list[str] = []
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        names += leaves(inner) if dataclasses.is_dataclass(inner) else [field.name]
    return names


@pytest.mark.parametrize("kind", [TrainConfig, PackConfig, WorkConfig])
def test_every_field_of_a_config_is_read_somewhere(kind: Any):
    read: set[str] = set()
    for path in Path(psla_fast.__path__[0]).rglob("*.py"):
        tree = ast.parse(path.read_text())
        checks = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__post_init__"]
        in_checks = {id(inner) for check in checks for inner in ast.walk(check)}
        read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and id(n) not in in_checks}
    assert set(leaves(kind)) - read == set()
