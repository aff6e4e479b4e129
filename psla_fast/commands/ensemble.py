"""The command ensemble: checkpoints or score files on one split -> PSLA's "Ensemble Result Summary"."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from psla_fast.distributed import DeviceName
from psla_fast.ensemble import (
    Combination,
    Ensemble,
    Fit,
    MeanKind,
    Scoring,
    check_members,
    fit_weights,
    is_score_file,
    refuse_eval,
    refuse_shared_clips,
)
from psla_fast.evaluate import Precision
from psla_fast.recipe import parse_flags
from psla_fast.shards import Shards, open_shards


@dataclass(frozen=True)
class EnsembleCommand:
    """Score checkpoints or score files on one split, and the mean of their scores."""

    members: tyro.conf.Positional[tuple[Path, ...]]
    """Checkpoints or score files (HDF5), in any mix: of any networks, heads and frames, but the same classes.
    Scores are matched by the clips' keys."""
    data: str
    """A packed split, for instance SHARDS/eval, or its URL."""
    mean: MeanKind = "arithmetic"
    """Mean of the scores; geometric: of scores clamped to [1e-7, 1]."""
    weights: tuple[float, ...] = ()
    """Members' weights in the mean, in their order; none: all alike."""
    fit: str = ""
    """A packed validation split, for instance SHARDS/val: weights are chosen for its mAP by greedy selection
    (Caruana et al. 2004). It may share no clip with the data."""
    fit_scores: tuple[Path, ...] = ()
    """With --fit, for each member that is a score file, in their order: its validation split's scores."""
    out: Path | None = None
    """Score file to write: the mean, by key."""
    batch_size: int = 32
    """Clips scored at once, 1 or more."""
    precision: Precision = "auto"
    """Autocast, as in training."""
    device: DeviceName = "auto"
    """auto takes the GPU where there is one."""


def ensemble(arguments: list[str]) -> None:
    """Print PSLA's ensemble summary, each model's line as soon as it is measured."""
    command = parse_flags(EnsembleCommand, arguments, "psla-fast ensemble")
    scoring = Scoring(command.batch_size, command.precision, command.device)
    combination = Combination(command.mean, command.weights)
    out = command.out
    if out and (out.is_dir() or not out.resolve().parent.is_dir()):
        raise ValueError(f"--out {out} can't be written: give a file in a folder that is there.")
    with open_shards(command.data) as shards:
        check_members(command.members)
        validation_members = _pair(command)
        if command.fit:
            fitted = _fit(command, validation_members, shards, scoring)
            combination = replace(combination, weights=fitted.weights)
        measured = Ensemble(command.members, shards, scoring, combination)
        print("---------------Ensemble Result Summary---------------", flush=True)
        for number, (path, metrics) in enumerate(measured.measure()):
            name = f"Model {number} {path}" if path else f"Ensemble {number} Models"
            print(f"{name} {metrics}", flush=True)
        if out:
            measured.save(out)
            print(f"{command.mean} mean of {len(shards)} clips' scores is in {out}")


def _pair(command: EnsembleCommand) -> list[Path]:
    """Give what stands for each member on the validation split; raises ValueError for flags that clash."""
    if command.fit_scores and not command.fit:
        raise ValueError("--fit-scores are for --fit VAL_SPLIT. Give that, too.")
    if not command.fit:
        return []
    refuse_eval(command.fit, "--fit")
    if command.weights:
        raise ValueError("--weights and --fit both say how members count. Give one of them.")
    of_files = [path for path in command.members if is_score_file(path)]
    if len(of_files) != len(command.fit_scores):
        raise ValueError(
            f"{len(command.fit_scores)} --fit-scores for {len(of_files)} members that are score files. Give "
            "each one's scores of the validation split, in their order."
        )
    check_members([*command.members, *command.fit_scores])
    of_file = iter(command.fit_scores)
    return [next(of_file) if is_score_file(path) else path for path in command.members]


def _fit(command: EnsembleCommand, members: Sequence[Path], measured: Shards, scoring: Scoring) -> Fit:
    with open_shards(command.fit) as validation:
        refuse_shared_clips(validation.keys, measured.keys, f"--fit {command.fit} and --data {command.data}")
        if validation.classes.mids != measured.classes.mids:
            raise ValueError(f"--fit {command.fit} has other classes than {command.data}. Pack them alike.")
        fitted = fit_weights(members, validation, scoring, command.mean)
        shown = " ".join(f"{weight:.4g}" for weight in fitted.weights)
        print(
            f"weights {shown}, chosen on the {len(validation)} clips of {command.fit}: mAP there "
            f"{fitted.mean_ap:.6f}; all alike {fitted.alike:.6f}, best model {fitted.best_member:.6f}"
        )
    return fitted
