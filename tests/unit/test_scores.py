from pathlib import Path

import h5py
import numpy as np
import pytest

from psla_fast.ensemble import ensemble_members
from psla_fast.metrics import compute_metrics
from psla_fast.scores import add_epoch_scores, read_scores, write_scores
from psla_fast.shards import open_shards

KEYS = ["b", "a", "c"]
SCORES = np.arange(6, dtype=np.float32).reshape(3, 2) / 7
TARGETS = np.array([[1, 0], [0, 1], [1, 1]])


def test_scores_read_back_and_come_in_the_order_asked_for(tmp_path: Path):
    write_scores(tmp_path / "s.h5", KEYS, SCORES, TARGETS)
    read = read_scores(tmp_path / "s.h5")
    assert read.keys == KEYS
    assert np.array_equal(read.targets, TARGETS)
    assert np.array_equal(read.ordered(["a", "b", "c"], "s"), SCORES[[1, 0, 2]])


@pytest.mark.parametrize(
    ("keys", "message"), [(["a", "b"], "c is not in the data"), (["a", "b", "c", "d"], "d has no scores")]
)
def test_a_missing_or_unknown_key_is_an_error(tmp_path: Path, keys: list[str], message: str):
    write_scores(tmp_path / "s.h5", KEYS, SCORES, TARGETS)
    with pytest.raises(ValueError, match=message):
        read_scores(tmp_path / "s.h5").ordered(keys, "s.h5")


def test_garbage_is_no_score_file(tmp_path: Path):
    (tmp_path / "s.h5").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="is not a score file"):
        read_scores(tmp_path / "s.h5")
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["key"], file["scores"] = np.array([b"a", b"a"]), SCORES[:2]
    with pytest.raises(ValueError, match="2 keys, 1 different"):
        read_scores(tmp_path / "two.h5")


def test_epochs_are_added_one_by_one_and_a_repeated_one_replaces_itself(tmp_path: Path):
    path = tmp_path / "val.h5"
    for epoch in (1, 2, 2):
        add_epoch_scores(path, epoch, KEYS, SCORES * epoch, SCORES * epoch / 2, TARGETS)
    with h5py.File(path) as file:
        assert sorted(file["epochs"]) == ["01", "02"]
        assert np.array_equal(file["epochs/02"][:], SCORES * 2)
        assert np.array_equal(file["scores"][:], SCORES)


def test_what_a_killed_process_left_behind_is_ignored(tmp_path: Path):
    path = tmp_path / "val.h5"
    (tmp_path / "val.h5.tmp").write_bytes(b"half a file")
    add_epoch_scores(path, 1, KEYS, SCORES, SCORES, TARGETS)
    assert read_scores(path).keys == KEYS
    assert [file.name for file in tmp_path.iterdir()] == ["val.h5"]


def test_a_new_run_s_first_epoch_forgets_an_older_file(tmp_path: Path):
    path = tmp_path / "val.h5"
    for epoch in (1, 2, 1):
        add_epoch_scores(path, epoch, KEYS, SCORES, SCORES, TARGETS)
    with h5py.File(path) as file:
        assert list(file["epochs"]) == ["01"]


def test_an_ensemble_of_score_files_is_the_mean_matched_by_key(packed: Path, tmp_path: Path):
    rng = np.random.default_rng(0)
    with open_shards(packed / "eval") as shards:
        keys, targets = shards.keys, shards.targets(np.arange(len(shards)))
    tables = [rng.random(targets.shape).astype(np.float32) for _ in range(3)]
    for number, table in enumerate(tables):
        order = rng.permutation(len(keys))
        write_scores(tmp_path / f"{number}.h5", [keys[i] for i in order], table[order], targets[order])
    members = [tmp_path / f"{number}.h5" for number in range(3)]
    results = list(ensemble_members(members, packed / "eval", 8))
    assert [path for path, _ in results] == [*map(str, members), ""]
    for table, (_, metrics) in zip(tables, results, strict=False):
        assert metrics == compute_metrics(table, targets)
    assert results[-1][1].mean_ap == pytest.approx(compute_metrics(np.mean(tables, axis=0), targets).mean_ap)
