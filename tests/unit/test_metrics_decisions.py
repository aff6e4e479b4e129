import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from psla_fast.metrics import compute_thresholds, measure_decisions

Array = npt.NDArray[Any]
SCORES = np.array([[0.9, 0.2, 0.6, 0.1], [0.8, 0.7, 0.4, 0.2], [0.3, 0.1, 0.7, 0.3], [0.1, 0.6, 0.9, 0.4]])
TARGETS = np.array([[1, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])


def test_one_threshold_serves_all_classes():
    found = measure_decisions(SCORES, TARGETS, 0.5)
    assert found.num_found.tolist() == [2, 2, 3, 0]
    np.testing.assert_array_equal(found.precision, [0.5, 0.5, 0, np.nan])
    np.testing.assert_array_equal(found.recall, [0.5, 1, np.nan, 0])
    np.testing.assert_allclose(found.f1, [0.5, 2 / 3, 0, 0])
    assert (found.micro_precision, found.micro_recall) == (2 / 7, 2 / 5)
    assert found.micro_f1 == pytest.approx(4 / 12)


def test_a_class_without_positives_is_left_out_of_the_means_and_one_never_found_counts_as_asked():
    found = measure_decisions(SCORES, TARGETS, 0.5)
    assert (found.num_skipped, found.num_never_found) == (1, 1)
    assert found.macro_precision == pytest.approx(1 / 3)
    assert found.macro_recall == pytest.approx(1.5 / 3)
    assert found.macro_f1 == pytest.approx((0.5 + 2 / 3) / 3)
    kinder = measure_decisions(SCORES, TARGETS, 0.5, zero_division=1.0)
    assert kinder.macro_precision == pytest.approx(2 / 3)
    assert kinder.macro_recall == found.macro_recall


def test_nothing_found_at_all_has_the_precision_that_was_asked():
    assert measure_decisions(SCORES, TARGETS, 2.0).micro_precision == 0
    assert measure_decisions(SCORES, TARGETS, 2.0, zero_division=1.0).micro_precision == 1
    assert measure_decisions(SCORES, TARGETS, 2.0).micro_f1 == 0


def test_each_class_may_have_its_threshold_and_a_score_that_equals_it_is_not_above():
    found = measure_decisions(SCORES, TARGETS, [0.8, 0.6, 0.6, 0.05])
    assert found.num_found.tolist() == [1, 1, 2, 4]
    same = measure_decisions(torch.tensor(SCORES), torch.tensor(TARGETS), torch.tensor([0.8, 0.6, 0.6, 0.05]))
    np.testing.assert_array_equal(found.f1, same.f1)


def test_a_float32_score_meets_its_own_value_as_threshold():
    scores = np.array([[0.1], [0.3]], np.float32)
    assert measure_decisions(scores, np.array([[0], [1]]), 0.1).num_found.tolist() == [1]


def test_thresholds_found_on_a_split_give_its_best_f1():
    found = measure_decisions(SCORES, TARGETS, compute_thresholds(SCORES, TARGETS))
    assert found.f1[0] == pytest.approx(0.8)
    assert found.f1[1] == 1
    assert found.f1[3] == pytest.approx(2 / 3)


def test_what_decides_nothing_is_refused():
    for thresholds in (np.zeros(3), np.zeros((1, 4)), math.nan, [0.1, 0.2, 0.3, math.inf]):
        with pytest.raises(ValueError, match="give one finite number, or 4, one a class"):
            measure_decisions(SCORES, TARGETS, thresholds)
    with pytest.raises(ValueError, match="no class has positives"):
        measure_decisions(SCORES, np.zeros_like(TARGETS), 0.5)
    with pytest.raises(ValueError, match="target of clip 0, class 0 is 0.5; metrics need hard labels"):
        measure_decisions(SCORES, TARGETS * 0.5, 0.5)
    with pytest.raises(ValueError, match=r"must both be \(N, C\)"):
        measure_decisions(SCORES[0], TARGETS[0], 0.5)
