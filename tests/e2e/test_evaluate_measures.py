"""What `psla-fast evaluate` measures by choice, as a user types it."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from psla_fast.cli import main
from psla_fast.metrics import compute_metrics, compute_thresholds, measure_decisions
from psla_fast.scores import read_scores, write_scores
from psla_fast.shards import open_shards
from tests.tiny import tiny_config, train_tiny


@pytest.fixture(scope="module")
def checkpoint(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measures") / "run"
    train_tiny(tiny_config(packed, folder))
    return folder / "checkpoints/best.pt"


def test_evaluate_prints_intervals_and_decisions_and_writes_a_row_a_class(
    checkpoint: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    val, table = tmp_path / "val.h5", tmp_path / "classes.csv"
    main(["evaluate", str(checkpoint), str(packed / "val"), "--out", str(val)])
    assert len(capsys.readouterr().out.splitlines()) == 3
    words = ["evaluate", str(checkpoint), str(packed / "eval"), "--out", str(tmp_path / "eval.h5")]
    main([*words, "--per-class", str(table), "--bootstrap", "50", "--thresholds", str(val)])
    first, lwlrap, clips, intervals, decisions, written = capsys.readouterr().out.splitlines()
    scored, on_val = read_scores(tmp_path / "eval.h5"), read_scores(val)
    metrics = compute_metrics(scored.scores, scored.targets)
    assert first == str(metrics)
    assert re.fullmatch(r"lwlrap: 0\.\d{6}", lwlrap)
    assert clips.startswith(
        f"16 clips; mean over {metrics.num_classes} classes, {metrics.num_skipped} without"
    )
    figure = r"-?\d\.\d{4} \((-?\d\.\d{4}|-inf) to (-?\d\.\d{4}|inf)\)"
    assert re.search(rf"mAP {figure}, AUC {figure}, d-prime {figure}, lwlrap {figure}$", intervals)
    assert f"mAP {metrics.mean_ap:.4f} (" in intervals
    chosen = compute_thresholds(on_val.scores, on_val.targets)
    expected = measure_decisions(scored.scores, scored.targets, chosen)
    assert f"F1 {expected.macro_f1:.4f} (" in decisions
    assert str(val) in decisions
    assert str(table) in written
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14
    values = [float(row["AP"]) for row in rows if row["AP"]]
    assert np.mean(values) == pytest.approx(metrics.mean_ap, abs=1e-5)
    np.testing.assert_allclose([float(row["threshold"]) for row in rows], chosen, rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bootstrap", "1"], "--bootstrap is 1; give 2 or more"),
        (["--bootstrap", "-3"], "--bootstrap is -3; give 2 or more"),
        (["--per-class", "/no/classes.csv"], "--per-class /no/classes.csv can't be written"),
        (["--thresholds", "/no/val.h5"], "/no/val.h5 not found"),
        (["--per-class", "scores.h5"], "--out and --per-class are both"),
        (["--thresholds", "scores.h5"], "--out and --thresholds are both"),
        (["--per-class", "x/../t.h5", "--thresholds", "t.h5"], "--per-class and --thresholds are both"),
    ],
)
def test_what_can_t_be_measured_is_refused_before_a_clip_is_scored(
    checkpoint: Path,
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "scores.h5"
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(checkpoint), str(packed / "eval"), "--out", str(out), *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("split", "value", "message"),
    [
        ("val", np.nan, "val.h5: the score of clip 3, class 2 is nan; give finite scores"),
        ("eval", 0.5, "val.h5 and {data} share 16 clips"),
    ],
)
def test_thresholds_of_broken_scores_or_of_the_measured_clips_are_refused_before_a_clip_is_scored(
    checkpoint: Path,
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    split: str,
    value: float,
    message: str,
):
    with open_shards(packed / split) as shards:
        keys, mids, targets = shards.keys, shards.classes.mids, shards.targets(np.arange(len(shards)))
    scores = np.random.default_rng(0).random(targets.shape).astype(np.float32)
    scores[3, 2] = value
    write_scores(tmp_path / "val.h5", keys, scores, targets, mids)
    data, out = packed / "eval", tmp_path / "scores.h5"
    with pytest.raises(SystemExit) as stop:
        main(
            ["evaluate", str(checkpoint), str(data), "--out", str(out), "--thresholds", f"{tmp_path}/val.h5"]
        )
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message.format(data=data) in line
    assert not out.exists()
