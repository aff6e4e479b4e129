"""The second round: a run's model scores its training split, labels are enhanced, training takes them."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from psla_fast.cli import main
from psla_fast.scores import write_scores
from psla_fast.shards import open_shards
from tests.tiny import step_rows, tiny_config, train_tiny

ONE_EPOCH = ["--optim.epochs", "1", "--wa.start", "1", "--wa.end", "1"]


@pytest.fixture(scope="module")
def run(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("round1") / "run"
    train_tiny(tiny_config(packed, folder, *ONE_EPOCH))
    return folder


@pytest.fixture(scope="module")
def ontology(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first class is the parent of all the others."""
    with open_shards(packed / "train") as shards:
        mids = shards.classes.mids
    nodes = [{"id": mid, "child_ids": [], "restrictions": []} for mid in mids[1:]]
    nodes.append({"id": mids[0], "child_ids": list(mids[1:]), "restrictions": []})
    path = tmp_path_factory.mktemp("graph") / "ontology.json"
    path.write_text(json.dumps(nodes))
    return path


def fail(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["enhance", *words])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    return said


def test_a_run_is_enhanced_and_the_next_round_trains_on_its_table(
    run: Path, packed: Path, ontology: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["enhance", "--run", str(run), "--ontology", str(ontology), "--threshold", "all"]
    main(words)
    said = capsys.readouterr().out
    assert "scored 64 clips of" in said
    assert said.count(" -> ") > 0
    with h5py.File(run / "enhance/train_scores.h5") as file:
        assert file["scores"].shape[0] == 64
    for threshold in ("mean", "median", "25", "10", "5"):
        for suffix in (".csv", ".json", "_weight.csv"):
            assert (run / f"enhance/train_type1_2_{threshold}{suffix}").is_file()
    main([*words, "--type", "2"])
    assert "has the scores of" in capsys.readouterr().out
    rows = []
    for name in ("train_type1_2_5.csv", "train_type1_2_5.json", ""):
        second = tmp_path / f"run{len(rows)}"
        flags = ["--data.labels", str(run / "enhance" / name)] if name else []
        train_tiny(tiny_config(packed, second, *ONE_EPOCH, *flags))
        rows.append(step_rows(second))
    assert rows[0] == rows[1] != rows[2]


def test_scores_of_evaluate_give_what_the_run_gives(run: Path, packed: Path, ontology: Path, tmp_path: Path):
    wa, scores = run / "checkpoints/wa.pt", tmp_path / "scores.h5"
    main(["evaluate", str(wa), str(packed), "--split", "train", "--out", str(scores)])
    common = ["--ontology", str(ontology), "--type", "1"]
    main(["enhance", "--run", str(run), "--out", str(tmp_path / "a"), *common])
    packed_train = ["--shards", str(packed / "train"), "--out", str(tmp_path / "b")]
    main(["enhance", "--scores", str(scores), *packed_train, *common])
    names = [f"train_type1_mean{suffix}" for suffix in (".csv", ".json", "_weight.csv")]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with open_shards(packed / "train") as shards:
        table = (tmp_path / "b" / names[0]).read_text().splitlines()
        assert [line.split(",")[0] for line in table[1:]] == shards.keys
        for row, line in enumerate(table[1:]):
            mids = {shards.classes.mids[label] for label in shards.labels(row)}
            assert mids <= set(line.partition(",")[2].strip('"').split(","))


def test_scores_of_other_clips_or_classes_and_half_commands_are_refused(
    run: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with open_shards(packed / "train") as shards:
        keys, num_classes = shards.keys, len(shards.classes)
    out = ["--shards", str(packed / "train"), "--out", str(tmp_path / "out")]
    files = {"less": keys[1:], "more": [*keys, "other"], "others": [*keys[1:], "other"]}
    for name, listed in files.items():
        zeros = np.zeros((len(listed), num_classes), np.float32)
        write_scores(tmp_path / f"{name}.h5", listed, zeros, zeros)
    narrow = np.zeros((len(keys), 2), np.float32)
    write_scores(tmp_path / "narrow.h5", keys, narrow, narrow)
    holed = np.zeros((len(keys), num_classes), np.float32)
    holed[3, 1] = np.nan
    write_scores(tmp_path / "holed.h5", keys, holed, np.zeros_like(holed))
    for name, reason in {
        "holed": f"a score of {keys[3]} isn't finite",
        "less": "1 clips of",
        "more": "1 scores are of other clips; other is no clip of it",
        "others": "1 clips of",
        "narrow": f"has scores of 2 classes, not {num_classes}",
        "absent": "not found",
    }.items():
        assert reason in fail(["--scores", str(tmp_path / f"{name}.h5"), *out], capsys), name
    assert not (tmp_path / "out").exists()
    assert "Leave the others out" in fail(["--run", str(run), *out], capsys)
    assert "give --run RUN" in fail(out, capsys)
    assert "is no run" in fail(["--run", str(tmp_path)], capsys)
    assert "choose another --checkpoint" in fail(["--run", str(run), "--checkpoint", "no.pt"], capsys)
    datafile = ["--datafile", "a.json", "--scores", str(tmp_path / "less.h5"), "--out", str(tmp_path / "out")]
    assert "--classes is missing" in fail(datafile, capsys)
    assert "--classes is for --datafile" in fail(["--classes", "fsd50k", "--scores", "x.h5", *out], capsys)


def test_scores_of_another_checkpoint_or_run_are_not_taken_for_these(
    run: Path, packed: Path, ontology: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train_tiny(tiny_config(packed, tmp_path / "other", *ONE_EPOCH, "--seed", "9"))
    common = ["--ontology", str(ontology), "--out", str(tmp_path / "out")]
    tables = []
    for words in (["--run", str(run)], ["--run", str(tmp_path / "other")], ["--run", str(run)]):
        main(["enhance", *words, *common])
        assert "scored 64 clips" in capsys.readouterr().out
        tables.append((tmp_path / "out/train_type1_2_mean.csv").read_bytes())
    assert tables[0] == tables[2] != tables[1]
    main(["enhance", "--run", str(run), "--checkpoint", "last.pt", *common])
    assert "with " + str(run / "checkpoints/last.pt") in capsys.readouterr().out
