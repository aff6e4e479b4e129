"""The table of classes that `psla-fast evaluate --per-class` writes."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from psla_fast.classes import Classes
from psla_fast.commands.measures import Measures, print_measures, write_per_class
from psla_fast.evaluate import Evaluation
from psla_fast.metrics import (
    average_precision,
    bootstrap_metrics,
    compute_lwlrap,
    compute_metrics,
    roc_auc,
)

CLASSES = Classes(("/m/a", "/m/b", "/m/c"), ("Bark", "Rain, heavy", "Never"))
Array = npt.NDArray[Any]


@pytest.fixture
def split() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    targets = rng.random((60, 3)) < [0.3, 0.1, 0.0]
    return (rng.standard_normal((60, 3)) + 2 * targets).astype(np.float32), targets


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_a_class_has_its_figures(tmp_path: Path, split: tuple[Array, Array]):
    scores, targets = split
    write_per_class(tmp_path / "classes.csv", CLASSES, scores, targets, np.array([0.5, 1.0, 0.0]))
    bark, rain, _ = read(tmp_path / "classes.csv")
    assert (rain["index"], rain["mid"], rain["display_name"]) == ("1", "/m/b", "Rain, heavy")
    assert int(bark["num_positive"]) == targets[:, 0].sum()
    assert float(bark["AP"]) == pytest.approx(average_precision(scores, targets)[0], rel=1e-5)
    assert float(rain["AUC"]) == pytest.approx(roc_auc(scores, targets)[1], rel=1e-5)
    assert float(rain["lwlrap"]) == pytest.approx(compute_lwlrap(scores, targets).class_lwlrap[1], rel=1e-5)
    found = scores[:, 0] > 0.5
    assert float(bark["precision"]) == pytest.approx((found & targets[:, 0]).sum() / found.sum(), rel=1e-5)
    assert float(bark["threshold"]) == 0.5
    assert "AP_low" not in bark


def test_what_can_t_be_told_of_a_class_stays_empty(tmp_path: Path, split: tuple[Array, Array]):
    write_per_class(tmp_path / "classes.csv", CLASSES, *split, intervals=bootstrap_metrics(*split, 20))
    never = read(tmp_path / "classes.csv")[2]
    assert never.pop("display_name") == "Never"
    assert {name for name, value in never.items() if value} == {"index", "mid", "num_positive"}
    assert never["num_positive"] == "0"


def test_thresholds_of_these_very_clips_are_named_best(tmp_path: Path, split: tuple[Array, Array]):
    intervals = bootstrap_metrics(*split, 50)
    write_per_class(tmp_path / "classes.csv", CLASSES, *split, intervals=intervals)
    bark = read(tmp_path / "classes.csv")[0]
    assert {"best_threshold", "best_precision", "best_recall", "best_F1", "AP_low", "AP_high"} <= bark.keys()
    write_per_class(tmp_path / "half.csv", CLASSES, *split, np.full(3, 0.5))
    assert float(bark["best_F1"]) >= float(read(tmp_path / "half.csv")[0]["F1"])
    assert float(bark["AP_low"]) == pytest.approx(intervals.class_ap[0, 0], rel=1e-5)


def test_resamples_that_tell_no_class_are_printed_with_their_number(capsys: pytest.CaptureFixture[str]):
    targets = np.zeros((4, 3), np.float32)
    targets[0] = 1  # a third of the resamples lack that clip
    scores = np.random.default_rng(0).random((4, 3)).astype(np.float32)
    num_untold = bootstrap_metrics(scores, targets, 50).num_untold
    assert num_untold > 0
    result = Evaluation(list("abcd"), CLASSES.mids, scores, targets, compute_metrics(scores, targets))
    print_measures(Measures(CLASSES, None, 50, None, None), result)
    assert f"50 resamples of the clips, but {num_untold} that tell no class; they" in capsys.readouterr().out
