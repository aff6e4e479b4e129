"""The command evaluate: checkpoint + shards -> mAP, AUC, d-prime and a score file."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated

import tyro

from psla_fast.commands.measures import prepare_measures, print_measures
from psla_fast.distributed import DeviceName
from psla_fast.evaluate import Precision, evaluate_checkpoint, save_evaluation
from psla_fast.metrics import compute_lwlrap
from psla_fast.recipe import parse_flags
from psla_fast.shards import join


@dataclass(frozen=True)
class EvaluateCommand:
    """Score a packed split with a checkpoint: prints mAP, AUC and d-prime, writes the scores."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """A file of RUN/checkpoints."""
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """A packed split, for instance SHARDS/eval, or its URL; with --split the folder of the splits."""
    split: str = ""
    """Name of the split in DATA, for instance train; none: DATA is one."""
    out: Path = Path("scores.h5")
    """Score file to write: HDF5 with key, scores and targets."""
    batch_size: int = 32
    """Clips scored at once, 1 or more."""
    precision: Precision = "auto"
    """Autocast, as in training."""
    device: DeviceName = "auto"
    """auto takes the GPU where there is one."""
    per_class: Path | None = None
    """CSV to write, a row a class: positives, AP, AUC, d', lwlrap; precision, recall, F1 at a threshold."""
    bootstrap: int = 0
    """Resamples of the clips, for instance 1000, for 95 % intervals of the figures; 0: none."""
    thresholds: Path | None = None
    """Score file of the validation split: precision, recall and F1 at the thresholds that are best there."""


def evaluate(arguments: list[str]) -> None:
    """Evaluate a checkpoint on a split."""
    command = parse_flags(EvaluateCommand, arguments, "psla-fast evaluate")
    data = join(command.data, command.split) if command.split else command.data
    if command.out.is_dir() or not command.out.resolve().parent.is_dir():
        raise ValueError(f"--out {command.out} can't be written: give a file in a folder that is there.")
    _refuse_equal_paths(command)
    asked = prepare_measures(
        command.checkpoint, data, command.per_class, command.bootstrap, command.thresholds
    )
    result = evaluate_checkpoint(
        command.checkpoint, data, command.batch_size, command.precision, command.device
    )
    save_evaluation(command.out, result)
    metrics = result.metrics
    print(metrics)
    print(f"lwlrap: {compute_lwlrap(result.scores, result.targets).lwlrap:.6f}")
    only_positive = metrics.num_auc_skipped - metrics.num_skipped
    no_auc = f", {only_positive} without negatives out of the AUC" if only_positive else ""
    print(
        f"{len(result.keys)} clips; mean over {metrics.num_classes} classes, {metrics.num_skipped} without "
        f"positives left out{no_auc}; scores are in {command.out}"
    )
    print_measures(asked, result)


def _refuse_equal_paths(command: EvaluateCommand) -> None:
    """Raise ValueError where a file to write would replace another that is written or read."""
    named = {"--out": command.out, "--per-class": command.per_class, "--thresholds": command.thresholds}
    given = [(flag, path) for flag, path in named.items() if path is not None]
    for (flag, path), (other, other_path) in combinations(given, 2):
        if path.resolve() == other_path.resolve():
            raise ValueError(f"{flag} and {other} are both {path}; give two files.")
