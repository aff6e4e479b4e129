import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from psla_fast.metrics import average_precision
from psla_fast.report import ReportOptions, build_report
from psla_fast.report.log import MOST_POINTS, describe_event, read_log, step_curves
from psla_fast.report.runs import name_runs, read_runs
from psla_fast.report.scored import read_scored, score_missing
from psla_fast.report.views import epoch_curves
from psla_fast.scores import read_scores, write_scores
from tests.reports import make_classes, write_run
from tests.tiny import tiny_config, train_tiny

DEEP = b"[" * 100_000  # deeper than Python's parsers go


def test_a_runs_results_are_those_of_its_files(tmp_path: Path):
    (run,) = read_runs([write_run(tmp_path / "a")])
    assert run.name == "a"
    assert run.is_finished
    assert run.classes == make_classes(5)
    assert run.table.shape == (3, 10)
    assert run.best_epoch == int(np.argmax(np.loadtxt(tmp_path / "a/result.csv", delimiter=",")[:, 0])) + 1
    assert run.results["wa"] == np.loadtxt(tmp_path / "a/wa_result.csv").tolist()
    assert set(run.results) == {"best", "wa", "ensemble"}


def test_scores_by_class_have_the_mean_that_the_trainer_wrote(shards: Path, tmp_path: Path):
    train_tiny(tiny_config(shards, tmp_path / "run"))
    (run,) = read_runs([tmp_path / "run"])
    for role, start in (("val", 0), ("eval", 2)):
        scored, notes = read_scored(run, role)
        assert scored is not None
        assert notes == []
        by_kind = scored.average_precisions()
        assert set(by_kind) == {"best", "ensemble"}
        for kind, values in by_kind.items():
            assert np.nanmean(values) == pytest.approx(run.results[kind][start], abs=1e-7)
        assert epoch_curves(run, role)["map"][run.best_epoch - 1] == pytest.approx(
            run.results["best"][start], abs=1e-5
        )
    split = str(shards / "eval")
    assert score_missing(run, "eval", split) == [str(tmp_path / "run/scores/eval_wa.h5")]
    assert score_missing(run, "eval", split) == []
    scored, _ = read_scored(run, "eval")
    assert scored is not None
    assert np.nanmean(scored.average_precisions()["wa"]) == pytest.approx(run.results["wa"][2], abs=1e-6)


def test_scores_that_are_older_than_their_checkpoint_are_left_out(tmp_path: Path):
    path = write_run(tmp_path / "a")
    (run,) = read_runs([path])
    own = read_scores(path / "scores/eval.h5")
    beside = path / "scores/eval_wa.h5"
    write_scores(beside, own.keys[::-1], own.scores[::-1], own.targets[::-1])
    (path / "checkpoints/wa.pt").write_bytes((path / "checkpoints/best.pt").read_bytes())
    os.utime(beside, (2e9, 2e9))
    scored, notes = read_scored(run, "eval")
    assert scored is not None
    assert notes == []
    assert (scored.scores["wa"] == own.scores).all()  # by key, whatever the file's order
    os.utime(beside, (1e9, 1e9))
    scored, notes = read_scored(run, "eval")
    assert scored is not None
    assert "wa" not in scored.scores
    assert notes == ["a: eval_wa.h5 is older than wa.pt: left out; see --score"]


def test_a_score_file_without_epochs_gives_the_ensemble_alone(tmp_path: Path):
    path = write_run(tmp_path / "a")
    with h5py.File(path / "scores/eval.h5", "a") as file:
        del file["epochs"]
    scored, _ = read_scored(read_runs([path])[0], "eval")
    assert scored is not None
    assert list(scored.scores) == ["ensemble"]
    wanted = average_precision(scored.scores["ensemble"], scored.targets)
    assert np.array_equal(scored.average_precisions()["ensemble"], wanted, equal_nan=True)


def test_without_the_runs_own_score_file_those_beside_it_are_shown(tmp_path: Path):
    path = write_run(tmp_path / "a")
    (run,) = read_runs([path])
    own = read_scores(path / "scores/eval.h5")
    (path / "scores/eval.h5").unlink()
    assert read_scored(run, "eval") == (None, ["a: scores/eval.h5 is gone: no figures by class"])
    write_scores(path / "scores/eval_best.h5", own.keys[::-1], own.scores[::-1], own.targets[::-1])
    write_scores(path / "scores/eval_wa.h5", own.keys, own.scores / 2, own.targets)
    scored, notes = read_scored(run, "eval")
    assert scored is not None
    assert notes == ["a: scores/eval.h5 is gone: no figures of the ensemble by class"]
    assert scored.keys == own.keys[::-1]
    assert (scored.targets == own.targets[::-1]).all()
    assert (scored.scores["best"] == own.scores[::-1]).all()
    assert (scored.scores["wa"] == own.scores[::-1] / 2).all()
    assert scored.main == "best"
    write_scores(path / "scores/eval_wa.h5", own.keys, own.scores[:, :4], own.targets[:, :4])
    with pytest.raises(ValueError, match=r"eval_wa.h5 has scores of 4 classes, not those of .*eval_best.h5"):
        read_scored(run, "eval")


def test_a_config_without_epochs_is_not_taken_for_a_finished_run(tmp_path: Path):
    path = write_run(tmp_path / "a")
    (path / "config.toml").write_text("seed = 0\n")
    (run,) = read_runs([path])
    assert not run.is_finished
    notes = build_report([path], ReportOptions())["notes"]
    assert "a: config.toml has no optim.epochs: whether it is finished isn't known" in notes


def test_runs_have_the_shortest_names_that_tell_them_apart():
    paths = [Path("/x/a/run"), Path("/x/b/run"), Path("/x/other")]
    assert name_runs(paths) == ["a/run", "b/run", "other"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.toml", None, "is no run: it has no config.toml. Pass a folder that psla_fast.train wrote."),
        ("config.toml", b"= 3", "is not TOML"),
        ("result.csv", b"1,2,3\n", "hasn't 10 columns"),
        ("result.csv", b"a,b\n", "row 1: could not convert"),
        ("wa_result.csv", b"1\n2\n3\n", "has 3 numbers, not 2 or 4"),
        ("metrics.jsonl", b'{"epoch": 1}\nnonsense\n', "line 2 is not JSON"),
        ("metrics.jsonl", b'{"epoch": 0}\n', "line 1 has no epoch that counts from 1"),
        ("metrics.jsonl", b'{"epoch": 1, "step": 1, "loss": "<b>"}\n', "line 1: loss is '<b>'"),
        ("metrics.jsonl", b'{"epoch": 1, "not_finite": 3, "clips": 5}\n', "line 1: clips is 5"),
        ("metrics.jsonl", b'{"epoch": ' + DEEP + b"\n", "line 1 is not JSON"),
        ("environment.json", b"{", "is not JSON"),
        ("environment.json", DEEP, "is not JSON"),
        ("environment.json", b"[]", "holds no object"),
        ("environment.json", b'{"hardware": "x"}', "hardware is no object"),
        ("environment.json", b'{"versions": [1]}', "versions is no object"),
        ("config.toml", b"", "has no settings"),
        ("config.toml", b"a = " + DEEP, "is not TOML"),
        ("config.toml", b"stream.buckets = 3", "stream.buckets is 3; it should be a list"),
        ("config.toml", b"stream.buckets = ['a']", "stream.buckets is ['a']; it should be a list"),
        ("config.toml", b"optim.epochs = 'x'", "optim.epochs is 'x'; it should be a whole number"),
        ("config.toml", b"input.clip_frames = [1]", "input.clip_frames is [1]; it should be a whole number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, file: str, content: bytes | None, message: str):
    path = write_run(tmp_path / "a", epochs=1)
    (path / file).unlink(missing_ok=True)
    if content is not None:
        (path / file).write_bytes(content)
    with pytest.raises(ValueError, match="a") as caught:
        read_runs([path])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_runs_names_them(tmp_path: Path):
    write_run(tmp_path / "one", epochs=1)
    with pytest.raises(ValueError, match="Pass the runs in it: one$"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="There is no such folder"):
        read_runs([tmp_path / "two"])
    with pytest.raises(ValueError, match="is given twice"):
        read_runs([tmp_path / "one", tmp_path / "two/../one"])
    with pytest.raises(ValueError, match="no run is given"):
        read_runs([])


def test_runs_of_other_classes_are_refused(tmp_path: Path):
    paths = [write_run(tmp_path / str(n), classes=make_classes(n), epochs=1) for n in (5, 6)]
    with pytest.raises(ValueError, match=r"has other classes \(6\) than .* \(5\)"):
        read_runs(paths)


def test_a_damaged_checkpoint_gives_way_to_another(tmp_path: Path):
    path = write_run(tmp_path / "a", epochs=1)
    (path / "checkpoints/best.pt").rename(path / "checkpoints/epoch_01.pt")
    (path / "checkpoints/best.pt").write_bytes(b"cut")
    assert read_runs([path])[0].classes == make_classes(5)


def test_the_log_of_a_running_run_is_read_to_its_last_whole_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"epoch": 1, "step": step, "loss": loss} for step, loss in ((1, 0.5), (2, None), (2, 0.25))]
    rows += [{"epoch": 1, "train_loss": 0.4}, {"epoch": 2, "step": 1, "loss": 0.125}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"epoch": 2, "st')
    log = read_log(path)
    assert [row["loss"] for row in log.steps] == [0.5, 0.25, 0.125]
    assert list(log.epochs) == [1]
    assert step_curves(log) == {"x": [0.5, 1.0, 1.5], "loss": [0.5, 0.25, 0.125]}


def test_curves_of_many_steps_are_thinned_to_means(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"epoch": 1, "step": step, "loss": step} for step in range(1, 5 * MOST_POINTS + 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = step_curves(read_log(path))
    assert len(curves["x"]) == len(curves["loss"]) == MOST_POINTS
    assert curves["loss"][:2] == [3.0, 8.0]


def test_events_are_said_in_words():
    assert describe_event({"epoch": 2, "skipped": 3}).startswith("epoch 2: 3 clips couldn't be read")
    row = {"epoch": 1, "first_step": 4, "not_finite": 2, "clips": ["a", "b", "c", "d"]}
    assert describe_event(row) == "epoch 1, step 4: 2 losses weren't finite (a, b, c …)"
    assert describe_event({"epoch": 3, "other": 1}) == "epoch 3: other 1"
