"""The command recipe: PSLA's whole way on shards: round 1, enhanced labels, round 2, ensembles, report."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from psla_fast.enhance import Threshold
from psla_fast.ontology import PACKAGED, read_ontology
from psla_fast.recipe import parse_flags, parse_recipes
from psla_fast.shards import exists_split, join
from psla_fast.train.config import TrainConfig

# Files of a run, and what PSLA has on FSD50K and on AudioSet-20k there (table II of the paper)
RESULTS = {
    "best epoch": ("best_single_result.csv", ".559", ".316"),
    "weights averaged": ("wa_result.csv", ".562", ".319"),
    "checkpoints ensembled": ("ensemble_result.csv", ".573", ".328"),
}

OWN_FLAGS = {"--data.shards", "--data.labels", "--run", "--seed", "--keep-epochs", "--resume"}


@dataclass(frozen=True)
class RecipeCommand:
    """Train, enhance the labels by what was learnt, train again on them, ensemble all runs, and report.

    What is finished in OUT isn't done again, and what was stopped goes on: kill it, type it again. Flags of
    the trainings follow after --, for instance -- --optim.epochs 20 --compile default.
    """

    shards: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SHARDS")]
    """Folder that pack wrote: train, val and, by choice, eval."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder of the runs, label sets and the report."""
    recipe: tuple[str, ...] = ("fsd50k",)
    """Recipes of the runs, the later wins."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of round 2; round 1 has the first alone."""
    baseline: bool = False
    """Train every seed in round 1 as well, to see what the enhanced labels are worth."""
    threshold: Threshold = "mean"
    """Threshold of label enhancement: mean, median or a percentile of the scores of a class's clips."""
    ontology: Path = PACKAGED
    """Ontology in AudioSet's JSON format."""
    ranks: int = 1
    """Ranks of a training, one a GPU; more than one by torchrun."""


def run_recipe(arguments: list[str]) -> None:
    """Run all steps, each shown as one would type it, and print the table."""
    own, flags = arguments, []
    if "--" in arguments:
        own, flags = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    command = parse_flags(RecipeCommand, own, "psla-fast recipe")
    if not command.seeds or len(set(command.seeds)) < len(command.seeds) or command.ranks < 1:
        raise ValueError(
            f"--seeds is {command.seeds}, --ranks {command.ranks}; give different seeds, and 1 rank or more."
        )
    data = _resolve(command, flags).data
    has_eval = data.eval != data.val and exists_split(join(command.shards, data.eval))
    split = data.eval if has_eval else data.val
    read_ontology(command.ontology)  # what is wrong with it is said before hours of training
    first = command.seeds if command.baseline else command.seeds[:1]
    round1 = [_train(command, "round1", seed, *flags) for seed in first]
    words = ["--run", str(round1[0]), "--threshold", command.threshold, "--ontology", str(command.ontology)]
    _call(["-m", "psla_fast.cli", "enhance", *words])
    table = round1[0] / "enhance" / f"{Path(data.train).name}_type1_2_{command.threshold}.csv"
    round2 = [_train(command, "round2", seed, f"--data.labels={table}", *flags) for seed in command.seeds]
    scored = join(command.shards, split)
    for runs in (round1, round2):
        if len(runs) > 1:
            members = [str(run / "scores" / f"{split}.h5") for run in runs]
            _call(["-m", "psla_fast.cli", "ensemble", *members, "--data", scored])
    report = command.out / "report.html"
    _call(["-m", "psla_fast.cli", "report", *map(str, [*round1, *round2]), "--out", str(report)])
    print(f"\n{split} mAP, mean ± deviation over seeds; PSLA's of one run, on other clips and classes")
    print(f"{'':<22}  {'round 1':>15}  {'round 2':>15}  {'PSLA FSD50K':>11}  {'PSLA AS-20k':>11}")
    for name, (file, fsd50k, audioset) in RESULTS.items():
        cells = [_summarise([_read_map(run / file, has_eval) for run in runs]) for runs in (round1, round2)]
        print(f"{name:<22}  {cells[0]:>15}  {cells[1]:>15}  {fsd50k:>11}  {audioset:>11}")
    print(f"{command.out}: runs round*_seed*, label sets in {table.parent}, report {report}")


def _resolve(command: RecipeCommand, flags: Sequence[str]) -> TrainConfig:
    """Parse what a training will be given; raises ValueError for bad flags, and for the recipe's own."""
    for flag in flags:
        if flag.split("=")[0].replace("_", "-") in OWN_FLAGS:
            raise ValueError(f"{flag.split('=')[0]} is set by the recipe itself. Leave it out.")
    settings = [f"--data.shards={command.shards}", f"--run={command.out}"]
    config = parse_recipes(TrainConfig, [*command.recipe, *settings, *flags], "psla-fast recipe")
    if not exists_split(join(command.shards, config.data.train)):
        raise ValueError(
            f"{command.shards} has no split {config.data.train}. Give the folder that pack wrote."
        )
    return config


def _train(command: RecipeCommand, name: str, seed: int, *flags: str) -> Path:
    """Train a run, or go on with it."""
    run = command.out / f"{name}_seed{seed}"
    entry = ["-m", "psla_fast.train"]
    if command.ranks > 1:
        entry = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={command.ranks}"]
        entry += ["-m", "--", "psla_fast.train"]
    settings = [f"--data.shards={command.shards}", f"--run={run}", f"--seed={seed}", "--keep-epochs=False"]
    _call([*entry, *command.recipe, *settings, *flags])
    return run


def _call(words: Sequence[str]) -> None:
    """Run a step in a process of its own; its failure ends this one, after the line that it printed."""
    print(f"\n$ python {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, *words], check=False).returncode
    if status:
        sys.exit(status if status > 0 else 128 - status)


def _read_map(path: Path, of_eval: bool) -> float:
    """Read a result file's mAP of val, or of eval."""
    return float(np.loadtxt(path, ndmin=1)[2 if of_eval else 0])


def _summarise(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"
