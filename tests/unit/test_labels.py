import json
from pathlib import Path

import numpy as np
import pytest

from psla_fast.classes import Classes
from psla_fast.cli import main
from psla_fast.labels import read_labels, replace_labels
from psla_fast.sampling import SamplingConfig, compute_sample_weights
from psla_fast.shards import Shards, open_shards
from psla_fast.stream import DrawPlan, PlanConfig, StreamConfig, explain_difference
from tests.tiny import step_rows, tiny_config, train_tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "label_enhancement_fsd50k"
CLASSES = Classes(("/m/a", "/m/b", "/m/c"), ("A", "B", "C"))


def write_table(path: Path, shards: Shards, shift: int = 0) -> Path:
    """A table of a split's own labels, each class moved on by `shift`."""
    rows = ["key,mids"]
    for clip_id, key in reversed(list(enumerate(shards.keys))):
        mids = [shards.classes.mids[(i + shift) % len(shards.classes)] for i in shards.labels(clip_id)]
        rows.append(f'{key},"{",".join(mids)}"')
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_csv_and_a_datafile_of_the_same_labels_are_the_same_table(tmp_path: Path):
    (tmp_path / "t.csv").write_text('key,mids\nx,"/m/c,/m/a"\n"a b",/m/b\nz,\n')
    data = [{"wav": "/w/x.wav", "labels": "/m/c,/m/a"}, {"wav": "a b.wav", "labels": "/m/b"}]
    (tmp_path / "t.json").write_text(json.dumps({"data": [*data, {"wav": "z.wav", "labels": ""}]}))
    (tmp_path / "bare.csv").write_text((tmp_path / "t.csv").read_text().partition("\n")[2])
    tables = [read_labels(tmp_path / name, CLASSES) for name in ("t.csv", "t.json", "bare.csv")]
    for table in tables:
        assert table.keys[0] == "x"
        assert table.keys[1].startswith("a_b-")  # the packer's key of that name
        assert table.indptr.tolist() == [0, 2, 3, 3]
        assert table.indices.tolist() == [0, 2, 1]


def test_a_table_in_another_order_gives_each_clip_its_own_labels(packed: Path, tmp_path: Path):
    with open_shards(packed / "train") as shards, open_shards(packed / "train") as other:
        replace_labels(other, read_labels(write_table(tmp_path / "t.csv", shards), shards.classes))
        assert np.array_equal(other.index.indptr, shards.index.indptr)
        assert np.array_equal(other.index.indices, shards.index.indices)
        replace_labels(other, read_labels(write_table(tmp_path / "u.csv", shards, shift=1), shards.classes))
        for clip_id in range(len(shards)):
            moved = sorted((int(i) + 1) % len(shards.classes) for i in shards.labels(clip_id))
            assert other.labels(clip_id).tolist() == moved
        assert other.fingerprint != shards.fingerprint
        config = PlanConfig(SamplingConfig(), StreamConfig(), 0, 8, 100)
        before, after = (DrawPlan(one, config).identity for one in (shards, other))
        assert "shards: others" in explain_difference(before, after)  # a run can't go on with other labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows[:-1],
            r"1 of 64 clips of \S+ have no row, 0 rows are of other clips \(\S+ has no row",
        ),
        (
            lambda rows: [*rows, 'nobody,"/demo/tone"'],
            r"0 of 64 .* 1 rows are of other clips \(nobody is no clip",
        ),
        (lambda rows: [*rows, rows[1]], "stands twice"),
        (
            lambda rows: [*rows, 'nobody,"/m/unknown"'],
            "'nobody' has the label '/m/unknown', which isn't in the class",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_refused(packed: Path, tmp_path: Path, change, message: str):
    with open_shards(packed / "train") as shards:
        path = write_table(tmp_path / "t.csv", shards)
        path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
        before = shards.index
        with pytest.raises(ValueError, match=message):
            replace_labels(shards, read_labels(path, shards.classes))
        assert shards.index is before


def test_training_takes_the_labels_of_a_table(packed: Path, tmp_path: Path):
    with open_shards(packed / "train") as shards:
        same = write_table(tmp_path / "same.csv", shards)
        other = write_table(tmp_path / "other.csv", shards, shift=1)
    losses = {}
    for name, flags in {
        "own": [],
        "same": ["--data.labels", same],
        "other": ["--data.labels", other],
    }.items():
        train_tiny(tiny_config(packed, tmp_path / name, "--optim.epochs", "1", *map(str, flags)))
        losses[name] = [row["loss"] for row in step_rows(tmp_path / name)]
    assert losses["own"] == losses["same"]
    assert losses["own"] != losses["other"]


def test_the_weights_of_the_golden_datafile_are_psla_s(tmp_path: Path):
    out = tmp_path / "w.csv"
    main(["weights", str(GOLDEN / "datafile.json"), "--classes", "fsd50k", "--out", str(out)])
    expected = np.loadtxt(GOLDEN / "expected_sample_weights.txt")
    assert np.abs(np.loadtxt(out) / expected - 1).max() < 1e-12


def test_the_weights_of_a_packed_split_are_those_that_training_draws_by(packed: Path, tmp_path: Path):
    main(["weights", str(packed / "train"), "--out", str(tmp_path / "w.csv")])
    with open_shards(packed / "train") as shards:
        index = shards.index
        expected = compute_sample_weights(index.indptr, index.indices, len(shards.classes))
    assert np.array_equal(np.loadtxt(tmp_path / "w.csv"), expected)
