from pathlib import Path

import pytest

from psla_fast.classes import Classes, find_classes
from psla_fast.report.groups import common_settings, differing_settings, group_runs
from psla_fast.report.numbers import format_spread, plain
from psla_fast.report.published import compare_with_psla
from psla_fast.report.runs import read_runs
from psla_fast.report.tables import build_results, build_tiles
from tests.reports import make_classes, write_run


def groups_of(*paths: Path) -> list[tuple[str, list[int]]]:
    return [(group.name, group.members) for group in group_runs(read_runs(paths))]


def test_seeds_of_one_configuration_are_a_group(tmp_path: Path):
    a = [write_run(tmp_path / f"base_{seed}", "--seed", str(seed), epochs=1) for seed in (0, 1)]
    other = write_run(tmp_path / "other_0", "--optim.lr", "0.02", epochs=1)
    assert groups_of(a[0], other, a[1]) == [("base", [0, 2]), ("other_0", [1])]


def test_runs_that_share_a_seed_are_told_apart_by_name(tmp_path: Path):
    names = ("a_0", "b_0", "a_1", "b_1", "same", "again")
    paths = [
        write_run(tmp_path / name, "--seed", name[-1] if name[-1] in "01" else "0", epochs=1)
        for name in names
    ]
    assert groups_of(*paths) == [("a", [0, 2]), ("b", [1, 3]), ("same", [4]), ("again", [5])]


def test_where_a_run_is_and_how_it_is_read_makes_no_group(tmp_path: Path):
    a = write_run(tmp_path / "x0", "--stream.num-threads", "2", epochs=1)
    b = write_run(tmp_path / "x1", "--stream.num-threads", "3", "--seed", "1", epochs=1)
    assert groups_of(a, b) == [("x", [0, 1])]


def test_settings_that_differ_are_listed_by_group(tmp_path: Path):
    paths = [write_run(tmp_path / f"base_{seed}", "--seed", str(seed), epochs=1) for seed in (0, 1)]
    paths.append(
        write_run(tmp_path / "other", "--optim.lr", "0.02", "--stream.buckets", "50", "100", epochs=1)
    )
    old = tmp_path / "base_0/config.toml"
    text = old.read_text()
    runs = read_runs(paths)
    groups = group_runs(runs)
    rows = differing_settings(runs, groups)
    assert ("seed", ["0, 1", "0"]) in rows
    assert ("optim.lr", ["0.01", "0.02"]) in rows
    assert ("stream.buckets", ["none", "50 100"]) in rows
    assert len(rows) == 3
    assert not {key for key, _ in rows} & {key for key, _ in common_settings(runs)}
    old.write_text(text.replace("sync_batch_norm = false\n", ""))
    runs = read_runs(paths)
    assert ("sync_batch_norm", ["–", "false", "false"]) in differing_settings(runs, group_runs(runs))


def test_a_group_has_the_mean_and_the_sample_deviation_of_its_seeds(tmp_path: Path):
    paths = [write_run(tmp_path / f"r{seed}", "--seed", str(seed)) for seed in (0, 1, 2)]
    runs = read_runs(paths)
    groups = group_runs(runs)
    results = build_results(runs, groups, "eval")
    assert [kind for kind, _ in results["kinds"]] == ["best", "wa", "ensemble"]
    assert [row["level"] for row in results["rows"]] == ["group", "seed", "seed", "seed"]
    singles = [run.results["best"][2] for run in runs]
    assert results["rows"][0]["cells"][0] == format_spread(singles)
    tiles = build_tiles(runs, groups, "eval", 4, make_classes(5), {"train": 61, "eval": 24})
    assert tiles[0]["value"] == format_spread([run.results["ensemble"][2] for run in runs])
    assert [tile["label"] for tile in tiles][1:4] == ["AUC", "Classes in eval", "Clips in train"]


def test_spreads_are_written_with_their_sample_deviation():
    assert format_spread([]) == "–"
    assert format_spread([0.5]) == "0.500"
    assert format_spread([0.4, 0.6]) == "0.500 ± 0.141"
    assert format_spread([float("inf"), 1.0]) == "∞"
    assert plain(float("nan")) is None
    assert plain(0.123456789) == 0.12346


def test_pslas_figures_stand_beside_a_run_only_on_the_same_data():
    def reasons(classes: Classes | None, role: str, clips: int, *train: int) -> list[str]:
        return [row["reason"] for row in compare_with_psla(classes, role, [clips], train)]

    fsd50k, audioset = find_classes("fsd50k"), find_classes("audioset")
    assert reasons(fsd50k, "eval", 10_231, 36_796) == ["other classes", "other classes", ""]
    assert reasons(fsd50k, "eval", 10_231)[2] == ""
    assert reasons(fsd50k, "val", 10_231, 36_796)[2] == "another split"
    assert reasons(fsd50k, "eval", 255, 926)[2] == "other clips: 255 instead of 10,231"
    assert reasons(fsd50k, "eval", 10_231, 926)[2] == "trained on other clips: 926"
    assert reasons(audioset, "eval", 19_000, 20_500)[:2] == ["trained on other clips: 20,500", ""]
    assert reasons(audioset, "eval", 19_000, 1_950_000)[:2] == ["", "trained on other clips: 1,950,000"]
    assert reasons(make_classes(200), "eval", 10_231, 36_796) == ["other classes"] * 3
    assert reasons(None, "eval", 10_231, 36_796) == ["other classes"] * 3
    assert reasons(fsd50k, "eval", 10_231, 36_796, 926)[2] == "trained on other clips: 926"  # one of two runs
    assert compare_with_psla(fsd50k, "eval", [10_231, 99], [])[2]["reason"].startswith("other clips: 99 ")
    assert compare_with_psla(fsd50k, "eval", [], [36_796])[2]["reason"] == "number of clips not known"


@pytest.mark.parametrize("epochs", [0, 2])
def test_an_unfinished_run_is_said_to_be(tmp_path: Path, epochs: int):
    runs = read_runs([write_run(tmp_path / "a", epochs=epochs)])
    tiles = build_tiles(runs, group_runs(runs), "val", 0, None, {})
    assert tiles[-1] == {"label": "Epochs", "value": str(epochs), "note": "of 3, unfinished"}
    assert build_results(runs, group_runs(runs), "val")["rows"][0]["unfinished"]
