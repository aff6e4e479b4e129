"""The command ensemble: mixed members, means and weights, its summary, and what it refuses."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import tests.tiny  # noqa: F401 - registers tiny
from psla_fast.cli import main
from psla_fast.evaluate import evaluate_checkpoint, save_evaluation
from psla_fast.metrics import compute_metrics
from psla_fast.scores import read_scores
from psla_fast.shards import open_shards
from tests.bare_splits import draw_scores, draw_targets, make_keys, write_bare_split, write_permuted
from tests.taggers import save_model
from tests.tiny import tiny_config, train_tiny

FIGURES = r"mAP: \d\.\d{6}, AUC: \d\.\d{6}, d-prime: -?\d+\.\d{6}"
HEADER = "---------------Ensemble Result Summary---------------"
SKILLS = (0.2, 0.0, 3.0)


def ensemble(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """The lines that the command prints."""
    capsys.readouterr()
    main(["ensemble", *map(str, words)])
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which the command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["ensemble", *map(str, words)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """Splits val and eval of 40 and 30 clips, and each model's scores of both: SPLIT_N.h5."""
    for number, (split, num_clips) in enumerate((("val", 40), ("eval", 30))):
        targets = draw_targets(num_clips, 5, number)
        write_bare_split(tmp_path / split, targets)
        for seed, skill in enumerate(SKILLS):
            scores = draw_scores(targets, skill, 10 * number + seed)
            write_permuted(tmp_path / f"{split}_{seed}.h5", make_keys(split, num_clips), scores, seed)
    return tmp_path


def files(folder: Path, split: str) -> list[Path]:
    return [folder / f"{split}_{number}.h5" for number in range(len(SKILLS))]


def test_checkpoints_of_other_networks_heads_and_frames_and_score_files_make_one_mean(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = packed / "eval"
    with open_shards(data) as shards:
        classes, keys = shards.classes, shards.keys
    members = [
        save_model(tmp_path / "tiny.pt", classes=classes),
        save_model(tmp_path / "heads0.pt", "efficientnet_lite0", 64, classes, num_heads=0),
        save_model(tmp_path / "heads4.pt", "efficientnet_b0", 96, classes, num_heads=4),
    ]
    expected = [evaluate_checkpoint(path, data, 8, "fp32", "cpu") for path in members]
    save_evaluation(tmp_path / "heads4.h5", expected[2])
    members[2] = tmp_path / "heads4.h5"
    flags = ["--precision", "fp32", "--device", "cpu", "--batch-size", 8, "--out", tmp_path / "mean.h5"]
    lines = ensemble(capsys, *members, "--data", data, *flags)
    assert lines[0] == HEADER
    for number, (path, single) in enumerate(zip(members, expected, strict=True)):
        assert lines[number + 1] == f"Model {number} {path} {single.metrics}"
    mean = np.mean([single.scores for single in expected], axis=0, dtype=np.float64)
    assert lines[4] == f"Ensemble 3 Models {compute_metrics(mean, expected[0].targets)}"
    assert all(re.search(rf"{FIGURES}$", line) for line in lines[1:5])
    assert lines[5] == f"arithmetic mean of {len(keys)} clips' scores is in {tmp_path / 'mean.h5'}"
    np.testing.assert_allclose(read_scores(tmp_path / "mean.h5").ordered(keys, ""), mean, rtol=1e-6)


def test_given_weights_and_a_geometric_mean_are_taken(scored: Path, capsys: pytest.CaptureFixture[str]):
    members, data = files(scored, "eval"), scored / "eval"
    out = ["--out", scored / "mean.h5"]
    ensemble(capsys, *members, "--data", data, "--weights", 1, 0, 3, "--mean", "geometric", *out)
    tables = [read_scores(path).ordered(make_keys("eval", 30), "").astype(np.float64) for path in members]
    wanted = tables[0] ** 0.25 * tables[2] ** 0.75
    np.testing.assert_allclose(read_scores(scored / "mean.h5").scores, wanted, rtol=1e-6)


def test_fitted_weights_are_those_of_validation_and_no_eval_clip_decides(
    scored: Path, capsys: pytest.CaptureFixture[str]
):
    members, data = files(scored, "eval"), scored / "eval"
    fit = ["--fit", scored / "val", "--fit-scores", *files(scored, "val")]
    lines = ensemble(capsys, *members, "--data", data, *fit)
    found = re.fullmatch(
        rf"weights (.*), chosen on the 40 clips of {re.escape(str(scored / 'val'))}: mAP there (\d\.\d+); "
        r"all alike (\d\.\d+), best model (\d\.\d+)",
        lines[0],
    )
    assert found
    weights = found[1].split()
    assert float(weights[2]) == max(map(float, weights))
    assert float(found[2]) >= max(float(found[3]), float(found[4]))
    assert lines[1] == HEADER
    assert lines[1:] == ensemble(capsys, *members, "--data", data, "--weights", *weights)
    with open_shards(data) as shards:  # other eval scores of the first model: the same weights
        noise = np.random.default_rng(9).random((30, 5)).astype(np.float32)
        write_permuted(members[0], shards.keys, noise)
    assert ensemble(capsys, *members, "--data", data, *fit)[0] == lines[0]


def test_fitting_on_what_is_measured_is_refused(scored: Path, capsys: pytest.CaptureFixture[str]):
    members, val = files(scored, "eval"), files(scored, "val")
    shutil.copytree(scored / "eval", scored / "holdout")
    for data, fit, scores, message in (
        ("val", "eval", members, r"--fit \S*eval is an eval split"),
        ("eval", "holdout", members, r"holdout and --data \S*eval share 30 clips, eval0 among them"),
        ("val", "val", val, r"val and --data \S*val share 40 clips"),
    ):
        words = ["--data", scored / data, "--fit", scored / fit, "--fit-scores", *scores]
        assert re.search(message, refused(capsys, *members, *words))


def test_flags_that_do_not_go_together_are_one_line(scored: Path, capsys: pytest.CaptureFixture[str]):
    members, val = files(scored, "eval"), files(scored, "val")
    fit, base = ["--fit", scored / "val"], [*members, "--data", scored / "eval"]
    for words, message in (
        ([*base, "--fit-scores", *val], "--fit-scores are for --fit VAL_SPLIT"),
        ([*base, *fit], "0 --fit-scores for 3 members that are score files"),
        ([*base, *fit, "--fit-scores", *val[:2]], "2 --fit-scores for 3 members"),
        ([*base, *fit, "--fit-scores", *val, "--weights", 1, 1, 1], "Give one of them"),
        ([*base, *fit, "--fit-scores", *val[:2], members[0]], "eval_0.h5: 40 clips missing, 30 unknown"),
        ([*base, "--weights", 1], "1 weights for 3 models"),
        ([*base, "--out", scored], "can't be written"),
        ([*base, "--batch-size", 0], "--batch-size is 0; give 1 or more"),
        ([scored / "no.pt", "--data", scored / "eval"], "no.pt not found"),
        ([val[0], "--data", scored / "eval"], "val_0.h5: 30 clips missing, 40 unknown"),
    ):
        assert message in refused(capsys, *words)


def test_a_folder_of_checkpoints_is_refused_before_a_member_is_measured(
    scored: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        main(["ensemble", str(scored / "eval_0.h5"), str(scored), "--data", str(scored / "eval")])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    (line,) = printed.err.splitlines()
    assert f"{scored} is a folder without model.safetensors and config.json. Pass its files" in line


def test_a_run_s_checkpoint_ensemble_is_a_member_without_its_old_checkpoints(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    train_tiny(tiny_config(packed, run, "--keep-epochs", "False"))
    assert not list((run / "checkpoints").glob("epoch_*"))
    member = run / "scores/eval.h5"
    lines = ensemble(capsys, member, "--data", packed / "eval")
    result = np.loadtxt(run / "ensemble_result.csv")
    assert f"mAP: {result[2]:.6f}, AUC: {result[3]:.6f}" in lines[1]
    assert lines[2].removeprefix("Ensemble 1 Models ") == lines[1].removeprefix(f"Model 0 {member} ")
