"""What each part of the recipe is worth: packed recordings are trained on with and without it -> eval mAP.

Runs are paired: with one seed, rows share the draws, masks and initial weights that they have in common.
"""

import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ablation_runs import (
    RESULTS,
    TINY,
    WAVEFORM,
    WHOLE,
    build_command,
    is_finished,
    read_eval_map,
    train,
    write_tiny,
)
from record import print_table, read_environment, write_record

from psla_fast.errors import exit_on_user_error
from psla_fast.recipe import parse_flags

ROWS = (WHOLE, WAVEFORM, "linear_mixup", "no_mixup", "no_pretraining", "no_balance", "no_masking", "heads1")
ROWS += ("heads0",)
Values = dict[str, dict[int, dict[str, float]]]  # eval mAP by row, seed and result


@dataclass(frozen=True)
class Ablation:
    """Train a recipe with and without its parts."""

    shards: str = ""
    """Folder that pack wrote: train, val and eval."""
    waveforms: str = ""
    """The FSD50K folder it was packed from, for the row whose waveforms are mixed."""
    out: str = "ablation_runs"
    """Folder of the runs: what is finished there isn't trained again, what was stopped goes on."""
    recipe: str = "small_cpu"
    """Recipe that the rows leave a part out of."""
    only: tuple[str, ...] = ROWS
    """Rows: whole, waveform_mixup, or the name of a recipe that leaves a part out."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each row is trained with each of these seeds."""
    jobs: int = 2
    """Runs at a time; with more than one, each has one thread."""
    train: bool = True
    """Train what isn't finished; else rows have the seeds that are."""
    tiny: bool = False
    """A run of seconds, for CI; its numbers mean nothing and are not kept."""


def run_all(config: Ablation) -> Values:
    """Train what isn't finished, seed by seed; gives what is."""
    runs = {
        (name, seed): Path(config.out) / f"{name}_{seed}" for seed in config.seeds for name in config.only
    }
    flags = TINY.split() if config.tiny else []

    def train_one(key: tuple[str, int]) -> None:
        paths = config.shards, config.waveforms, runs[key]
        train([*build_command(config.recipe, key[0], *paths, key[1]), *flags], runs[key], config.jobs > 1)

    if config.train:
        with ThreadPoolExecutor(config.jobs) as pool:
            list(pool.map(train_one, runs))
    values: Values = {}
    for (name, seed), run in runs.items():
        if is_finished(run):
            values.setdefault(name, {})[seed] = read_eval_map(run)
    return values


def summarise(values: Values, name: str, key: str) -> dict[str, float]:
    """Mean and deviation (n-1) over the seeds, and the paired difference to the whole recipe."""
    mine, whole = values[name], values[WHOLE]
    summary = {"mean": np.mean([results[key] for results in mine.values()])}
    if len(mine) > 1:
        summary["deviation"] = np.std([results[key] for results in mine.values()], ddof=1)
    differences = [mine[seed][key] - whole[seed][key] for seed in mine if seed in whole]
    if name != WHOLE and len(differences) > 1:
        error = np.std(differences, ddof=1) / np.sqrt(len(differences))
        summary |= {"difference": np.mean(differences), "error": error}
    return {part: round(float(value), 5) for part, value in summary.items()}


def compute_ratio(values: Values, name: str) -> float:
    """Divide a row's mean ensemble by the whole recipe's, over the seeds that both have."""
    mine, whole = values[name], values[WHOLE]
    shared = [seed for seed in mine if seed in whole]
    return round(sum(mine[s]["ensemble"] for s in shared) / sum(whole[s]["ensemble"] for s in shared), 4)


def print_summaries(values: Values, summaries: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print a line a row."""
    rows = []
    for name, summary in summaries.items():
        cells = [
            f"{part['mean']:.3f}" + (f" ± {part['deviation']:.3f}" if "deviation" in part else "")
            for part in summary.values()
        ]
        for key in ("weights", "ensemble"):
            part = summary[key]
            cells.append(f"{part['difference']:+.3f} ± {part['error']:.3f}" if "error" in part else "–")
        rows.append([name, len(values[name]), *cells])
    header = ["eval mAP", "seeds", "best epoch", "weights averaged", "ensembled"]
    print_table([*header, "averaged: difference", "ensembled: difference"], rows)


def main() -> None:
    """Train, print the table, write the record."""
    config = parse_flags(Ablation, sys.argv[1:], "benchmarks/ablation.py")
    with tempfile.TemporaryDirectory(prefix="psla_fast_ablation_") as temporary:
        if config.tiny:
            paths = write_tiny(Path(temporary))
            config = replace(config, **paths, only=(WHOLE, WAVEFORM), seeds=(0, 1))
        values = run_all(config)
        environments = [json.loads(file.read_text()) for file in Path(config.out).glob("*/environment.json")]
    if WHOLE not in values:
        raise ValueError(f"{config.out} has no finished run of the whole recipe. Leave out --no-train.")
    summaries = {name: {key: summarise(values, name, key) for key in RESULTS} for name in values}
    print_summaries(values, summaries)
    record = {
        "benchmark": "ablation",
        "ratios": {f"{name}/{WHOLE}": compute_ratio(values, name) for name in values},
        "eval_map": summaries,
        "by_seed": values,
        "trained_at": sorted({environment["commit"] for environment in environments}),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "config": asdict(config),
        "environment": read_environment(),
    }
    write_record(record, keep=not config.tiny)


if __name__ == "__main__":
    with exit_on_user_error("benchmarks/ablation.py"):
        main()
