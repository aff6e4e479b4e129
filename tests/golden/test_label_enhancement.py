"""Label enhancement gives what PSLA's code gives, for each threshold and type, through the command."""

import json
from pathlib import Path

import numpy as np
import pytest

from psla_fast.cli import main
from psla_fast.scores import write_scores

FOLDER = Path(__file__).parent / "label_enhancement_fsd50k"
NAMES = {"1": "type1", "2": "type2", "both": "type1_2"}


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored scores as a score file, in another order than the labels'."""
    path = tmp_path_factory.mktemp("scores") / "train_scores.h5"
    rows = json.loads((FOLDER / "datafile.json").read_text())["data"]
    keys, stored = [Path(row["wav"]).stem for row in rows], np.load(FOLDER / "scores.npy")
    order = np.random.default_rng(0).permutation(len(keys))
    write_scores(path, [keys[row] for row in order], stored[order], np.zeros_like(stored))
    return path


@pytest.mark.parametrize("kind", ["1", "2", "both"])
def test_every_threshold_gives_pslas_labels_exactly(
    kind: str, scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["enhance", "--scores", str(scores), "--datafile", str(FOLDER / "datafile.json")]
    words += ["--classes", "fsd50k", "--threshold", "all", "--type", kind, "--out", str(tmp_path)]
    main(words)
    expected = json.loads((FOLDER / "expected.json").read_text())
    before = json.loads((FOLDER / "datafile.json").read_text())["data"]
    num_before = sum(len(row["labels"].split(",")) for row in before)
    said = capsys.readouterr().out
    for threshold, by_type in expected.items():
        labels = by_type[NAMES[kind]]
        stem = f"datafile_{NAMES[kind]}_{threshold}"
        written = json.loads((tmp_path / f"{stem}.json").read_text())["data"]
        assert [row["wav"] for row in written] == [row["wav"] for row in before]
        got = [row["labels"].split(",") for row in written]
        assert got == labels
        num_added = sum(map(len, labels)) - num_before
        assert (
            f"{stem}: {num_added} ({100 * num_added / num_before:.2f} %) labels added to {num_before}" in said
        )
        weights = np.loadtxt(tmp_path / f"{stem}_weight.csv")
        main(
            [
                "weights",
                str(tmp_path / f"{stem}.csv"),
                "--classes",
                "fsd50k",
                "--out",
                str(tmp_path / "w.csv"),
            ]
        )
        assert np.array_equal(weights, np.loadtxt(tmp_path / "w.csv"))
        capsys.readouterr()
