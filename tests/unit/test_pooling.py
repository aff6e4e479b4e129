from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from psla_fast.models import ModelConfig, Pooling, build_pooling

KINDS: dict[str, dict[str, Any]] = {
    "4 heads": {"num_heads": 4},
    "1 head": {"num_heads": 1},
    "mean": {"pooling": "mean"},
    "max": {"pooling": "max"},
    "linear softmax": {"pooling": "linear_softmax"},
}
NUM_STEPS = torch.tensor([9, 5, 1, 0])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pooling_of(std: float = 1.0, **config: Any) -> Pooling:
    """Six features, three classes, weights wide enough that every step counts."""
    torch.manual_seed(1)
    pooling = build_pooling(ModelConfig(**config), num_features=6, num_classes=3)
    for parameter in pooling.parameters():
        nn.init.normal_(parameter, std=std)
    return pooling


def sigmoid_of(pooling: Pooling, part: str, features: Tensor) -> Tensor:
    state = pooling.state_dict()
    weight, bias = state[f"{part}.weight"].squeeze(-1), state[f"{part}.bias"]
    return functional.conv1d(features, weight, bias).sigmoid()


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_attention_is_pslas_formula(num_heads: int) -> None:
    pooling = pooling_of(std=3.0, num_heads=num_heads)  # wide enough that the clamp of att matters
    features, expected = 3 * normal(4, 6, 9), torch.zeros(4, 3)
    for head in range(num_heads):
        suffix = f".{head}" if num_heads > 1 else ""
        attention = sigmoid_of(pooling, f"att{suffix}", features).clamp(1e-7, 1 - 1e-7)
        activity = sigmoid_of(pooling, f"cla{suffix}", features)
        pooled = (attention / attention.sum(dim=2, keepdim=True) * activity).sum(dim=2)
        expected += pooled * (pooling.state_dict()["head_weight"][head] if num_heads > 1 else 1)
    assert torch.allclose(pooling(features), expected, atol=1e-6)


def test_mean_max_and_linear_softmax_are_their_formulas() -> None:
    features = normal(4, 6, 9)
    p = sigmoid_of(pooling_of(pooling="mean"), "cla", features)
    for name, expected in {
        "mean": p.sum(dim=2) / 9,
        "max": p.max(dim=2).values,
        "linear_softmax": (p * p).sum(dim=2) / p.sum(dim=2),
    }.items():
        pooling = pooling_of(pooling=name)
        assert torch.allclose(pooling(features), expected, atol=1e-6), name
        assert pooling.state_dict().keys() == {"cla.weight", "cla.bias"}
    assert torch.equal(pooling_of(num_heads=0)(features), pooling_of(pooling="mean")(features))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_gradients_of_activity_that_underflows_are_finite(kind: str) -> None:
    pooling, features = pooling_of(**KINDS[kind]), normal(4, 6, 9).requires_grad_()
    for name, parameter in pooling.named_parameters():
        if name.endswith("bias"):
            nn.init.constant_(parameter, -200.0)
    scores = pooling(features)
    assert (scores == 0).all()
    scores.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in pooling.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_pooling_stays_in_float32_under_autocast(kind: str) -> None:
    pooling, features = pooling_of(**KINDS[kind]), normal(4, 6, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, activity = pooling(features), pooling.activity(features)
    assert scores.dtype == activity.dtype == torch.float32
    assert torch.equal(scores, pooling(features))
    assert torch.equal(activity, pooling.activity(features))


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_of_a_clip_of_one_step_is_its_activity(kind: str) -> None:
    pooling, features = pooling_of(**KINDS[kind]), normal(4, 6, 9)
    activity = pooling.activity(features)
    assert activity.shape == (4, 3, 9)
    for step in range(9):
        alone = pooling(features[:, :, step : step + 1])
        assert torch.allclose(alone, activity[:, :, step], atol=1e-6)


# --- masked padding ---


def behind(num_steps: Tensor, features: Tensor) -> Tensor:
    """(B, D, T'): the features that masking leaves out."""
    left_out = torch.arange(features.shape[2]) >= num_steps.clamp(min=1)[:, None]
    return left_out[:, None].expand_as(features)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_lies_behind_a_clips_steps_its_pooled_scores_are_those_of_the_clip_alone(kind: str) -> None:
    pooling, features = pooling_of(**KINDS[kind]), normal(4, 6, 9)
    scores = pooling(features, NUM_STEPS)
    for garbage in (0.0, 1e4, -3e38, 3e38, torch.inf, torch.nan):
        assert torch.equal(
            pooling(features.masked_fill(behind(NUM_STEPS, features), garbage), NUM_STEPS), scores
        )
    for clip, steps in enumerate(NUM_STEPS.clamp(min=1).tolist()):
        assert torch.allclose(scores[clip], pooling(features[clip : clip + 1, :, :steps])[0], atol=1e-6)
    assert (scores - pooling(features))[1:].abs().max() > 1e-2, "all steps give other scores"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", [7, 33])
def test_a_mask_of_full_length_changes_no_bit(kind: str, num_steps: int) -> None:
    pooling, features = pooling_of(**KINDS[kind]), normal(4, 6, num_steps)
    for count in (num_steps, num_steps + 5):
        assert torch.equal(pooling(features, torch.full((4,), count)), pooling(features))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [1.0, 3e38])
def test_no_gradient_reaches_what_lies_behind_a_clips_steps(kind: str, garbage: float) -> None:
    pooling, features = pooling_of(**KINDS[kind]), normal(4, 6, 9)
    left_out = behind(NUM_STEPS, features)
    features = features.masked_fill(left_out, garbage).requires_grad_()
    (pooling(features, NUM_STEPS) * normal(4, 3, seed=1)).sum().backward()
    assert (features.grad[left_out] == 0).all()
    reached = features.grad.abs().amax(dim=1) > 0  # (B, T')
    assert reached.any(dim=1).all()
    assert kind == "max" or reached[~left_out[:, 0]].all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in pooling.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_masked_pooling_gives_the_eager_scores_for_any_length(kind: str) -> None:
    torch.compiler.reset()
    pooling = pooling_of(**KINDS[kind])
    compiled = torch.compile(pooling, backend="aot_eager", fullgraph=True)
    for steps in (9, 12, 17):
        features = normal(4, 6, steps)
        assert torch.allclose(compiled(features, NUM_STEPS), pooling(features, NUM_STEPS), atol=1e-6)


def test_a_number_of_heads_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="num_heads is for --model.pooling attention, not max"):
        ModelConfig(pooling="max", num_heads=1)
