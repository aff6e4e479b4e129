import math
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import norm
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from psla_fast.metrics import (
    Metrics,
    average_precision,
    compute_lwlrap,
    compute_metrics,
    d_prime,
    measure_classes,
    roc_auc,
)
from psla_fast.metrics.on_device import measure_on_device

Array = npt.NDArray[Any]


def middle_of_curve(scores: Array, targets: Array) -> tuple[float, float]:
    """Precision and recall as PSLA takes them: at the middle of scikit-learn's curve."""
    precision, recall, _ = precision_recall_curve(targets, scores)
    return float(precision[len(precision) // 2]), float(recall[len(recall) // 2])


def check_against_sklearn(scores: Array, targets: Array) -> None:
    """Every class's AP and AUC, and the means of compute_metrics, to 1e-9."""
    classes = range(targets.shape[1])
    num_positive = targets.sum(axis=0)
    with_positives = [c for c in classes if num_positive[c] > 0]
    with_both = [c for c in with_positives if num_positive[c] < len(targets)]
    ours_ap, ours_auc = average_precision(scores, targets), roc_auc(scores, targets)
    ap = {c: average_precision_score(targets[:, c], scores[:, c]) for c in with_positives}
    auc = {c: roc_auc_score(targets[:, c], scores[:, c]) for c in with_both}
    for c in classes:
        assert ours_ap[c] == pytest.approx(ap.get(c, math.nan), abs=1e-9, nan_ok=True)
        assert ours_auc[c] == pytest.approx(auc.get(c, math.nan), abs=1e-9, nan_ok=True)
    if not with_both:
        with pytest.raises(ValueError, match="no class has both"):
            compute_metrics(scores, targets)
        return
    metrics = compute_metrics(scores, targets)
    middles = [middle_of_curve(scores[:, c], targets[:, c]) for c in with_positives]
    expected_auc = np.mean(list(auc.values()))
    assert metrics.mean_ap == pytest.approx(np.mean(list(ap.values())), abs=1e-9)
    assert metrics.mean_auc == pytest.approx(expected_auc, abs=1e-9)
    assert metrics.mean_precision == pytest.approx(np.mean([p for p, _ in middles]), abs=1e-9)
    assert metrics.mean_recall == pytest.approx(np.mean([r for _, r in middles]), abs=1e-9)
    assert (metrics.num_classes, metrics.num_skipped) == (len(ap), len(classes) - len(ap))
    if 1e-6 < expected_auc < 1 - 1e-6:
        assert metrics.d_prime == pytest.approx(math.sqrt(2) * norm.ppf(expected_auc), abs=1e-6)


@st.composite
def scores_and_targets(draw: st.DrawFn) -> tuple[Array, Array]:
    """Few clips and classes; scores from few values, so that ties are many, or from neighbouring floats."""
    shape = draw(st.tuples(st.integers(1, 30), st.integers(1, 4)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    values = draw(
        st.sampled_from(
            [
                [0.0, 1.0],
                [-2.5, -0.0, 0.0, 1e-30, 3.0],
                [0.5, float(np.nextafter(dtype(0.5), dtype(1))), float(np.nextafter(dtype(0.5), dtype(0)))],
                list(np.linspace(0, 1, 21)),
            ]
        )
    )
    scores = draw(hnp.arrays(dtype, shape, elements=st.sampled_from([float(dtype(v)) for v in values])))
    targets = draw(hnp.arrays(np.int8, shape, elements=st.integers(0, 1)))
    return scores, targets


@given(scores_and_targets())
def test_every_figure_equals_scikit_learns_where_ties_are_many(case: tuple[Array, Array]) -> None:
    check_against_sklearn(*case)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [2, 10, 1000, 0], ids=["2 levels", "10", "1000", "no ties"])
def test_every_figure_equals_scikit_learns_on_many_clips(dtype: type, levels: int) -> None:
    rng = np.random.default_rng(0)
    targets = rng.random((3000, 12)) < np.geomspace(0.001, 0.9, 12)
    logits = rng.standard_normal((3000, 12)) + 1.5 * targets
    scores = 1 / (1 + np.exp(-logits))
    scores = (np.round(scores * levels) / levels if levels else scores).astype(dtype)
    assert not levels or all(len(np.unique(column)) <= levels + 1 for column in scores.T)
    check_against_sklearn(scores, targets.astype(np.float32))


def test_half_precision_integer_and_boolean_scores_are_ranked_as_they_are() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, (200, 3))
    for scores in (
        rng.random((200, 3)).astype(np.float16),
        rng.integers(-5, 5, (200, 3)).astype(np.int8),
        rng.integers(0, 255, (200, 3)).astype(np.uint8),
        rng.random((200, 3)) < 0.5,
    ):
        as_float = scores.astype(np.float64)
        np.testing.assert_array_equal(
            average_precision(scores, targets), average_precision(as_float, targets)
        )
        np.testing.assert_array_equal(roc_auc(scores, targets), roc_auc(as_float, targets))
        check_against_sklearn(as_float, targets)


def test_a_perfect_ranking_has_1_and_the_reverse_auc_0() -> None:
    targets = np.array([[1, 0], [1, 0], [0, 1], [0, 1]])
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]])
    assert average_precision(scores, targets).tolist() == [1, 1]
    assert roc_auc(scores, targets).tolist() == [1, 1]
    assert roc_auc(-scores, targets).tolist() == [0, 0]
    assert compute_metrics(scores, targets).d_prime == math.inf
    assert compute_metrics(-scores, targets).d_prime == -math.inf


def test_constant_scores_have_auc_a_half_and_the_class_share_as_precision() -> None:
    targets = np.array([[1, 1], [0, 1], [0, 1], [0, 0]])
    scores = np.full((4, 2), 0.3)
    assert roc_auc(scores, targets).tolist() == [0.5, 0.5]
    assert average_precision(scores, targets).tolist() == [0.25, 0.75]
    metrics = compute_metrics(scores, targets)
    assert (metrics.mean_auc, metrics.d_prime, metrics.mean_ap) == (0.5, 0.0, 0.5)
    check_against_sklearn(scores, targets)


def test_a_class_with_one_value_has_no_auc_and_one_without_positives_no_precision() -> None:
    targets = np.array([[0, 1, 1], [0, 1, 0], [0, 1, 1]])
    scores = np.array([[0.1, 0.2, 0.3], [0.3, 0.1, 0.2], [0.2, 0.2, 0.1]])
    auc, precision = roc_auc(scores, targets), average_precision(scores, targets)
    assert np.isnan(auc).tolist() == [True, True, False]
    assert np.isnan(precision).tolist() == [True, False, False]
    assert precision[1] == 1


def test_classes_without_positives_are_left_out_of_the_means_and_counted() -> None:
    rng = np.random.default_rng(0)
    scores, targets = rng.random((50, 6)), rng.integers(0, 2, (50, 6))
    targets[:, [1, 4]] = 0
    metrics, kept = compute_metrics(scores, targets), [0, 2, 3, 5]
    alone = compute_metrics(scores[:, kept], targets[:, kept])
    assert (metrics.num_classes, metrics.num_skipped) == (4, 2)
    assert (alone.num_classes, alone.num_skipped) == (4, 0)
    for name in ("mean_ap", "mean_auc", "mean_precision", "mean_recall", "d_prime"):
        assert getattr(metrics, name) == getattr(alone, name)


def test_an_all_positive_class_counts_for_precision_but_not_for_auc() -> None:
    rng = np.random.default_rng(0)
    scores, targets = rng.random((50, 2)), rng.integers(0, 2, (50, 2))
    targets[:, 0] = 1
    metrics = compute_metrics(scores, targets)
    assert metrics.num_classes == 2
    assert metrics.mean_auc == pytest.approx(roc_auc_score(targets[:, 1], scores[:, 1]), abs=1e-12)
    expected = (1 + average_precision_score(targets[:, 1], scores[:, 1])) / 2
    assert metrics.mean_ap == pytest.approx(expected, abs=1e-12)


def test_the_order_of_the_clips_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    scores, targets = rng.integers(0, 8, (300, 5)) / 8, rng.integers(0, 2, (300, 5))
    order = rng.permutation(300)
    np.testing.assert_allclose(
        average_precision(scores, targets), average_precision(scores[order], targets[order]), atol=1e-12
    )
    np.testing.assert_allclose(roc_auc(scores, targets), roc_auc(scores[order], targets[order]), atol=1e-12)


def test_the_arguments_are_left_as_they_were() -> None:
    rng = np.random.default_rng(0)
    scores, targets = rng.random((50, 3)), rng.integers(0, 2, (50, 3)).astype(np.float32)
    before = scores.copy(), targets.copy()
    compute_metrics(scores, targets)
    assert np.array_equal(scores, before[0])
    assert np.array_equal(targets, before[1])


FUNCTIONS = pytest.mark.parametrize("function", [average_precision, roc_auc, compute_metrics])


@FUNCTIONS
@pytest.mark.parametrize("shapes", [((4, 2), (4, 3)), ((4, 2), (2, 4)), ((4,), (4,)), ((2, 2, 2), (2, 2, 2))])
def test_other_shapes_are_refused_with_both_named(function: Any, shapes: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"must both be \(N, C\)") as caught:
        function(np.zeros(shapes[0]), np.zeros(shapes[1]))
    assert str(shapes[0]) in str(caught.value)


@FUNCTIONS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_refused_by_its_place(function: Any, value: float) -> None:
    scores, targets = np.random.default_rng(0).random((6, 3)), np.eye(6, 3)
    scores[4, 1] = value
    with pytest.raises(ValueError, match=f"clip 4, class 1 is {value}"):
        function(scores, targets)


@FUNCTIONS
@pytest.mark.parametrize("value", [0.5, -1, 2, math.nan])
def test_soft_targets_are_refused(function: Any, value: float) -> None:
    targets = np.eye(6, 3)
    targets[5, 0] = value
    with pytest.raises(ValueError, match="hard labels"):
        function(np.random.default_rng(0).random((6, 3)), targets)


@pytest.mark.parametrize("targets", [np.zeros((4, 2)), np.ones((4, 2)), np.zeros((0, 2)), np.zeros((4, 0))])
def test_means_over_no_class_are_refused(targets: Array) -> None:
    with pytest.raises(ValueError, match="no class has both positives and negatives"):
        compute_metrics(np.zeros(targets.shape), targets)


def test_d_prime_is_root_2_times_the_normal_quantile() -> None:
    for auc in (0.001, 0.3, 0.5, 0.974047, 0.9999):
        assert d_prime(auc) == pytest.approx(math.sqrt(2) * norm.ppf(auc), rel=1e-12)
    assert d_prime(0.974047) == pytest.approx(2.749102, abs=2e-5), "PSLA's own line of AudioSet"
    assert (d_prime(0.0), d_prime(1.0)) == (-math.inf, math.inf)


def test_metrics_are_printed_as_pslas_line() -> None:
    rng = np.random.default_rng(0)
    metrics = compute_metrics(rng.random((50, 3)), rng.integers(0, 2, (50, 3)))
    expected = f"mAP: {metrics.mean_ap:.6f}, AUC: {metrics.mean_auc:.6f}, d-prime: {metrics.d_prime:.6f}"
    assert str(metrics) == expected


def test_classes_left_out_of_the_auc_are_counted_apart():
    rng = np.random.default_rng(0)
    scores, targets = rng.random((50, 6)), rng.integers(0, 2, (50, 6))
    targets[:, 1], targets[:, 2], targets[:, 3] = 0, 1, 1
    metrics = compute_metrics(scores, targets)
    assert (metrics.num_classes, metrics.num_skipped, metrics.num_auc_skipped) == (5, 1, 3)


def test_records_from_before_classes_without_an_auc_were_counted_can_be_read():
    before = {"mean_ap": 0.5, "mean_auc": 0.9, "mean_precision": 0.1, "mean_recall": 0.2, "d_prime": 1.8}
    assert Metrics(**before, num_classes=4, num_skipped=1).num_auc_skipped == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_tensors_have_the_figures_of_their_values(dtype: torch.dtype):
    scores = torch.rand(300, 20, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    targets = torch.rand(300, 20, generator=torch.Generator().manual_seed(1)) < 0.2
    expected = compute_metrics(scores.detach().double().numpy(), targets.numpy())
    assert compute_metrics(scores, targets) == expected
    assert compute_metrics(scores, targets.float()) == expected
    on_device = measure_on_device(scores.detach(), targets)
    assert np.nanmean(on_device[1]) == pytest.approx(expected.mean_ap, abs=1e-12)
    assert np.nanmean(on_device[2]) == pytest.approx(expected.mean_auc, abs=1e-12)


def test_a_devices_classes_are_measured_some_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("psla_fast.metrics.on_device.VALUES_A_PIECE", 700)
    rng = np.random.default_rng(0)
    scores, targets = rng.random((100, 30)).astype(np.float32), rng.random((100, 30)) < 0.1
    targets[:, 4] = False
    here = measure_classes(scores, targets)
    there = measure_on_device(torch.from_numpy(scores), torch.from_numpy(targets))
    for name, figures in zip(vars(here), there, strict=True):
        np.testing.assert_allclose(figures, getattr(here, name), atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((torch.zeros(4, 2), torch.zeros(2, 4)), r"must both be \(N, C\)"),
        ((torch.full((4, 2), torch.nan), torch.zeros(4, 2)), "score of clip 0, class 0 is nan"),
        ((torch.zeros(4, 2), torch.full((4, 2), 0.5)), "target of clip 0, class 0 is 0.5"),
    ],
)
def test_a_device_refuses_what_arrays_are_refused_for(wrong: tuple[Any, Any], message: str):
    with pytest.raises(ValueError, match=message):
        measure_on_device(*wrong)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_device_measures_nothing_of_nothing(shape: tuple[int, int]):
    assert np.isnan(measure_on_device(torch.zeros(shape), torch.zeros(shape))[1:]).all()


def test_threads_give_what_one_gives(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    scores, targets = rng.random((200, 100)), rng.random((200, 100)) < 0.1
    alone = measure_classes(scores, targets)
    monkeypatch.setattr("psla_fast.metrics.threads.VALUES_A_THREAD", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    together = measure_classes(scores, targets)
    for name, expected in vars(alone).items():
        np.testing.assert_array_equal(getattr(together, name), expected)
    scores[7, 90], scores[150, 40] = math.nan, math.inf
    with pytest.raises(ValueError, match="clip 150, class 40 is inf"):
        measure_classes(scores, targets)


def test_memory_does_not_grow_with_the_classes():
    def own_peak(num_classes: int) -> int:
        rng = np.random.default_rng(0)
        scores = rng.random((4000, num_classes), np.float32)
        targets = (scores > 0.95).astype(np.float32)
        tracemalloc.start()
        measure_classes(scores, targets)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    own_peak(200)  # what is made once
    assert own_peak(800) < 1.3 * own_peak(200)
    assert own_peak(800) < 4 * 4000 * 800, "less than the scores themselves"


def test_read_only_and_strided_arrays_are_measured_as_they_are():
    rng = np.random.default_rng(0)
    scores, targets = rng.random((100, 8)), rng.integers(0, 2, (100, 8))
    expected, lwlrap = compute_metrics(scores[::2, ::-1], targets[::2, ::-1]), compute_lwlrap(scores, targets)
    for array in (scores, targets):
        array.flags.writeable = False
    assert compute_metrics(scores[::2, ::-1].copy(), targets[::2, ::-1].copy()) == expected
    assert compute_metrics(scores[::2, ::-1], targets[::2, ::-1]) == expected
    assert compute_lwlrap(scores, targets).lwlrap == lwlrap.lwlrap
