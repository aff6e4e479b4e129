"""The whole recipe by one command, on synthetic clips."""

import json
from pathlib import Path

import pytest

from psla_fast.cli import main
from psla_fast.demo import write_synthetic_fsd50k
from tests.e2e.test_commands import SMALL


def test_one_command_goes_the_whole_way_and_nothing_is_done_twice(
    packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    write_synthetic_fsd50k(tmp_path / "audio", num_clips=60, seed=0)  # for its ontology
    out = tmp_path / "out"
    words = ["recipe", str(packed), str(out), "--recipe", "demo", "--seeds", "3", "4"]
    words += ["--ontology", str(tmp_path / "audio/ontology.json"), "--", *SMALL, "--optim.epochs", "1"]
    main(words)
    said = capfd.readouterr().out
    runs = ["round1_seed3", "round2_seed3", "round2_seed4"]
    assert sorted(path.name for path in out.iterdir()) == ["report.html", *runs]
    assert "labels added to" in said
    assert "Ensemble 2 Models mAP" in said
    assert "weights averaged" in said.partition("round 1")[2]
    labels = {
        run: (out / run / "config.toml").read_text().partition("labels = ")[2].split("\n")[0] for run in runs
    }
    assert labels["round1_seed3"] == '""'
    assert labels["round2_seed4"] == json.dumps(str(out / "round1_seed3/enhance/train_type1_2_mean.csv"))
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/checkpoints/last.pt")}
    main(words)
    assert "has the scores of" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_step_that_fails_ends_the_recipe_with_its_line(
    packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    for words, reason in (
        ([str(packed), str(tmp_path / "o"), "--seeds", "1", "1"], "give different seeds"),
        ([str(tmp_path), str(tmp_path / "o")], "has no split train"),
        ([str(packed), str(tmp_path / "o"), "--recipe", "dmeo"], "Did you mean 'demo'"),
        ([str(packed), str(tmp_path / "o"), "--threshold", "meen"], "threshold"),
        ([str(packed), str(tmp_path / "o"), "--ontology", "no.json"], "no.json not found"),
        (
            [str(packed), str(tmp_path / "o"), "--", "--data.labels=a.csv"],
            "--data.labels is set by the recipe",
        ),
        ([str(packed), str(tmp_path / "o"), "--", "--optim.epoch", "3"], "unknown flag --optim.epoch"),
        ([str(packed), str(tmp_path / "o"), "--recipe", "audioset_balanced"], "has no split balanced"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["recipe", *words])
        assert stop.value.code == 2
        assert reason in capfd.readouterr().err
