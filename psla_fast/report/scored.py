"""Scored: a run's score files -> scores of its best epoch, its averages and its ensemble, by class."""

# N clips, C classes

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from psla_fast.metrics import average_precision
from psla_fast.report.runs import KINDS, Run
from psla_fast.scores import ScoreFile, read_scores

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scored:
    """Clips of a split with targets (N, C) and, by kind of result, the scores (N, C) that are known."""

    keys: list[str]
    targets: npt.NDArray[np.uint8]
    scores: dict[str, FloatArray]

    @property
    def main(self) -> str:
        """The kind that confusion and examples show: the ensemble's, else what is known."""
        return "ensemble" if "ensemble" in self.scores else next(iter(self.scores))

    def average_precisions(self) -> dict[str, npt.NDArray[np.float64]]:
        """Compute each class's average precision (C,) by kind; NaN for a class without positives."""
        return {kind: average_precision(scores, self.targets) for kind, scores in self.scores.items()}


def read_scored(run: Run, role: str) -> tuple[Scored | None, list[str]]:
    """Read the scores of `val` or `eval`, and say what is left out; None where the run has no score file.

    The run's own file has the ensemble's and each epoch's. Those of wa.pt, ema.pt and, where no file has its
    epoch, best.pt come from SPLIT_wa.h5, … beside it, unless the checkpoint is newer. Keys and targets are
    those of the first file that is there. Raises ValueError for a damaged file, or one of other clips or
    classes.
    """
    path = run.path / "scores" / f"{run.split_name(role)}.h5"
    file = _read_first(path, run) if path.is_file() else None
    found = {"ensemble": file.scores, **_read_best_epoch(run, path)} if file else {}
    beside, notes = _find_beside(run, path, found)
    if file is None:
        if beside or len(run.table):
            lost = "figures of the ensemble" if beside else "figures"
            notes.append(f"{run.name}: scores/{path.name} is gone: no {lost} by class")
        if not beside:
            return None, notes
        path = next(iter(beside.values()))
        file = _read_first(path, run)
    for kind, source in beside.items():
        found[kind] = read_scores(source).ordered(file.keys, str(source))
    for kind, scores in found.items():
        source = beside.get(kind, path)
        if scores.shape != file.scores.shape:
            raise ValueError(f"{source} has scores of {scores.shape[-1]} classes, not those of {path}.")
        if not np.isfinite(scores).all():
            raise ValueError(f"{source} holds scores that aren't finite. Train again from before they came.")
    return Scored(file.keys, file.targets, {kind: found[kind] for kind in KINDS if kind in found}), notes


def _find_beside(run: Run, path: Path, found: Collection[str]) -> tuple[dict[str, Path], list[str]]:
    """Give SPLIT_kind.h5 of the kinds that aren't found yet, and say which are too old."""
    files, notes = {}, []
    for kind in KINDS:
        checkpoint = run.path / "checkpoints" / f"{kind}.pt"
        beside = path.with_name(f"{path.stem}_{kind}.h5")
        if kind in found or not beside.is_file():
            continue
        if checkpoint.is_file() and checkpoint.stat().st_mtime > beside.stat().st_mtime:
            notes.append(f"{run.name}: {beside.name} is older than {checkpoint.name}: left out; see --score")
        else:
            files[kind] = beside
    return files, notes


def _read_first(path: Path, run: Run) -> ScoreFile:
    """Read the file whose keys and targets count, of the run's classes."""
    file = read_scores(path)
    if len(file.targets) != len(file.keys):
        raise ValueError(f"{path} has no targets. Restore the file that training wrote.")
    if run.classes and file.scores.shape[1] != len(run.classes):
        raise ValueError(f"{path} has scores of {file.scores.shape[1]} classes, not {len(run.classes)}.")
    return file


def _read_best_epoch(run: Run, path: Path) -> dict[str, FloatArray]:
    with h5py.File(path, "r") as file:
        name = f"epochs/{run.best_epoch:02d}"
        return {"best": file[name][:].astype(np.float32)} if run.best_epoch and name in file else {}


def score_missing(run: Run, role: str, split: str) -> list[str]:
    """Score a split's folder or URL with wa.pt, ema.pt and best.pt where their scores aren't known.

    They are computed in the run's own precision and written beside its scores as SPLIT_wa.h5, …; gives the
    names of the files written.
    """
    from psla_fast.evaluate import Precision, evaluate_checkpoint, save_evaluation

    scored, _ = read_scored(run, role)
    written = []
    for kind in ("best", "wa", "ema"):
        checkpoint = run.path / "checkpoints" / f"{kind}.pt"
        if checkpoint.is_file() and (scored is None or kind not in scored.scores):
            batch_size = max(1, int(run.config.get("optim.batch_size", 32)))
            target = run.path / "scores" / f"{run.split_name(role)}_{kind}.h5"
            precision: Precision = run.config.get("precision", "auto")
            save_evaluation(target, evaluate_checkpoint(checkpoint, split, batch_size, precision))
            written.append(str(target))
    return written
