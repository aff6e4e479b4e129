"""Shared by the benchmarks: measured rates -> medians, paired ratios, a table, and one JSON record a run."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchaudio", "numpy", "soundfile", "webdataset", "nvidia-dali-cuda130", "scikit-learn")


def interleave(contestants: Mapping[str, Callable[[], float]], num_trials: int) -> dict[str, list[float]]:
    """Call each contestant once to warm up, then all of them in turn, num_trials rounds: name -> values.

    A disturbance of the machine so meets all contestants alike, and values of one round can be compared.
    """
    for contestant in contestants.values():
        contestant()
    values: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(num_trials):
        for name, contestant in contestants.items():
            values[name].append(contestant())
    return values


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, to four digits."""
    p10, median, p90 = (float(f"{value:.4g}") for value in np.percentile(values, [10, 50, 90]))
    return {"median": median, "p10": p10, "p90": p90}


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Summarise the ratios of the values measured in the same round."""
    return summarise([a / b for a, b in zip(numerator, denominator, strict=True)])


def read_environment() -> dict[str, Any]:
    """Commit, versions and hardware of this run."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(git, capture_output=True, text=True, check=False)
    installed = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions()}
    return {
        "commit": described.stdout.strip() if described.returncode == 0 else "unknown",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "versions": {
            "python": platform.python_version(),
            **{name: installed[name] for name in PACKAGES if name in installed},
        },
        "hardware": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "load_average": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    """Name the CPU as Linux does, with family, model and stepping where the name alone says little."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = re.sub(r"\((R|TM)\)", "", fields.get("model name", platform.machine()))
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})"


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a header, the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        first, *others = (
            cell.ljust(w) if not i else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())


def write_record(record: Mapping[str, Any], keep: bool) -> None:
    """Print the record as one line of JSON, the last of a benchmark's output; `keep` appends it to results.

    The file is results/<benchmark>_<hardware>_<yyyymm>.jsonl; hardware is the GPU's name where
    record["device"] is cuda, else the CPU's with its number of cores.
    """
    line = json.dumps(record, ensure_ascii=False)
    if keep:
        environment = record["environment"]
        hardware = environment["hardware"]
        name = hardware["gpu"] if record.get("device") == "cuda" else hardware["cpu"].split(" (")[0]
        name = name if record.get("device") == "cuda" else f"{name} {hardware['cores']} cores"
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        month = environment["time"][:7].replace("-", "")
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{record['benchmark']}_{slug}_{month}.jsonl"
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(f"appended to {path}")
    print(line, flush=True)
