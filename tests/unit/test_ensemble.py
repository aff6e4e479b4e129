import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import gmean

from psla_fast.ensemble import (
    Combination,
    Ensemble,
    MeanKind,
    Scoring,
    fit_weights,
    refuse_eval,
    refuse_shared_clips,
)
from psla_fast.metrics import compute_metrics
from psla_fast.scores import read_scores
from psla_fast.shards import open_shards
from tests.bare_splits import (
    Scores,
    Targets,
    draw_scores,
    draw_targets,
    make_classes,
    make_keys,
    write_bare_split,
    write_permuted,
)

WEIGHTS = (0.5, 2.0, 0.0, 1.0)


def write_members(folder: Path, targets: Targets, skills: list[float]) -> tuple[list[Path], list[Scores]]:
    """Score files of split eval, each in an order of its own, and their scores in the split's."""
    keys = make_keys("eval", len(targets))
    tables = [draw_scores(targets, skill, seed) for seed, skill in enumerate(skills)]
    paths = [
        write_permuted(folder / f"{number}.h5", keys, table, number) for number, table in enumerate(tables)
    ]
    return paths, tables


@pytest.mark.parametrize("weights", [(), WEIGHTS])
@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
def test_means_are_numpy_s_and_scipy_s_whatever_order_the_clips_are_in(
    tmp_path: Path, kind: MeanKind, weights: tuple[float, ...]
):
    targets = draw_targets(9000, 5)  # a score file is read in pieces of 8192 clips
    paths, tables = write_members(tmp_path, targets, [0.5, 1.0, 2.0, 1.5])
    tables[0][3:9] = [0, 1e-9, 1, 1.0000001, 0.5]  # what the geometric mean clamps
    write_permuted(paths[0], make_keys("eval", len(targets)), tables[0])
    with open_shards(write_bare_split(tmp_path / "eval", targets)) as shards:
        ensemble = Ensemble(paths, shards, combination=Combination(kind, weights))
        results = list(ensemble.measure())
    stacked = np.stack(tables).astype(np.float64)
    wanted = np.average(stacked, axis=0, weights=weights or None)
    if kind == "geometric":
        wanted = gmean(
            np.clip(stacked, 1e-7, 1),
            axis=0,
            weights=np.array(weights)[:, None, None] * np.ones_like(stacked) if weights else None,
        )
    assert ensemble.scores is not None
    np.testing.assert_allclose(ensemble.scores, wanted, rtol=1e-13)
    assert [path for path, _ in results] == [*map(str, paths), ""]
    for table, (_, metrics) in zip(tables, results, strict=False):
        assert metrics == compute_metrics(table, targets)
    assert results[-1][1].mean_ap == pytest.approx(compute_metrics(wanted, targets).mean_ap, abs=1e-12)


def test_the_mean_is_written_by_key_with_targets_and_classes(tmp_path: Path):
    targets = draw_targets(50, 4)
    paths, tables = write_members(tmp_path, targets, [0.5, 1.0])
    with open_shards(write_bare_split(tmp_path / "eval", targets)) as shards:
        first = Ensemble(paths, shards)
        list(first.measure())
        first.save(tmp_path / "mean.h5")
        again = Ensemble([tmp_path / "mean.h5"], shards)  # its mids are compared
        list(again.measure())
    written = read_scores(tmp_path / "mean.h5")
    assert written.keys == make_keys("eval", 50)
    assert (written.targets == targets).all()
    np.testing.assert_allclose(written.scores, np.mean(tables, axis=0), rtol=1e-6)
    np.testing.assert_array_equal(again.scores, written.scores)


def test_ten_members_take_no_more_memory_than_two(tmp_path: Path):
    targets = draw_targets(4000, 64)
    paths, _ = write_members(tmp_path, targets, [0.1 * number for number in range(10)])
    peaks = {}
    with open_shards(write_bare_split(tmp_path / "eval", targets)) as shards:
        list(Ensemble(paths[:2], shards).measure())  # what is allocated once
        for count in (2, 10):
            tracemalloc.start()
            list(Ensemble(paths[:count], shards).measure())
            peaks[count] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    member = targets.size * 4
    assert peaks[2] > 3 * member  # a member, and the sum in float64: they were seen
    assert peaks[10] < peaks[2] + member / 2


def break_scores(keys: list[str], scores: Scores, how: str) -> tuple[list[str], Scores, list[str]]:
    mids = list(make_classes(scores.shape[1]).mids)
    if how == "missing":
        return keys[:-2], scores[:-2], mids
    if how == "unknown":
        return [*keys, "stranger"], np.vstack([scores, scores[:1]]), mids
    if how == "other mids":
        return keys, scores, mids[::-1]
    if how == "fewer classes":
        return keys, scores[:, :-1], []
    scores = scores.copy()
    scores[7, 2] = np.nan if how == "nan" else -np.inf
    return keys, scores, mids


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"1\.h5: 2 clips missing, 0 unknown \(eval18 has no scores\)"),
        ("unknown", r"1\.h5: 0 clips missing, 1 unknown \(stranger is not in the data\)"),
        ("other mids", r"1\.h5 has scores of other classes, or in another order"),
        ("fewer classes", r"1\.h5 has scores of 3 classes, not 4"),
        ("nan", r"1\.h5: the score of eval7, class 2 is nan"),
        ("infinite", r"1\.h5: the score of eval7, class 2 is -inf"),
    ],
)
def test_a_member_that_does_not_fit_is_refused_by_name(tmp_path: Path, how: str, message: str):
    targets = draw_targets(20, 4)
    paths, tables = write_members(tmp_path, targets, [1.0, 1.0])
    keys, scores, mids = break_scores(make_keys("eval", 20), tables[1], how)
    write_permuted(paths[1], keys, scores, 0, mids)
    with (
        open_shards(write_bare_split(tmp_path / "eval", targets)) as shards,
        pytest.raises(ValueError, match=message) as error,
    ):
        list(Ensemble(paths, shards).measure())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0,), "1 weights for 2 models"),
        ((1.0, -1.0), "--weights is 1 -1; give numbers of 0 or more"),
        ((0.0, 0.0), "--weights is 0 0"),
        ((1.0, float("nan")), "--weights is 1 nan"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_scored(
    tmp_path: Path, weights: tuple[float, ...], message: str
):
    targets = draw_targets(20, 4)
    (tmp_path / "a.pt").touch()
    with (
        open_shards(write_bare_split(tmp_path / "eval", targets)) as shards,
        pytest.raises(ValueError, match=message),
    ):
        Ensemble([tmp_path / "a.pt"] * 2, shards, combination=Combination(weights=weights))


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
def test_the_fit_finds_a_member_that_knows_and_leaves_noise_out(tmp_path: Path, kind: MeanKind):
    targets = draw_targets(60, 6)
    paths, _ = write_members(tmp_path, targets, [0.0, 0.0, 60.0, -60.0])
    with open_shards(write_bare_split(tmp_path / "eval", targets)) as shards:
        fitted = fit_weights(paths, shards, Scoring(), kind)
    assert fitted.weights == (0, 0, 1, 0)
    assert fitted.mean_ap == fitted.best_member == 1 > fitted.alike


def test_the_fit_takes_both_of_two_members_that_know_different_classes(tmp_path: Path):
    targets = draw_targets(60, 6)
    paths, tables = write_members(tmp_path, targets, [0.0, 0.0, 0.0])
    known = draw_scores(targets, 9.0, 7)
    tables[0][:, :3], tables[2][:, 3:] = known[:, :3], known[:, 3:]
    for path, table in zip(paths, tables, strict=True):
        write_permuted(path, make_keys("eval", 60), table)
    with open_shards(write_bare_split(tmp_path / "eval", targets)) as shards:
        fitted = fit_weights(paths, shards, Scoring(), "arithmetic")
    assert min(fitted.weights[0], fitted.weights[2]) > 0.25 > fitted.weights[1]
    assert fitted.mean_ap > max(fitted.best_member, fitted.alike) + 0.02


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
@pytest.mark.parametrize("seed", range(4))
def test_fitted_weights_reach_what_they_promise_and_no_less_than_the_plain_ways(
    tmp_path: Path, seed: int, kind: MeanKind
):
    targets = draw_targets(40, 5, seed)
    skills = np.random.default_rng(seed).uniform(0, 2, 3).tolist()
    paths, tables = write_members(tmp_path, targets, skills)
    with open_shards(write_bare_split(tmp_path / "eval", targets)) as shards:
        fitted = fit_weights(paths, shards, Scoring(), kind)
        weighted = Ensemble(paths, shards, combination=Combination(kind, fitted.weights))
        reached = list(weighted.measure())[-1][1].mean_ap
        alike = list(Ensemble(paths, shards, combination=Combination(kind)).measure())[-1][1].mean_ap
        assert fit_weights(paths, shards, Scoring(), kind) == fitted
    assert reached == pytest.approx(fitted.mean_ap, abs=1e-9)
    assert fitted.alike == pytest.approx(alike, abs=1e-9)
    best = max(compute_metrics(table, targets).mean_ap for table in tables)
    assert fitted.best_member == pytest.approx(best, abs=1e-9)
    assert fitted.mean_ap >= max(fitted.alike, fitted.best_member)
    assert sum(fitted.weights) == pytest.approx(1)
    assert min(fitted.weights) >= 0


def test_an_eval_split_and_shared_clips_are_refused_to_choose_by(tmp_path: Path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "holdout").symlink_to(tmp_path / "eval")
    for data in ("shards/eval", "s3://bucket/shards/Eval/", str(tmp_path / "holdout")):
        with pytest.raises(ValueError, match="is an eval split"):
            refuse_eval(data, "--fit")
    refuse_eval("eval/val", "--fit")
    refuse_shared_clips(["a", "b"], ["c"], "--fit A and --data B")
    with pytest.raises(ValueError, match="--fit A and --data B share 2 clips, a among them"):
        refuse_shared_clips(["a", "b"], ["b", "c", "a"], "--fit A and --data B")
