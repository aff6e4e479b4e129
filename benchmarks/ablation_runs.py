"""Runs of benchmarks/ablation.py: each row and seed is trained in a process of its own, once."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from record import read_environment

from psla_fast.demo import write_synthetic_fsd50k
from psla_fast.pack import PackConfig, WorkConfig, pack_splits
from psla_fast.recipe import read_recipe
from psla_fast.sources import read_fsd50k

HERE = Path(__file__).parent
WHOLE, WAVEFORM = "whole", "waveform_mixup"
RESULTS = {"single": "best_single_result.csv", "weights": "wa_result.csv", "ensemble": "ensemble_result.csv"}
TINY = "--model.pretrained=none --input.clip-frames=64 --optim.epochs=2 --optim.batch-size=8 --wa.start=1"
TINY += " --optim.warmup-steps=1 --sampling.num-draws=16 --augment.time-mask-frames=10"


def build_command(recipe: str, name: str, shards: str, waveforms: str, run: Path, seed: int) -> list[str]:
    """Give the command that trains a row: the recipe, or the recipe and what leaves a part out."""
    entry, snippets = ["-m", "psla_fast.train"], [] if name in (WHOLE, WAVEFORM) else [name]
    if name == WAVEFORM:
        entry = [str(HERE / "waveform_mixup.py"), waveforms]
    command = [sys.executable, *entry, recipe, *snippets, f"--data.shards={shards}"]
    return [*command, f"--run={run}", f"--seed={seed}", "--keep-epochs=False"]


def train(command: Sequence[str], run: Path, one_thread: bool) -> None:
    """Train a run unless it is finished; its folder keeps the output and the environment."""
    if is_finished(run):
        return
    run.mkdir(parents=True, exist_ok=True)
    (run / "environment.json").write_text(json.dumps(read_environment()))
    threads = {"OMP_NUM_THREADS": "1"} if one_thread else {}
    with open(run / "log.txt", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, **threads}, check=False)
    if done.returncode:
        raise ValueError(f"{run} ended with {done.returncode}. See {run / 'log.txt'}.")
    print(f"{run} is finished", flush=True)


def is_finished(run: Path) -> bool:
    """Tell whether a run has its results, and those of its last epoch."""
    if not all((run / name).is_file() for name in ("config.toml", "result.csv", *RESULTS.values())):
        return False
    num_epochs = read_recipe(str(run / "config.toml"))["optim.epochs"]
    return len((run / "result.csv").read_text().splitlines()) == num_epochs


def read_eval_map(run: Path) -> dict[str, float]:
    """Read the eval mAP of a run's best epoch, averaged weights and ensembled checkpoints."""
    lines = {name: (run / file).read_text().split() for name, file in RESULTS.items()}
    return {name: round(float(values[2]), 5) for name, values in lines.items()}


def write_tiny(folder: Path) -> dict[str, str]:
    """Write and pack a data set of 60 short clips; gives the folders shards, waveforms and out."""
    write_synthetic_fsd50k(folder / "audio", num_clips=60, seed=0)
    pack_splits(*read_fsd50k(folder / "audio"), folder / "shards", PackConfig(), WorkConfig(workers=1))
    return {
        "shards": str(folder / "shards"),
        "waveforms": str(folder / "audio"),
        "out": str(folder / "runs"),
    }
