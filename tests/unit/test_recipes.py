import tomllib
from pathlib import Path
from typing import Any

import pytest

import psla_fast
from psla_fast.recipe import flat_config, packaged_recipes, parse_recipes
from psla_fast.train.config import TrainConfig

RECIPES = Path(psla_fast.__path__[0]) / "recipes"
PSLA = ["audioset_balanced", "audioset_full", "fsd50k"]

# What PSLA's own code and paper say, written down here a second time
SHARED = {
    "model.name": "efficientnet_b2",
    "model.num_heads": 4,
    "model.pretrained": "imagenet",
    "model.same_padding": "symmetric",
    "model.mask_padding": False,
    "sampling.mixup_rate": 0.5,
    "sampling.mixup_alpha": 10.0,
    "sampling.num_draws": 0,
    "augment.freq_mask_bins": 48,
    "augment.time_mask_frames": 192,
    "augment.time_mask_fraction": 1.0,
    "augment.mask_value": 0.0,
    "augment.noise": 0.0,
    "augment.roll_frames": 0,
    "input.pad_value": 0.0,
    "input.statistics": "psla",
    "optim.betas": [0.95, 0.999],
    "optim.weight_decay": 5e-7,
    "optim.warmup_steps": 1000,
    "optim.warmup_every_steps": 50,
    "optim.halve_every_epochs": 5,
}
OWN = ["input.clip_frames", "optim.epochs", "optim.batch_size", "optim.lr", "sampling.kind"]
OWN += ["optim.halve_after_epoch", "wa.start", "wa.end"]
VALUES = {
    "audioset_balanced": [1056, 60, 100, 1e-3, "shuffle", 35, 41, 60],
    "audioset_full": [1056, 30, 100, 1e-4, "balanced", 10, 16, 30],
    "fsd50k": [3000, 40, 24, 5e-4, "balanced", 10, 21, 40],
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "no_mixup": {"sampling.mixup_rate": 0.0},
    "no_balance": {"sampling.kind": "shuffle"},
    "no_pretraining": {"model.pretrained": "none"},
    "no_masking": {"augment.freq_mask_bins": 0, "augment.time_mask_frames": 0},
    "heads1": {"model.num_heads": 1},
    "heads0": {"model.num_heads": 0},
    "linear_mixup": {"augment.mixup_domain": "linear"},
}


def parse(*recipes: str) -> dict[str, Any]:
    return flat_config(parse_recipes(TrainConfig, [*recipes, "--data.shards", "S", "--run", "R"], "train"))


@pytest.mark.parametrize("name", PSLA)
def test_a_recipe_of_psla_has_psla_s_numbers(name: str):
    wanted = SHARED | dict(zip(OWN, VALUES[name], strict=True))
    config = parse(name)
    assert {key: config[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("audioset_balanced", ("balanced", "eval", "eval")),
        ("audioset_full", ("full", "eval", "eval")),
        ("fsd50k", ("train", "val", "eval")),
    ],
)
def test_audioset_has_one_split_to_score_and_fsd50k_two(name: str, splits: tuple[str, ...]):
    config = parse(name)
    assert (config["data.train"], config["data.val"], config["data.eval"]) == splits


@pytest.mark.parametrize("name", [*PSLA, "small_cpu"])
def test_a_fast_recipe_has_all_that_makes_it_fast_and_the_rest_of_its_plain_one(name: str):
    plain, fast = parse(name), parse(f"{name}_fast")
    assert fast["optim.epochs"] < plain["optim.epochs"]
    assert fast["optim.schedule"] in ("cosine", "one_cycle")
    assert fast["model.mask_padding"]
    assert fast["input.pad_value"] == fast["augment.mask_value"] == "mean"
    assert fast["precision"] == "auto"  # bf16 wherever it is fast
    assert 0.9 < fast["wa.ema_decay"] < 1
    frames = [*fast["stream.buckets"], fast["input.clip_frames"]]
    assert all(count % 32 == 0 for count in frames)  # the network's step
    assert bool(fast["stream.buckets"]) == (name in ("fsd50k", "small_cpu"))  # AudioSet's clips are all alike
    assert fast["input.clip_frames"] >= min(plain["input.clip_frames"], 998)
    assert fast["wa.end"] == fast["optim.epochs"]
    changed = {key.split(".")[0] for key in plain if plain[key] != fast[key]}
    assert changed <= {"input", "stream", "model", "augment", "optim", "wa", "compile"}
    assert {key for key in plain if key.startswith("model.") and plain[key] != fast[key]} == {
        "model.mask_padding"
    }


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_its_own_fields_and_no_other(name: str):
    whole, ablated = parse("fsd50k"), parse("fsd50k", name)
    assert {key: ablated[key] for key in whole if ablated[key] != whole[key]} == ABLATIONS[name]


@pytest.mark.parametrize("recipe", PSLA)
def test_ablations_follow_each_other_in_any_order(recipe: str):
    wanted = parse(recipe)
    for changes in ABLATIONS.values():
        wanted |= {key: value for key, value in changes.items() if key != "model.num_heads"}
    names = [name for name in ABLATIONS if not name.startswith("heads")]
    assert parse(recipe, *names) == parse(recipe, *reversed(names)) == wanted
    assert parse(recipe, "heads0", "heads1")["model.num_heads"] == 1


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_recipe_parses_alone_and_after_fsd50k_and_begins_with_what_it_is(name: str):
    parse(name)
    parse("fsd50k", name)
    assert (RECIPES / f"{name}.toml").read_text().startswith("# ")


def test_the_wheel_takes_the_recipes_along():
    pyproject = tomllib.loads((RECIPES.parents[1] / "pyproject.toml").read_text())
    patterns = pyproject["tool"]["setuptools"]["package-data"]["psla_fast"]
    packed = {path.stem for pattern in patterns for path in RECIPES.parent.glob(pattern)}
    assert packed >= {*packaged_recipes(), *PSLA, *ABLATIONS}
