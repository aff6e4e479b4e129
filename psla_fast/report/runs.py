"""Runs: a run's folder -> its settings, results and log, checked."""

# E epochs

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psla_fast.checkpoint import load_checkpoint
from psla_fast.classes import Classes
from psla_fast.recipe import read_recipe
from psla_fast.report.log import RunLog, read_log

KINDS = {
    "best": ("Best epoch", "best_single_result.csv"),
    "wa": ("Weights averaged", "wa_result.csv"),
    "ema": ("Weights' EMA", "ema_result.csv"),
    "ensemble": ("Checkpoints ensembled", "ensemble_result.csv"),
}
RESULT_COLUMNS = 10


@dataclass(frozen=True)
class Run:
    """What a run's folder holds but for scores; `table` (E, 10) is result.csv.

    `results` has by kind the val mAP and AUC, and those of eval where that was scored; `classes` is None
    where no checkpoint tells them.
    """

    name: str
    path: Path
    config: dict[str, Any]
    table: npt.NDArray[np.float64]
    results: dict[str, list[float]]
    log: RunLog
    classes: Classes | None
    environment: dict[str, Any]

    @property
    def best_epoch(self) -> int:
        """The epoch of the highest val mAP, from 1; 0 where none is finished."""
        return int(np.argmax(self.table[:, 0])) + 1 if len(self.table) else 0

    @property
    def num_epochs(self) -> int:
        """How many epochs the run shall have; 0 where its config doesn't say."""
        return int(self.config.get("optim.epochs", 0))

    @property
    def is_finished(self) -> bool:
        """Tell a run that came to its end; it isn't known where its config doesn't say how many epochs."""
        return 0 < self.num_epochs <= len(self.table)

    def split_name(self, role: str) -> str:
        """Give the folder's name of the split `val` or `eval`."""
        return str(self.config.get(f"data.{role}", role))

    def has_split(self, role: str) -> bool:
        """Tell whether results of `val` or `eval` are there."""
        return any(len(values) >= (2 if role == "val" else 4) for values in self.results.values())


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run folders, named by as much of their paths as tells them apart.

    Raises ValueError for a folder that is no run, one given twice, or runs of different classes.
    """
    if not paths:
        raise ValueError("no run is given. Pass one or more folders that psla_fast.train wrote.")
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(resolved):
        if path in resolved[:number]:
            raise ValueError(f"{paths[number]} is given twice. Pass each run once.")
    runs = [_read_run(path, name) for path, name in zip(paths, name_runs(resolved), strict=True)]
    known = [run for run in runs if run.classes]
    for run in known[1:]:
        first, other = known[0].classes, run.classes
        if first and other and first.mids != other.mids:
            which = "in another order" if set(first.mids) == set(other.mids) else f"({len(other)})"
            raise ValueError(
                f"{run.path} has other classes {which} than {known[0].path} ({len(first)}). Report them on "
                "pages of their own."
            )
    return runs


def name_runs(paths: Sequence[Path]) -> list[str]:
    """Name runs by their folders, and by the folders above where two have the same name."""
    names = [path.name for path in paths]
    for depth in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        twice = {name for name in names if names.count(name) > 1}
        if not twice:
            break
        names = [
            "/".join(path.parts[-depth:]) if name in twice else name
            for path, name in zip(paths, names, strict=True)
        ]
    return names


def _read_run(path: Path, name: str) -> Run:
    config = path / "config.toml"
    if not config.is_file():
        raise ValueError(f"{path} is no run: it has no config.toml. {_hint(path)}")
    table = _read_numbers(path / "result.csv")
    if any(len(row) != RESULT_COLUMNS for row in table):
        raise ValueError(f"{path / 'result.csv'} hasn't {RESULT_COLUMNS} columns. Restore the original.")
    results = {}
    for kind, (_, file) in KINDS.items():
        values = [value for row in _read_numbers(path / file) for value in row]
        if len(values) not in (0, 2, 4):
            raise ValueError(f"{path / file} has {len(values)} numbers, not 2 or 4. Restore the original.")
        if values:
            results[kind] = values
    return Run(
        name,
        path,
        _read_config(config),
        np.array(table).reshape(-1, RESULT_COLUMNS),
        results,
        read_log(path / "metrics.jsonl"),
        _read_classes(path / "checkpoints"),
        _read_environment(path / "environment.json"),
    )


def _read_config(path: Path) -> dict[str, Any]:
    """Read a run's settings; those that the report counts with are whole numbers."""
    try:
        config = read_recipe(str(path))
    except RecursionError as error:
        raise ValueError(f"{path} is not TOML ({error}). Restore the original.") from error
    if not config:
        raise ValueError(f"{path} has no settings. Restore the original.")
    for name in ("optim.epochs", "optim.batch_size", "input.clip_frames"):
        if name in config and not _counts(config[name]):
            raise ValueError(f"{path}: {name} is {config[name]!r}; it should be a whole number from 1.")
    buckets = config.get("stream.buckets", [])
    if not isinstance(buckets, list) or not all(map(_counts, buckets)):
        raise ValueError(f"{path}: stream.buckets is {buckets!r}; it should be a list of numbers of frames.")
    return config


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _hint(path: Path) -> str:
    if not path.exists():
        return "There is no such folder."
    inside = sorted(entry.parent.name for entry in path.glob("*/config.toml"))
    if inside:
        named = ", ".join(inside[:3]) + (" …" if len(inside) > 3 else "")
        return f"Pass the runs in it: {named}"
    return "Pass a folder that psla_fast.train wrote."


def _read_numbers(path: Path) -> list[list[float]]:
    """Read a CSV file of numbers; none where there is no file."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            rows.append([float(cell) for cell in line.split(",")])
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}. Restore the original.") from error
    return rows


def _read_classes(folder: Path) -> Classes | None:
    """Take the classes from the first checkpoint that can be read."""
    files = [folder / f"{name}.pt" for name in ("best", "wa", "ema", "last", "previous")]
    for file in [*files, *sorted(folder.glob("epoch_*.pt"))]:
        if file.is_file():
            try:
                return load_checkpoint(file).card.classes
            except ValueError:  # damaged or older: another one may tell
                continue
    return None


def _read_environment(path: Path) -> dict[str, Any]:
    """Read what a run's maker noted of machine and versions; nothing where there is no such file."""
    if not path.is_file():
        return {}
    try:
        noted = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Restore or remove it.") from error
    if not isinstance(noted, dict):
        raise ValueError(f"{path} holds no object of names and values. Restore or remove it.")
    for name in ("hardware", "versions"):
        if not isinstance(noted.get(name), dict | None):
            raise ValueError(f"{path}: {name} is no object of names and values. Restore or remove it.")
    return noted


def stem_of(name: str) -> str:
    """Give a run's name without the number at its end: runs of several seeds share it."""
    return re.sub(r"[\s_.-]*(seed)?[\s_.-]*\d+$", "", name) or name
