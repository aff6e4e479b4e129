from math import log

import pytest
import torch
from torch import Tensor, nn

from psla_fast.train.losses import LossConfig, compute_loss

FOCAL, CROSS_ENTROPY = LossConfig("focal"), LossConfig("cross_entropy")
KINDS = [LossConfig(), FOCAL, CROSS_ENTROPY]


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores, targets = torch.rand(4, 7, generator=generator), torch.rand(4, 7, generator=generator)
    scores[0, 0], scores[1, 1] = 1.02, 0.0
    return scores, targets


def clamped(scores: Tensor) -> Tensor:
    return scores.clamp(1e-7, 1 - 1e-7)


def test_bce_is_binary_cross_entropy_of_clamped_scores():
    scores, targets = example()
    expected = nn.functional.binary_cross_entropy(clamped(scores), targets)
    assert compute_loss(scores, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_bce_keeps_every_bit_of_psla_s_loss():
    scores, targets = example()
    limited = clamped(scores)
    expected = -(targets * limited.log() + (1 - targets) * torch.log1p(-limited)).mean()
    assert torch.equal(compute_loss(scores, targets), expected)
    assert expected.item() == pytest.approx(1.4844635725021362, rel=1e-6)  # stored from the first version


def test_focal_loss_is_lin_et_al_s_formula_for_hard_targets():
    scores, targets = example()
    hard, limited = (targets > 0.5).float(), clamped(scores)
    p_t = limited * hard + (1 - limited) * (1 - hard)
    for gamma in (0.5, 2.0, 5.0):
        expected = (-((1 - p_t) ** gamma) * p_t.log()).mean()
        loss = compute_loss(scores, hard, LossConfig("focal", gamma))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_focal_loss_of_a_score_is_as_computed_by_hand():
    scores, targets = torch.tensor([[0.9, 0.2]]), torch.tensor([[1.0, 0.0]])
    expected = (0.1**2 * -log(0.9) + 0.2**2 * -log(0.8)) / 2
    assert compute_loss(scores, targets, FOCAL).item() == pytest.approx(expected, rel=1e-5)


def test_focal_loss_without_a_power_is_bce():
    scores, targets = example()
    assert torch.equal(compute_loss(scores, targets, LossConfig("focal", 0.0)), compute_loss(scores, targets))


def test_focal_loss_of_a_soft_target_is_the_mean_over_its_hard_ones():
    scores = torch.full((1, 1), 0.7)
    yes, no, soft = (compute_loss(scores, torch.full((1, 1), y), FOCAL) for y in (1.0, 0.0, 0.25))
    assert soft.item() == pytest.approx(0.25 * yes.item() + 0.75 * no.item(), rel=1e-6)


def test_cross_entropy_is_of_odds_over_the_sum_of_odds():
    scores, targets = torch.tensor([[0.8, 0.5, 0.2]]), torch.tensor([[1.0, 0.0, 0.0]])
    assert compute_loss(scores, targets, CROSS_ENTROPY).item() == pytest.approx(log(5.25 / 4), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torch_s_own_of_the_log_odds(smoothing: float):
    scores, targets = example()
    shares = targets / targets.sum(1, keepdim=True)
    logits = torch.logit(clamped(scores))
    expected = nn.functional.cross_entropy(logits, shares, label_smoothing=smoothing)
    loss = compute_loss(scores, targets, LossConfig("cross_entropy", label_smoothing=smoothing))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_cross_entropy_pushes_logits_behind_sigmoids_as_a_softmax_would():
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    classes = torch.tensor([0, 5, 2, 2, 1])
    targets = nn.functional.one_hot(classes, 6).float()
    (ours,) = torch.autograd.grad(compute_loss(logits.sigmoid(), targets, CROSS_ENTROPY), logits)
    (torchs,) = torch.autograd.grad(nn.functional.cross_entropy(logits, classes), logits)
    torch.testing.assert_close(ours, torchs)


def test_cross_entropy_is_lowest_for_the_class_with_the_highest_score():
    scores, _ = example()
    scores[0, 0] = 0.97
    losses = [
        [compute_loss(row[None], one[None], CROSS_ENTROPY).item() for one in torch.eye(7)] for row in scores
    ]
    assert torch.tensor(losses).argsort(1).tolist() == scores.argsort(1, descending=True).tolist()


def test_cross_entropy_of_a_clip_without_a_label_is_nothing():
    scores, targets = example()
    targets[2] = 0
    for smoothing in (0.0, 0.1):
        config = LossConfig("cross_entropy", label_smoothing=smoothing)
        others = [0, 1, 3]
        expected = compute_loss(scores[others], targets[others], config) * 3 / 4
        assert compute_loss(scores, targets, config).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["bce", "focal"])
def test_smoothing_moves_targets_towards_a_half(kind: str):
    scores, targets = example()
    smooth = compute_loss(scores, targets, LossConfig(kind, label_smoothing=0.2))  # type: ignore[arg-type]
    moved = compute_loss(scores, targets * 0.8 + 0.1, LossConfig(kind))  # type: ignore[arg-type]
    assert torch.equal(smooth, moved)


@pytest.mark.parametrize("config", KINDS)
def test_gradients_are_finite_at_0_and_1_and_beyond(config: LossConfig):
    scores = torch.tensor([[0.0, 1.0, 1.3, 1e-7, 1 - 1e-7, 0.5]] * 2, requires_grad=True)
    targets = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]])
    loss = compute_loss(scores, targets, config)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert (scores.grad[:, :3] == 0).all()
    assert (scores.grad[:, 5] * (0.5 - targets[:, 5]) > 0).all()


@pytest.mark.parametrize("config", KINDS)
def test_losses_are_float32_whatever_the_scores_and_targets_are(config: LossConfig):
    scores, targets = example()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert compute_loss(scores.to(dtype), targets.to(dtype), config).dtype == torch.float32


@pytest.mark.parametrize("config", KINDS)
def test_one_nan_score_or_target_makes_the_loss_nan(config: LossConfig):
    for which in range(2):
        pair = example()
        pair[which][2, 3] = float("nan")
        assert compute_loss(*pair, config).isnan()


def test_each_setting_changes_the_loss():
    scores, targets = example()
    configs = [
        *KINDS,
        LossConfig("focal", 1.0),
        *(LossConfig(config.kind, label_smoothing=0.1) for config in KINDS),
    ]
    assert len({compute_loss(scores, targets, config).item() for config in configs}) == len(configs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "focal", "focal_gamma": -0.1}, "loss.focal_gamma is -0.1; give 0 or more"),
        ({"kind": "focal", "focal_gamma": float("nan")}, "loss.focal_gamma is nan"),
        ({"label_smoothing": 1.0}, "loss.label_smoothing is 1.0; give 0 or more, below 1"),
        ({"label_smoothing": -0.1}, "loss.label_smoothing is -0.1"),
        ({"focal_gamma": 3.0}, "loss.focal_gamma is for --loss.kind focal, not bce"),
    ],
)
def test_values_out_of_range_or_without_effect_are_refused(change: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        LossConfig(**change)  # type: ignore[arg-type]
