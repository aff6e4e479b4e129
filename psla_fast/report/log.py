"""Log: a run's metrics.jsonl -> its steps, its epochs, and what happened besides."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
STEP_VALUES = ("loss", "lr", "clips_per_second", "loader_wait", "gpu_memory_gb", "gpu_utilisation")
MOST_POINTS = 300  # of a curve: more than that can't be seen


@dataclass(frozen=True)
class RunLog:
    """Rows of steps in their order, those of epochs by epoch, and rows of events (skipped clips, NaNs)."""

    steps: list[Row] = field(default_factory=list)
    epochs: dict[int, Row] = field(default_factory=dict)
    events: list[Row] = field(default_factory=list)


def read_log(path: Path) -> RunLog:
    """Read metrics.jsonl; a last line that is being written is left out, a repeated row replaces the first.

    Raises ValueError that names file and line for what isn't such a row.
    """
    if not path.is_file():
        return RunLog()
    lines = path.read_bytes().split(b"\n")
    steps: dict[tuple[int, int], Row] = {}
    log = RunLog()
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line's end isn't whole
        if not line.strip():
            continue
        row = _parse(line, path, number)
        if "step" in row:
            steps[row["epoch"], row["step"]] = row
        elif "train_loss" in row:
            log.epochs[row["epoch"]] = row
        else:
            log.events.append(row)
    log.steps.extend(steps[place] for place in sorted(steps))
    return log


def _parse(line: bytes, path: Path, number: int) -> Row:
    """Read one line, in which epoch and step are whole numbers and measured values numbers or null."""
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}). Restore the file, or remove that line.") from error
    whole = isinstance(row, dict) and all(
        isinstance(row.get(name, 1), int) and row.get(name, 1) >= 1 for name in ("epoch", "step")
    )
    if not whole or "epoch" not in row:
        raise ValueError(f"{where} has no epoch that counts from 1. Restore the file, or remove that line.")
    names = STEP_VALUES if "step" in row else tuple(name for name in row if "/" in name or "_loss" in name)
    for name in names:
        if not isinstance(row.get(name), int | float | None):
            raise ValueError(f"{where}: {name} is {row[name]!r}; it should be a number.")
    if not isinstance(row.get("clips"), list | None):
        raise ValueError(f"{where}: clips is {row['clips']!r}; it should be a list of keys.")
    return dict(row)


def step_curves(log: RunLog) -> dict[str, list[float | None]]:
    """Give the steps' values over `x`, epochs begun before plus the part that is done; ≤ MOST_POINTS points.

    Of several steps that share a point the mean is given; a value that no step has isn't there.
    """
    last_steps: dict[int, int] = {}
    for row in log.steps:
        last_steps[row["epoch"]] = max(row["step"], last_steps.get(row["epoch"], 0))
    longest = max(last_steps.values(), default=1)
    x = [
        row["epoch"] - 1 + row["step"] / (last_steps[row["epoch"]] if row["epoch"] in log.epochs else longest)
        for row in log.steps
    ]
    curves = {"x": _thin(x)}
    for name in STEP_VALUES:
        values = [row.get(name) for row in log.steps]
        if any(value is not None for value in values):
            curves[name] = _thin(values)
    return curves


def _thin(values: Sequence[float | None]) -> list[float | None]:
    """Put the mean of neighbours in their place, so that at most MOST_POINTS are left."""
    stride = -(-len(values) // MOST_POINTS) if values else 1
    thinned: list[float | None] = []
    for start in range(0, len(values), stride):
        known = [value for value in values[start : start + stride] if value is not None]
        thinned.append(sum(known) / len(known) if known else None)
    return thinned


def describe_event(row: Mapping[str, Any]) -> str:
    """Say what a row tells that is neither a step's nor an epoch's."""
    if "skipped" in row:
        return f"epoch {row['epoch']}: {row['skipped']} clips couldn't be read; other draws stood in"
    if "not_finite" in row:
        clips = row.get("clips") or []
        named = ", ".join(str(clip) for clip in clips[:3]) + (" …" if len(clips) > 3 else "")
        first = row.get("first_step", "?")
        return f"epoch {row['epoch']}, step {first}: {row['not_finite']} losses weren't finite ({named})"
    rest = ", ".join(f"{key} {value}" for key, value in row.items() if key != "epoch")
    return f"epoch {row['epoch']}: {rest}"
