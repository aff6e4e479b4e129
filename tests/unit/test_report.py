import json
import re
import shutil
import tracemalloc
from pathlib import Path

import h5py
import pytest

from psla_fast.cli import main
from psla_fast.report import ReportOptions, build_report, render_page
from psla_fast.report.render import embed_json
from tests.reports import HOSTILE, make_classes, read_data, write_run
from tests.tiny import tiny_config, train_tiny


def page_of(*paths: Path, **options: object) -> str:
    return render_page(build_report(paths, ReportOptions(**options)))  # type: ignore[arg-type]


def test_a_trained_run_gives_a_whole_page_and_the_same_bytes_again(shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    train_tiny(tiny_config(shards, run))
    page = page_of(run)
    assert page == page_of(run)
    data = read_data(page)
    assert [one["name"] for one in data["classes"]] == [f"Class {n}" for n in range(5)]
    assert set(data["positives"]) == {"train", "val", "eval"}
    assert set(data["runs"][0]["ap"]) == {"best", "ensemble"}
    assert len(data["examples"]) == 11  # all that eval has
    assert all(example["picture"].startswith("data:image/png;base64,") for example in data["examples"])
    assert len(data["runs"][0]["epochs"]["map"]) == 3
    assert "finished" in page


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path: Path):
    page = page_of(write_run(tmp_path / "a"))
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'<]*", page.split('id="data">')[0]))
    addresses |= set(re.findall(r"https?://[^\s\"'<]*", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(
        r"<link|@import|url\(|<script src|innerHTML|insertAdjacentHTML|document\.write", page
    )
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_hostile_names_are_text(tmp_path: Path):
    run = write_run(tmp_path / "<img src=x onerror=alert(1)>", classes=HOSTILE)
    page = page_of(run, title="</title><script>alert(2)</script>")
    assert read_data(page)["classes"][2]["name"] == HOSTILE.names[2]
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img src" not in page
    assert "alert(2)</script>" not in page


def test_embedded_json_holds_no_character_that_ends_it():
    text = "</script><!--\u2028\u2029&"
    written = embed_json({"a": text})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {"a": text}


def test_a_run_without_eval_shows_val(tmp_path: Path):
    run = write_run(tmp_path / "a", splits=("val",))
    data = read_data(page_of(run))
    assert data["role"] == "val"
    assert data["runs"][0]["results"]["wa"][0] > 0
    with pytest.raises(ValueError, match="has no results of it. Use --split val"):
        page_of(run, split="eval")
    both = write_run(tmp_path / "b")
    assert read_data(page_of(both))["role"] == "eval"
    assert read_data(page_of(both, split="val"))["role"] == "val"
    assert read_data(page_of(run, both))["role"] == "val"  # what every run has


@pytest.mark.parametrize("epochs", [0, 1])
def test_an_unfinished_run_is_shown_as_far_as_it_is(tmp_path: Path, epochs: int):
    run = write_run(tmp_path / "a", epochs=epochs)
    with open(run / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"epoch": epochs + 1, "step": 1, "loss": 0.5, "lr": 0.01}) + '\n{"epo')
    page = page_of(run)
    data = read_data(page)
    assert f"a: unfinished, {epochs} of 3 epochs done" in page
    assert data["runs"][0]["steps"]["loss"][-1] == 0.5
    assert len(data["runs"][0]["epochs"]["map"]) == epochs
    assert ("No epoch is finished yet" in page) == (epochs == 0)


def test_a_run_with_nothing_but_its_settings_gives_a_page(tmp_path: Path):
    run = write_run(tmp_path / "a", epochs=0)
    (run / "metrics.jsonl").unlink(missing_ok=True)
    data = read_data(page_of(run))
    assert data["classes"] == []
    assert data["examples"] == []


def test_what_is_gone_is_said(tmp_path: Path):
    run = write_run(tmp_path / "a")
    page = page_of(run)
    assert "gone isn&#39;t there: no training counts, no pictures of clips" in page
    data = read_data(page)
    assert set(data["positives"]) == {"eval"}
    assert "picture" not in data["examples"][0]
    (run / "scores/eval.h5").unlink()
    page = page_of(run)
    assert "a: scores/eval.h5 is gone: no figures by class" in page
    assert read_data(page)["runs"][0]["ap"] == {}


def test_shards_of_other_classes_are_a_note_or_refused_where_they_were_given(shards: Path, tmp_path: Path):
    run = write_run(tmp_path / "a", classes=make_classes(7), shards=shards)
    page = page_of(run)
    assert "has 5 classes, not the runs&#39; 7" in page
    assert not any("picture" in example for example in read_data(page)["examples"])
    with pytest.raises(ValueError, match="has 5 classes, not the runs' 7"):
        page_of(run, shards=str(shards))
    with pytest.raises(ValueError, match="no such folder"):
        page_of(run, shards=str(tmp_path / "nothing"))


def test_training_counts_are_left_out_where_the_label_table_is_gone(shards: Path, tmp_path: Path):
    run = write_run(tmp_path / "a", "--data.labels", str(tmp_path / "gone.csv"), shards=shards)
    page = page_of(run)
    assert "gone.csv not found" in page
    assert set(read_data(page)["positives"]) == {"val", "eval"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="index.h5 not found"):
        page_of(run, shards=str(tmp_path / "empty"))


def test_runs_scored_on_other_clips_are_named(tmp_path: Path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", clips=20)
    page = page_of(a, b)
    assert "b was scored on other clips than a" in page
    examples = read_data(page)["examples"]
    known = [example["runs"][1] is not None for example in examples]
    assert known == [int(example["key"][4:]) < 20 for example in examples]


def test_a_run_without_scores_may_come_first(tmp_path: Path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (a / "scores/eval.h5").unlink()
    data = read_data(page_of(a, b))
    assert [bool(run["ap"]) for run in data["runs"]] == [False, True]
    assert data["examples"]
    assert all(one["runs"][0] is None and one["runs"][1]["scores"] for one in data["examples"])


def test_the_scores_of_one_run_are_held_at_a_time(tmp_path: Path):
    size = 4000 * 30 * 4
    runs = [write_run(tmp_path / "r0", classes=make_classes(30), clips=4000, epochs=1)]
    runs += [shutil.copytree(runs[0], tmp_path / f"r{n}") for n in range(1, 5)]
    peaks = []
    for paths in (runs[:1], runs):
        tracemalloc.start()
        page_of(*paths)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 3 * size  # of four more runs, with two scores each


def test_what_happened_in_a_run_is_told(tmp_path: Path):
    run = write_run(tmp_path / "a")
    with open(run / "metrics.jsonl", "a") as log:
        log.write(
            '{"epoch": 2, "skipped": 3}\n{"epoch": 3, "first_step": 1, "not_finite": 1, "clips": ["<b>"]}\n'
        )
    page = page_of(run)
    assert "epoch 2: 3 clips couldn&#39;t be read; other draws stood in" in page
    assert "epoch 3, step 1: 1 losses weren&#39;t finite (&lt;b&gt;)" in page
    assert "What happened" not in page_of(write_run(tmp_path / "b"))


def test_a_damaged_score_file_is_one_line(tmp_path: Path):
    run = write_run(tmp_path / "a")
    with h5py.File(run / "scores/eval.h5", "a") as file:
        del file["targets"]
    with pytest.raises(ValueError, match=r"has no targets. Restore the file"):
        page_of(run)
    (run / "scores/eval.h5").write_bytes(b"cut")
    with pytest.raises(ValueError, match="is not a score file"):
        page_of(run)


def test_every_class_of_audioset_and_three_runs_fit_in_five_megabytes(tmp_path: Path):
    classes = make_classes(527)
    runs = [write_run(tmp_path / f"r{n}", "--seed", str(n), classes=classes, clips=600) for n in range(3)]
    page = page_of(*runs)
    assert len(read_data(page)["runs"][2]["ap"]["ensemble"]) == 527
    assert len(page.encode()) < 2_000_000


def test_the_command_writes_the_page_and_says_so(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train_tiny(tiny_config(shards, tmp_path / "run"))
    capsys.readouterr()
    out = tmp_path / "page.html"
    main(["report", str(tmp_path / "run"), "--out", str(out), "--examples", "4", "--score"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"scored {tmp_path}/run/scores/eval_wa.h5"
    assert re.fullmatch(rf"{re.escape(str(out))}: 1 run on eval, 5 classes, 4 examples, 0\.\d MB", said[1])
    assert set(read_data(out.read_text())["runs"][0]["ap"]) == {"best", "wa", "ensemble"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]
    (tmp_path / "run/scores/eval.h5").unlink()
    for scored in ([f"scored {tmp_path}/run/scores/eval_best.h5"], []):  # the second time all is there
        main(["report", str(tmp_path / "run"), "--out", str(out), "--score"])
        said = capsys.readouterr().out.splitlines()
        assert said[:-1] == [
            *scored,
            "note: run: scores/eval.h5 is gone: no figures of the ensemble by class",
        ]
        assert set(read_data(out.read_text())["runs"][0]["ap"]) == {"best", "wa"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run is given"),
        (["RUN", "--examples", "61"], "--examples is 61; give 0 to 60."),
        (["RUN", "--split", "test"], "invalid choice 'test'"),
        (["RUN", "--out", "nowhere/page.html"], "give a file in a folder that is there"),
        (["RUN", "--score"], "the shards of .* aren't there. Pass them by --shards"),
    ],
)
def test_bad_flags_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
):
    run = str(write_run(tmp_path / "a", epochs=1))
    with pytest.raises(SystemExit) as stopped:
        main(["report", *(run if word == "RUN" else word for word in words)])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])
