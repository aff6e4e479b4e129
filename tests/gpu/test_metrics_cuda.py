"""Metrics of tensors that lie on a GPU: the figures of arrays, to 1e-9. Skipped where there is none."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor

from psla_fast.metrics import (
    bootstrap_metrics,
    compute_lwlrap,
    compute_metrics,
    measure_classes,
    measure_decisions,
)

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def draw(levels: int = 0) -> tuple[Tensor, Tensor]:
    """20,371 clips of 60 classes, one of them without positives, one without negatives."""
    random = torch.Generator().manual_seed(0)
    targets = torch.rand(20371, 60, generator=random) < torch.logspace(-3, -0.2, 60)
    targets[:, 7], targets[:, 8] = False, True
    scores = (torch.randn(20371, 60, generator=random) + targets).sigmoid()
    return (scores * levels).round() / levels if levels else scores, targets


@pytest.mark.parametrize("levels", [0, 50], ids=["no ties", "50 levels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_each_classs_figures_are_those_of_arrays(dtype: torch.dtype, levels: int):
    scores, targets = draw(levels)
    scores = scores.to(dtype)
    here, there = measure_classes(scores, targets), measure_classes(scores.to(CUDA), targets.to(CUDA))
    for name, expected in vars(here).items():
        np.testing.assert_allclose(getattr(there, name), expected, rtol=0, atol=1e-9, err_msg=name)


def test_means_lwlrap_and_decisions_are_those_of_arrays():
    scores, targets = draw()
    for measure in (
        compute_metrics,
        compute_lwlrap,
        lambda scores, targets: measure_decisions(scores, targets, torch.linspace(0.2, 0.8, 60)),
    ):
        here, there = asdict(measure(scores, targets)), asdict(measure(scores.to(CUDA), targets.to(CUDA)))
        for name, expected in here.items():
            np.testing.assert_allclose(there[name], expected, rtol=0, atol=1e-9, err_msg=name)


def test_targets_may_lie_elsewhere_than_the_scores():
    scores, targets = draw()
    expected = compute_metrics(scores, targets)
    assert compute_metrics(scores.to(CUDA), targets.numpy()).mean_ap == pytest.approx(
        expected.mean_ap, abs=1e-9
    )
    assert compute_metrics(scores, targets.to(CUDA)) == expected


def test_the_bootstrap_takes_them_to_the_cpu():
    scores, targets = draw()
    small, wanted = scores[:500], targets[:500]
    assert bootstrap_metrics(small.to(CUDA), wanted.to(CUDA), 20).mean_ap == (
        bootstrap_metrics(small, wanted, 20).mean_ap
    )


def test_wrong_values_are_named_by_their_place():
    scores, targets = draw()
    scores[4, 1] = torch.nan
    with pytest.raises(ValueError, match="clip 4, class 1 is nan"):
        compute_metrics(scores.to(CUDA), targets.to(CUDA))


def test_scores_stay_on_the_gpu():
    scores, targets = (tensor.to(CUDA) for tensor in draw())
    measure_classes(scores, targets)  # starts what CUDA starts once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        measure_classes(scores, targets)
    copies = [event for event in profile.key_averages() if "DtoH" in event.key]
    assert sum(event.count for event in copies) <= 4, "figures and checks alone"
