import pytest
import torch
from torch import nn

from psla_fast.train.optim import OptimConfig, build_optimizer, compute_loss, compute_lr


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


def test_the_loss_is_binary_cross_entropy_of_clamped_scores():
    generator = torch.Generator().manual_seed(0)
    scores, targets = torch.rand(4, 7, generator=generator), torch.rand(4, 7, generator=generator)
    scores[0, 0], scores[1, 1] = 1.02, 0.0
    expected = nn.functional.binary_cross_entropy(scores.clamp(1e-7, 1 - 1e-7), targets)
    assert compute_loss(scores, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    assert compute_loss(scores.bfloat16(), targets).dtype == torch.float32
    assert compute_loss(scores * float("nan"), targets).isnan()


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"warmup_steps": -1}])
def test_values_out_of_range_are_refused(change: dict[str, float]):
    with pytest.raises(ValueError, match="optim"):
        OptimConfig(**change)  # type: ignore[arg-type]
