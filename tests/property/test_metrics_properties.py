"""Metrics of any scores, ties many or none: equal to scikit-learn, to repeated rows, on tensors."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import (
    average_precision_score,
    label_ranking_average_precision_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

from psla_fast.metrics import (
    average_precision,
    compute_lwlrap,
    compute_thresholds,
    measure_classes,
    measure_decisions,
    measure_resamples,
    roc_auc,
)
from psla_fast.metrics.on_device import measure_on_device

Array = npt.NDArray[Any]
LEVELS: list[list[float]] = [
    [0.0, 1.0],
    [-2.5, -0.0, 0.0, 1e-30, 3.0],
    [0.5, float(np.nextafter(np.float32(0.5), np.float32(1)))],
    list(np.linspace(0, 1, 33)),
]


@st.composite
def scores_and_targets(draw: st.DrawFn, max_clips: int = 25) -> tuple[Array, Array]:
    """Few clips and classes; scores of few values, so that ties are many, or without ties."""
    shape = draw(st.tuples(st.integers(1, max_clips), st.integers(1, 5)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    if draw(st.booleans()):
        seed = draw(st.integers(0, 2**32 - 1))
        scores = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    else:
        values = [float(dtype(value)) for value in draw(st.sampled_from(LEVELS))]
        scores = draw(hnp.arrays(dtype, shape, elements=st.sampled_from(values)))
    return scores, draw(hnp.arrays(np.bool_, shape))


@given(scores_and_targets())
def test_tensors_have_the_figures_of_arrays(case: tuple[Array, Array]):
    scores, targets = case
    of_arrays = measure_classes(scores, targets)
    of_tensors = measure_on_device(torch.from_numpy(scores), torch.from_numpy(targets))
    for name, ours in zip(vars(of_arrays), of_tensors, strict=True):
        np.testing.assert_allclose(ours, getattr(of_arrays, name), atol=1e-12, err_msg=name)


@given(scores_and_targets(), st.data())
def test_resamples_have_the_figures_of_rows_that_are_really_repeated(
    case: tuple[Array, Array], data: st.DataObject
):
    scores, targets = case
    counts = data.draw(hnp.arrays(np.int64, (len(scores), 4), elements=st.integers(0, 3)))
    found = measure_resamples(scores, targets, counts)
    for number, times in enumerate(counts.T):
        rows = np.repeat(np.arange(len(scores)), times)
        expected = measure_classes(scores[rows], targets[rows])
        np.testing.assert_allclose(found.average_precision[number], expected.average_precision, atol=1e-12)
        np.testing.assert_allclose(found.roc_auc[number], expected.roc_auc, atol=1e-12)
        lwlrap = compute_lwlrap(scores[rows], targets[rows]).lwlrap if targets[rows].any() else np.nan
        assert found.lwlrap[number] == pytest.approx(lwlrap, abs=1e-12, nan_ok=True)


@given(scores_and_targets(), st.data())
def test_resamples_have_the_figures_of_scikit_learns_sample_weights(
    case: tuple[Array, Array], data: st.DataObject
):
    scores, targets = case
    weights = data.draw(hnp.arrays(np.int64, len(scores), elements=st.integers(0, 3)))
    found = measure_resamples(scores, targets, weights[:, None])
    for index, hits in enumerate(targets.T):
        present = np.unique(hits[weights > 0])
        expected_ap = expected_auc = np.nan
        if True in present:
            expected_ap = average_precision_score(hits, scores[:, index], sample_weight=weights)
        if len(present) == 2:
            expected_auc = roc_auc_score(hits, scores[:, index], sample_weight=weights)
        assert found.average_precision[0, index] == pytest.approx(expected_ap, abs=1e-9, nan_ok=True)
        assert found.roc_auc[0, index] == pytest.approx(expected_auc, abs=1e-9, nan_ok=True)


@given(scores_and_targets())
def test_lwlrap_equals_scikit_learns_and_is_made_of_the_classes(case: tuple[Array, Array]):
    scores, targets = case
    if not targets.any():
        with pytest.raises(ValueError, match="no clip has a label"):
            compute_lwlrap(scores, targets)
        return
    found = compute_lwlrap(scores, targets)
    expected = label_ranking_average_precision_score(targets, scores, sample_weight=targets.sum(1))
    if targets.shape[1] == 1:
        expected = 1.0  # scikit-learn takes one column for no ranking
    assert found.lwlrap == pytest.approx(expected, abs=1e-9)
    assert found.num_labels.tolist() == targets.sum(0).tolist()
    share = found.num_labels / found.num_labels.sum()
    assert np.nansum(found.class_lwlrap * share) == pytest.approx(found.lwlrap, abs=1e-12)
    assert found.num_unlabelled == (~targets.any(1)).sum()


@given(scores_and_targets(), st.data())
def test_precision_recall_and_f1_equal_scikit_learns(case: tuple[Array, Array], data: st.DataObject):
    scores, targets = case
    if not targets.any():
        return
    thresholds = data.draw(
        hnp.arrays(scores.dtype, targets.shape[1], elements=st.sampled_from([-1.0, 0.0, 0.5, 0.75, 4.0]))
    )
    found, decisions = measure_decisions(scores, targets, thresholds), scores > thresholds
    by_class = precision_recall_fscore_support(targets, decisions, average=None, zero_division=np.nan)
    if targets.shape[1] == 1:  # scikit-learn takes one column for the two classes 0 and 1
        by_class = precision_recall_fscore_support(targets, decisions, labels=[1], zero_division=np.nan)
    for ours, theirs in zip((found.precision, found.recall, found.f1), by_class[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    known = targets.any(0)
    for number, name in enumerate(("precision", "recall", "f1")):
        zeros = np.nan_to_num(by_class[number], nan=0.0)
        assert getattr(found, f"macro_{name}") == pytest.approx(zeros[known].mean(), abs=1e-12)
    hits = (decisions & targets).sum()
    assert found.micro_precision == pytest.approx(hits / max(1, decisions.sum()), abs=1e-12)
    assert found.micro_recall == pytest.approx(hits / targets.sum(), abs=1e-12)
    assert found.micro_f1 == pytest.approx(2 * hits / (decisions.sum() + targets.sum()), abs=1e-12)


@given(scores_and_targets(), st.data())
def test_no_threshold_has_a_better_f1_than_the_one_found(case: tuple[Array, Array], data: st.DataObject):
    scores, targets = case[0].astype(np.float32), case[1]
    if not targets.any():
        return
    best = measure_decisions(scores, targets, compute_thresholds(scores, targets))
    other = data.draw(st.sampled_from([-3.0, *scores.ravel().tolist()]))
    for ours, theirs in zip(best.f1, measure_decisions(scores, targets, other).f1, strict=True):
        assert np.isnan(theirs) or not ours < theirs - 1e-12


@given(scores_and_targets())
def test_a_rising_function_of_the_scores_changes_nothing(case: tuple[Array, Array]):
    scores, targets = case[0].astype(np.float64), case[1]
    ranks = np.unique(scores, return_inverse=True)[1].reshape(scores.shape)
    np.testing.assert_array_equal(average_precision(ranks, targets), average_precision(scores, targets))
    np.testing.assert_array_equal(roc_auc(ranks, targets), roc_auc(scores, targets))


@given(scores_and_targets())
def test_the_reverse_of_the_scores_has_the_auc_that_is_missing_to_1(case: tuple[Array, Array]):
    scores, targets = case
    np.testing.assert_allclose(roc_auc(-scores, targets), 1 - roc_auc(scores, targets), atol=1e-12)
