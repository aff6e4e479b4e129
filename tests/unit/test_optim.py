from typing import Any

import pytest
import torch
from torch import nn

from psla_fast.train.optim import OptimConfig, build_optimizer, compute_lr


def test_the_warm_up_steps_up_every_50th_step_as_psla_s_does():
    config = OptimConfig(lr=1e-3)
    rates = [compute_lr(config, 1, step) for step in range(1200)]
    assert rates[:50] == [0.0] * 50
    assert rates[50:100] == pytest.approx([5e-5] * 50)
    assert rates[999] == pytest.approx(0.95e-3)
    assert rates[1000:] == [1e-3] * 200


def test_the_rate_halves_after_the_named_epoch_and_then_every_five():
    config = OptimConfig(lr=1.0, halve_after_epoch=10, halve_every_epochs=5, warmup_steps=0)
    rates = [compute_lr(config, epoch, 0) for epoch in range(1, 22)]
    assert rates == [1.0] * 10 + [0.5] * 5 + [0.25] * 5 + [0.125]


def test_the_schedule_is_torch_s_multisteplr_stepped_after_each_epoch():
    config = OptimConfig(lr=0.3, halve_after_epoch=3, halve_every_epochs=2, warmup_steps=0)
    optimizer = build_optimizer(config, nn.Linear(1, 1))
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(range(3, 100, 2)), gamma=0.5)
    for epoch in range(1, 15):
        assert compute_lr(config, epoch, 0) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_psla_s_schedule_keeps_every_bit_and_asks_for_no_total():
    config = OptimConfig(lr=5e-4, halve_after_epoch=10)  # values stored from the first version
    places = [(1, 49), (1, 150), (1, 999), (2, 1000), (10, 9000), (11, 9999), (40, 50000), (16, 75)]
    stored = [0.0, 7.5e-05, 0.000475, 0.0005, 0.0005, 0.00025, 7.8125e-06, 6.25e-06]
    assert [compute_lr(config, *place) for place in places] == stored
    assert [compute_lr(config, *place, total_steps=7) for place in places] == stored


def cosine(**changes: Any) -> OptimConfig:
    return OptimConfig(
        **{"lr": 0.4, "schedule": "cosine", "warmup_steps": 10, "warmup_every_steps": 5, **changes}
    )


def rates_of(config: OptimConfig, total_steps: int) -> list[float]:
    return [compute_lr(config, 1 + step // 30, step, total_steps) for step in range(total_steps)]


def test_cosine_warms_up_in_psla_s_stairs_and_one_cycle_in_a_straight_line():
    stairs, line = (rates_of(cosine(schedule=kind), 100) for kind in ("cosine", "one_cycle"))
    assert stairs[:10] == [0.0] * 5 + [0.2] * 5
    assert line[:10] == pytest.approx([0.04 * step for step in range(10)])
    assert stairs[10:] == line[10:]


def test_the_rate_after_the_warm_up_is_torch_s_cosineannealinglr():
    rates = rates_of(cosine(final_lr_fraction=0.05), 51)[10:]
    optimizer = build_optimizer(OptimConfig(lr=0.4), nn.Linear(1, 1))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.02)
    for rate in rates:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
@pytest.mark.parametrize(
    ("total_steps", "warmup_steps"), [(100, 10), (2, 0), (12, 10), (1000, 0), (997, 313)]
)
def test_the_rate_peaks_after_the_warm_up_then_falls_to_the_end(
    schedule: str, total_steps: int, warmup_steps: int
):
    config = cosine(schedule=schedule, warmup_steps=warmup_steps, final_lr_fraction=0.25)
    rates = rates_of(config, total_steps)
    up, down = rates[:warmup_steps], rates[warmup_steps:]
    assert down[0] == 0.4
    assert down[-1] == 0.1
    assert up == sorted(up)
    assert all(first > second for first, second in zip(down, down[1:], strict=False))
    assert compute_lr(config, 1, total_steps + 5, total_steps) == 0.1


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
@pytest.mark.parametrize("total_steps", [1, 5, 10])
def test_runs_no_longer_than_their_warm_up_have_a_rate(schedule: str, total_steps: int):
    rates = rates_of(cosine(schedule=schedule), total_steps)
    assert rates == sorted(rates)
    assert all(0 <= rate <= 0.4 for rate in rates)


def test_no_warm_up_and_one_update_is_the_final_rate():
    assert compute_lr(cosine(warmup_steps=0), 1, 0, 1) == pytest.approx(0.004)


def test_each_setting_of_the_schedule_changes_the_rates():
    base = {"warmup_steps": 20, "warmup_every_steps": 5, "halve_after_epoch": 2, "halve_every_epochs": 1}
    changes: list[dict[str, Any]] = [
        {},
        {"lr": 2e-3},
        {"warmup_steps": 30},
        {"warmup_every_steps": 10},
        {"halve_after_epoch": 1},
        {"halve_every_epochs": 2},
        {"schedule": "cosine"},
        {"schedule": "one_cycle"},
        {"schedule": "cosine", "final_lr_fraction": 0.0},
        {"schedule": "cosine", "warmup_every_steps": 10},
        {"schedule": "one_cycle", "warmup_steps": 30},
    ]
    rates = {tuple(rates_of(OptimConfig(**{**base, **change}), 150)) for change in changes}
    assert len(rates) == len(changes)


def train(config: OptimConfig, steps: int = 4) -> torch.Tensor:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    module = nn.Module()
    module.register_parameter("weight", weight)
    optimizer = build_optimizer(config, module)
    for step in range(steps):
        optimizer.zero_grad()
        (weight**2 * torch.tensor([1.0, 3.0, -1.0]) + weight * step).sum().backward()
        optimizer.step()
    return weight.detach()


def test_optimisers_are_torch_s_own_and_fused():
    model = nn.Linear(2, 2)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    for name, kind in kinds.items():
        optimizer = build_optimizer(OptimConfig(optimizer=name), model)  # type: ignore[arg-type]
        assert type(optimizer) is kind
        assert optimizer.defaults["fused"]
    defaults = build_optimizer(OptimConfig(), model).defaults
    assert (defaults["betas"], defaults["weight_decay"]) == ((0.95, 0.999), 5e-7)


def test_one_update_of_each_optimiser_is_as_computed_by_hand():
    weight, gradient = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, -12.0, -1.0])
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5}
    decayed = gradient + 0.5 * weight
    nesterov = train(OptimConfig(optimizer="sgd", momentum=0.8, **settings), 1)
    torch.testing.assert_close(nesterov, weight - 0.1 * (1 + 0.8) * decayed)
    plain = train(OptimConfig(optimizer="sgd", momentum=0.0, **settings), 1)
    torch.testing.assert_close(plain, weight - 0.1 * decayed)
    adam = train(OptimConfig(**settings), 1)  # the first update is the sign of the gradient, times the rate
    torch.testing.assert_close(adam, weight - 0.1 * decayed.sign())
    adamw = train(OptimConfig(optimizer="adamw", **settings), 1)
    torch.testing.assert_close(adamw, weight * (1 - 0.1 * 0.5) - 0.1 * gradient.sign())


def test_each_setting_of_the_optimiser_changes_the_weights():
    changes: list[dict[str, Any]] = [
        {"optimizer": "adam"},
        {"optimizer": "adamw"},
        {"optimizer": "sgd"},
        {"optimizer": "adam", "betas": (0.5, 0.9)},
        {"optimizer": "adam", "betas": (0.95, 0.9)},
        {"optimizer": "adam", "weight_decay": 0.0},
        {"optimizer": "adamw", "weight_decay": 0.0},
        {"optimizer": "sgd", "weight_decay": 0.0},
        {"optimizer": "sgd", "momentum": 0.5},
    ]
    weights = {
        tuple(train(OptimConfig(**{"lr": 0.05, "weight_decay": 0.5, **change})).tolist())
        for change in changes
    }
    assert len(weights) == len(changes) - 1  # without a decay adam and adamw are one


def test_parameters_that_do_not_train_are_left_out():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    (group,) = build_optimizer(OptimConfig(), model).param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(model.weight)]


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention = nn.Linear(3, 4), nn.Linear(4, 2)
        self.stem.bias.requires_grad_(False)


def test_the_backbone_may_learn_at_a_share_of_the_rate():
    model = Tagger()
    backbone, head = build_optimizer(OptimConfig(backbone_lr_factor=0.1), model).param_groups
    assert [id(parameter) for parameter in backbone["params"]] == [id(model.stem.weight)]
    assert [id(parameter) for parameter in head["params"]] == list(map(id, model.attention.parameters()))
    assert (backbone["lr_factor"], head["lr_factor"]) == (0.1, 1.0)
    assert build_optimizer(OptimConfig(), model).param_groups[0]["lr_factor"] == 1
    with pytest.raises(ValueError, match="Linear has no part called attention"):
        build_optimizer(OptimConfig(backbone_lr_factor=0.1), nn.Linear(1, 1))


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"backbone_lr_factor": 0},
        {"backbone_lr_factor": -1},
        {"freeze_epochs": -1},
        {"batch_size": 0},
        {"accumulate": 0},
        {"warmup_every_steps": 0},
        {"halve_every_epochs": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"warmup_steps": -1},
        {"halve_after_epoch": -1},
        {"weight_decay": -1e-9},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"optimizer": "sgd", "momentum": 1.0},
        {"schedule": "cosine", "final_lr_fraction": 1.1},
        {"schedule": "cosine", "final_lr_fraction": -0.1},
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any]):
    name = list(change)[-1]
    with pytest.raises(ValueError, match=rf"optim\..*{name}.*; give"):
        OptimConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum": 0.8}, "momentum is for --optim.optimizer sgd, not adam"),
        ({"optimizer": "sgd", "betas": (0.9, 0.99)}, "betas is for --optim.optimizer adam or adamw, not sgd"),
        (
            {"final_lr_fraction": 0.1},
            "final_lr_fraction is for --optim.schedule cosine or one_cycle, not step",
        ),
    ],
)
def test_settings_without_effect_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**change)


def test_sgd_starts_well_after_a_first_update_that_was_left_out() -> None:
    starts = []
    for first in ([], [float("nan")]):
        torch.manual_seed(0)
        model = nn.Linear(64, 64)
        optimizer = build_optimizer(OptimConfig(optimizer="sgd", lr=0.1), model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        for value in [*first, 1.0, 1.0]:
            scaler.scale((model(torch.ones(2, 64)) * value).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update(1.0)
            optimizer.zero_grad()
        starts.append(model.weight.detach())
    assert torch.equal(*starts)
    plain = nn.Linear(64, 64)
    torch.manual_seed(0)
    plain.reset_parameters()
    reference = torch.optim.SGD(plain.parameters(), 0.1, 0.9, weight_decay=5e-7, nesterov=True)
    for _ in range(2):
        reference.zero_grad()
        plain(torch.ones(2, 64)).square().mean().backward()
        reference.step()
    assert torch.allclose(plain.weight, starts[0], atol=1e-6)
