"""Confidence intervals; tests/property/test_metrics_properties.py has what the resamples' figures equal."""

import math
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from psla_fast.metrics import (
    average_precision,
    bootstrap_metrics,
    compute_lwlrap,
    compute_metrics,
    d_prime,
    measure_resamples,
)

Array = npt.NDArray[Any]


def draw(num_clips: int, num_classes: int, seed: int = 0, share: float = 0.2) -> tuple[Array, Array]:
    """Scores that say something of the targets."""
    rng = np.random.default_rng(seed)
    targets = rng.random((num_clips, num_classes)) < share
    return rng.standard_normal((num_clips, num_classes)) + 1.5 * targets, targets


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_value_is_that_of_all_clips_and_lies_within_its_interval():
    scores, targets = draw(500, 8)
    found, metrics = bootstrap_metrics(scores, targets, 300), compute_metrics(scores, targets)
    assert found.mean_ap.value == pytest.approx(metrics.mean_ap, abs=1e-12)
    assert found.mean_auc.value == pytest.approx(metrics.mean_auc, abs=1e-12)
    assert found.d_prime.value == pytest.approx(metrics.d_prime, abs=1e-9)
    assert found.lwlrap.value == pytest.approx(compute_lwlrap(scores, targets).lwlrap, abs=1e-12)
    for interval in (found.mean_ap, found.mean_auc, found.d_prime, found.lwlrap):
        assert interval.low < interval.value < interval.high
    assert (found.num_untold, found.mean_left_out) == (0, 0)
    assert str(found.mean_auc) == (
        f"{found.mean_auc.value:.4f} ({found.mean_auc.low:.4f} to {found.mean_auc.high:.4f})"
    )


def test_the_percentile_interval_holds_the_confidences_share_of_the_resamples():
    scores, targets = draw(200, 5)
    for confidence in (0.5, 0.95):
        found = bootstrap_metrics(scores, targets, 1000, confidence, kind="percentile")
        for name, interval in (("mean_ap", found.mean_ap), ("lwlrap", found.lwlrap)):
            inside = (found.samples[name] >= interval.low) & (found.samples[name] <= interval.high)
            assert inside.mean() == pytest.approx(confidence, abs=2e-3)
        assert found.d_prime.low == d_prime(found.mean_auc.low)


def test_the_basic_interval_is_the_percentiles_mirrored_at_the_value_and_stays_within_0_and_1():
    scores, targets = draw(60, 5)
    mirrored = bootstrap_metrics(scores, targets, 300)
    plain = bootstrap_metrics(scores, targets, 300, kind="percentile")
    value = plain.mean_ap.value
    assert mirrored.mean_ap.low == pytest.approx(2 * value - plain.mean_ap.high)
    assert mirrored.mean_ap.high == pytest.approx(2 * value - plain.mean_ap.low)
    assert ((mirrored.class_ap >= 0) & (mirrored.class_ap <= 1)).all()


def test_the_basic_interval_holds_the_map_of_all_clips_there_are_where_classes_are_rare():
    everything = compute_metrics(*draw(100_000, 10, 999, share=0.03)).mean_ap
    held = {"basic": 0, "percentile": 0}
    for seed in range(40):
        scores, targets = draw(400, 10, seed, share=0.03)
        for kind in ("basic", "percentile"):
            interval = bootstrap_metrics(scores, targets, 60, kind=kind).mean_ap  # type: ignore[arg-type]
            held[kind] += interval.low <= everything <= interval.high
    assert held["basic"] >= 32, "about 36 of 40"
    assert held["basic"] > held["percentile"] + 4


def test_a_seed_gives_the_same_resamples_and_another_seed_others():
    scores, targets = draw(100, 4)
    once, again, other = (bootstrap_metrics(scores, targets, 50, generator=seeded(s)) for s in (1, 1, 2))
    for name in ("mean_ap", "mean_auc", "lwlrap"):
        assert np.array_equal(once.samples[name], again.samples[name])
        assert not np.array_equal(once.samples[name], other.samples[name])


def test_resamples_are_the_same_however_many_are_taken_at_once(monkeypatch: pytest.MonkeyPatch):
    scores, targets = draw(100, 4)
    whole = bootstrap_metrics(scores, targets, 50, generator=seeded(1))
    monkeypatch.setattr("psla_fast.metrics.bootstrap.COUNTS_AT_ONCE", 700)
    pieces = bootstrap_metrics(scores, targets, 50, generator=seeded(1))
    np.testing.assert_allclose(whole.samples["mean_ap"], pieces.samples["mean_ap"], atol=1e-12)
    np.testing.assert_array_equal(whole.class_ap, pieces.class_ap)


def test_two_models_meet_the_same_resamples_so_that_their_difference_is_told_better():
    scores, targets = draw(300, 5)
    better = scores + 0.1 * targets
    first, second = bootstrap_metrics(scores, targets, 400), bootstrap_metrics(better, targets, 400)
    difference = second.samples["mean_ap"] - first.samples["mean_ap"]
    assert np.quantile(difference, 0.025) > 0, "though either's own interval holds the other"
    assert second.mean_ap.low < first.mean_ap.high


def test_the_auc_spreads_over_resamples_as_over_new_clips():
    scores, targets = draw(400, 10)
    found = bootstrap_metrics(scores, targets, 400)
    fresh = [compute_metrics(*draw(400, 10, seed)).mean_auc for seed in range(1, 200)]
    assert found.samples["mean_auc"].std() == pytest.approx(np.std(fresh), rel=0.25)


def test_a_class_that_a_resample_lacks_is_left_out_of_its_mean_and_counted():
    scores, targets = draw(60, 3, share=0.5)
    targets[:, 2] = np.arange(60) == 7  # one clip: 36 % of the resamples lack it
    found = bootstrap_metrics(scores, targets, 2000)
    assert found.mean_left_out == pytest.approx((1 - 1 / 60) ** 60, abs=0.04)
    assert found.num_untold == 0
    assert np.isfinite(found.samples["mean_ap"]).all()


def test_a_class_without_positives_changes_no_interval():
    scores, targets = draw(60, 3, share=0.5)
    alone = bootstrap_metrics(scores[:, :2], targets[:, :2], 50)
    targets[:, 2] = False
    found = bootstrap_metrics(scores, targets, 50)
    assert found.mean_ap == alone.mean_ap
    assert (found.mean_auc, found.mean_left_out) == (alone.mean_auc, 0)
    assert np.isnan(found.class_ap[2]).all()
    assert np.array_equal(found.class_ap[:2], alone.class_ap)


def test_resamples_without_any_class_are_left_out_and_counted():
    targets = np.zeros((20, 1), bool)
    targets[3] = True
    found = bootstrap_metrics(draw(20, 1)[0], targets, 1000)
    assert found.num_untold / 1000 == pytest.approx((1 - 1 / 20) ** 20, abs=0.05)
    assert math.isfinite(found.mean_ap.low)
    assert math.isfinite(found.mean_auc.high)


def test_perfect_scores_have_no_spread_and_an_infinite_d_prime():
    _, targets = draw(50, 3, share=0.5)
    found = bootstrap_metrics(targets.astype(np.float64), targets, 100)
    assert (found.mean_ap.low, found.mean_ap.high) == (1, 1)
    assert found.d_prime.low == found.d_prime.high == math.inf


def test_what_can_t_be_resampled_is_refused():
    scores, targets = draw(20, 2)
    with pytest.raises(ValueError, match="number of resamples is 1; give 2 or more"):
        bootstrap_metrics(scores, targets, 1)
    for confidence in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match=f"confidence is {confidence}; give a share between 0 and 1"):
            bootstrap_metrics(scores, targets, 10, confidence)
    with pytest.raises(ValueError, match="interval is 'bca'; give one of basic, percentile"):
        bootstrap_metrics(scores, targets, 10, kind="bca")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no class has both positives and negatives"):
        bootstrap_metrics(scores, np.ones_like(targets), 10)
    with pytest.raises(ValueError, match="hard labels"):
        bootstrap_metrics(scores, targets * 0.5, 10)
    for counts in (np.ones((19, 3)), np.ones(20), np.full((20, 1), -1), np.full((20, 1), 0.5)):
        with pytest.raises(ValueError, match=r"give \(20, R\), each whole and 0 or more"):
            measure_resamples(scores, targets, counts)
    with pytest.raises(ValueError, match=r"counts are \(20, 0\), of no resample"):
        measure_resamples(scores, targets, np.ones((20, 0)))
    with pytest.raises(ValueError, match="add up to more than 16,777,216"):
        measure_resamples(scores, targets, np.full((20, 1), 2**20))


def test_a_thousand_resamples_cost_less_than_a_third_of_measuring_each():
    scores, targets = draw(3000, 30, share=0.03)
    scores, clips = scores.astype(np.float32), np.arange(3000)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        bootstrap_metrics(scores, targets, 1000)
        together = time.process_time() - start
        start = time.process_time()
        for _ in range(60):
            average_precision(scores[clips], targets[clips])
        one_by_one = time.process_time() - start
    finally:
        torch.set_num_threads(before)
    assert together < one_by_one * 1000 / 60 / 3
