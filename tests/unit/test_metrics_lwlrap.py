import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import label_ranking_average_precision_score

from psla_fast.metrics import compute_lwlrap


def test_a_clips_labels_are_ranked_among_its_classes():
    # ranks of the labels: 1 and 3 of the first clip, 2 of the second
    scores = np.array([[0.9, 0.5, 0.4, 0.1], [0.3, 0.8, 0.1, 0.2]])
    targets = np.array([[1, 0, 1, 0], [1, 0, 0, 0]])
    found = compute_lwlrap(scores, targets)
    assert found.lwlrap == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    np.testing.assert_allclose(found.class_lwlrap, [0.75, np.nan, 2 / 3, np.nan])
    assert found.num_labels.tolist() == [2, 0, 1, 0]


def test_a_class_that_ties_with_a_label_counts_as_above_it():
    assert compute_lwlrap(np.full((1, 4), 0.5), np.array([[0, 1, 0, 0]])).lwlrap == 0.25


def test_clips_without_labels_count_for_nothing_and_are_counted():
    rng = np.random.default_rng(0)
    scores, targets = rng.random((40, 6)), rng.random((40, 6)) < 0.3
    targets[::4] = False
    found, alone = (
        compute_lwlrap(scores, targets),
        compute_lwlrap(scores[targets.any(1)], targets[targets.any(1)]),
    )
    assert found.lwlrap == alone.lwlrap
    assert found.num_unlabelled == (~targets.any(1)).sum() >= 10
    assert alone.num_unlabelled == 0


def test_many_clips_are_taken_some_at_a_time_and_equal_scikit_learns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("psla_fast.metrics.label_ranking.VALUES_A_PIECE", 5000)
    rng = np.random.default_rng(0)
    targets = rng.random((700, 50)) < 0.06
    scores = (np.round(rng.random((700, 50)) * 40) / 40).astype(np.float32)
    expected = label_ranking_average_precision_score(targets, scores, sample_weight=targets.sum(1))
    assert compute_lwlrap(scores, targets).lwlrap == pytest.approx(expected, abs=1e-9)
    of_tensors = compute_lwlrap(torch.from_numpy(scores), torch.from_numpy(targets))
    assert of_tensors.lwlrap == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (np.ones((2, 3)), np.zeros((2, 3)), "no clip has a label"),
        (np.ones((0, 3)), np.zeros((0, 3)), "no clip has a label"),
        (np.full((2, 3), math.nan), np.ones((2, 3)), "score of clip 0, class 0 is nan"),
        (np.ones((2, 3)), np.full((2, 3), 0.5), "hard labels"),
        (np.ones((2, 3)), np.ones((3, 2)), r"must both be \(N, C\)"),
    ],
)
def test_what_can_t_be_ranked_is_refused(scores: Any, targets: Any, message: str):
    with pytest.raises(ValueError, match=message):
        compute_lwlrap(scores, targets)
