from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from psla_fast.classes import Classes
from psla_fast.scores import write_scores
from psla_fast.tagger import compute_thresholds
from psla_fast.tagger.thresholds import resolve_thresholds

Array = npt.NDArray[np.float32]
CLASSES = Classes(("/m/a", "/m/b"), ("A", "B"))


def f1(scores: Array, targets: Array, threshold: float) -> float:
    found, true = scores > threshold, targets > 0
    return 2 * float((found & true).sum()) / float(found.sum() + true.sum())


def column(*values: float) -> Array:
    return np.array(values, np.float32)[:, None]


@pytest.mark.parametrize("levels", [5, 10**6])
def test_no_other_threshold_has_a_better_f1(levels: int):
    rng = np.random.default_rng(0)
    scores = (rng.integers(0, levels, (60, 8)) / levels).astype(np.float32)  # 5: ties; and zeros
    targets = (rng.random((60, 8)) < 0.2 + 0.5 * scores).astype(np.float32)
    thresholds = compute_thresholds(scores, targets)
    for index, threshold in enumerate(thresholds):
        mine = f1(scores[:, index], targets[:, index], threshold)
        tried = [-1.0, *scores[:, index].tolist()]
        assert mine == pytest.approx(max(f1(scores[:, index], targets[:, index], t) for t in tried))


def test_a_threshold_lies_half_way_between_the_scores_that_it_parts():
    found = compute_thresholds(column(0.9, 0.7, 0.3, 0.1), column(1, 1, 0, 0))
    assert found.tolist() == pytest.approx([0.5])


def test_neighbouring_floats_are_parted():
    low = np.float32(0.5)
    high = np.nextafter(low, np.float32(1))
    (threshold,) = compute_thresholds(column(high, low), column(1, 0))
    assert low <= threshold < high


def test_a_class_without_positives_gets_the_median_of_the_others():
    scores = np.array([[0.9, 0.8, 0.6, 0.9], [0.1, 0.2, 0.2, 0.9]], np.float32)
    targets = np.array([[1, 1, 1, 0], [0, 0, 0, 0]], np.uint8)
    assert compute_thresholds(scores, targets).tolist() == pytest.approx([0.5, 0.5, 0.4, 0.5])


def test_what_tells_no_threshold_is_refused():
    with pytest.raises(ValueError, match="no class has a positive clip"):
        compute_thresholds(column(0.5), column(0))
    with pytest.raises(ValueError, match=r"scores \(2, 1\) and targets \(1, 1\) must both be"):
        compute_thresholds(column(0.5, 0.6), column(0))
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match=f"the score of clip 1, class 0 is {value}; give finite"):
            compute_thresholds(column(0.5, value), column(1, 0))
    with pytest.raises(ValueError, match="the score of clip 0, class 0 is inf; give finite"):
        compute_thresholds(np.array([[1e300]]), column(1))
    with pytest.raises(ValueError, match="the target of clip 1, class 0 is 0.25; metrics need hard labels"):
        compute_thresholds(column(0.5, 0.6), column(1, 0.25))
    with pytest.raises(ValueError, match=r"thresholds are \(3,\); give 2 numbers"):
        resolve_thresholds(np.zeros(3), CLASSES)
    with pytest.raises(ValueError, match="give 2 numbers"):
        resolve_thresholds(np.array([0.5, np.nan]), CLASSES)


def test_thresholds_come_from_a_score_file_of_the_same_classes(tmp_path: Path):
    scores = np.array([[0.9, 0.1], [0.5, 0.7]], np.float32)
    targets = np.array([[1, 0], [0, 1]], np.uint8)
    write_scores(tmp_path / "val.h5", ["a", "b"], scores, targets, CLASSES.mids)
    assert np.allclose(resolve_thresholds(tmp_path / "val.h5", CLASSES), [0.7, 0.4])
    others = Classes(("/m/b", "/m/a"), ("B", "A"))
    with pytest.raises(ValueError, match="scores of other classes, or in another order"):
        resolve_thresholds(str(tmp_path / "val.h5"), others)


def test_a_score_file_without_targets_says_so(tmp_path: Path):
    write_scores(tmp_path / "x.h5", ["a"], np.ones((1, 2)), np.empty((0, 2)), CLASSES.mids)
    with pytest.raises(ValueError, match=r"x.h5 has no targets. Let psla-fast evaluate write it"):
        resolve_thresholds(tmp_path / "x.h5", CLASSES)
    with pytest.raises(ValueError, match="not found"):
        resolve_thresholds(tmp_path / "y.h5", CLASSES)
