"""An ensemble of models at the size of AudioSet's evaluation set: upstream's way, ours, and reading alone.

Ours is the command `ensemble` in a process of its own, over float32 score files in as many different orders:
each model's metrics, then those of the mean. Upstream's way is one model's predictions from a text CSV, and
scikit-learn class by class with the accuracy of the whole matrix anew for each; it is done for one model and
counted for all, and the mean. The ceiling reads the files' scores and sums them up. Peak memory is that of
the command for all models, and for two.

    python benchmarks/ensemble.py [--models 10] [--clips 20371] [--classes 527] [--rounds 3] [--tiny]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
from metrics import draw, measure_upstreams_way
from record import paired_ratio, print_table, read_environment, summarise, write_record

from psla_fast.classes import Classes, format_classes
from psla_fast.fbank import FbankConfig
from psla_fast.scores import write_scores
from psla_fast.shards import Storage
from psla_fast.shards.index import write_index
from psla_fast.shards.sums import CLASSES_NAME, format_sums, hash_file
from psla_fast.shards.writer import Member, ShardStatistics

ROOT = Path(__file__).resolve().parent.parent


def write_split(split: Path, targets: np.ndarray) -> list[str]:
    """Write an index with these labels (N, C), all of a split that score files need; give its keys."""
    split.mkdir()
    numbers = range(targets.shape[1])
    classes = Classes(tuple(f"/m/{n}" for n in numbers), tuple(f"class {n}" for n in numbers))
    (split.parent / "classes.csv").write_text(format_classes(classes))
    keys = [f"Y{row:010d}" for row in range(len(targets))]
    clips = [
        Member(key, key, f"{key}.flac", 320_000, 512, 256_000, 1000, row, np.flatnonzero(labels).tolist())
        for row, (key, labels) in enumerate(zip(keys, targets, strict=True))
    ]
    statistics = ShardStatistics(tar_bytes=10**6, num_frames=len(clips), clips=clips)
    write_index(split, [statistics], FbankConfig(), Storage.of("float16"), classes)
    (split / "SHA256SUMS").write_text(
        format_sums({name: hash_file(split / name) for name in ("index.h5", CLASSES_NAME)})
    )
    return keys


def write_members(folder: Path, keys: list[str], scores: np.ndarray, count: int) -> list[Path]:
    """Write each model's score file, in an order of its own."""
    rng, paths = np.random.default_rng(1), [folder / f"{number}.h5" for number in range(count)]
    for path in paths:
        order = rng.permutation(len(keys))
        noisy = np.clip(scores * rng.uniform(0.5, 1.5, scores.shape).astype(np.float32), 0, 1)
        write_scores(path, [keys[row] for row in order], noisy[order], np.zeros(scores.shape, np.uint8))
    return paths


def run_ours(members: list[Path], split: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak memory in MB of the command."""
    words = [sys.executable, "tools/ensemble.py", *map(str, members), "--data", str(split)]
    start = time.perf_counter()
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    lines = process.stdout.read().splitlines()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = status
    seconds = time.perf_counter() - start
    assert not status, "the command failed"
    assert lines[-1].startswith(f"Ensemble {len(members)} Models mAP"), lines
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def run_upstreams_way(csv: Path, targets: np.ndarray) -> tuple[float, float]:
    """Seconds that one model's CSV takes to read, and its metrics to measure."""
    start = time.perf_counter()
    scores = np.loadtxt(csv, delimiter=",")
    middle = time.perf_counter()
    measure_upstreams_way(scores, targets)
    return middle - start, time.perf_counter() - middle


def read_alone(members: list[Path], shape: tuple[int, ...]) -> float:
    """Seconds to read the scores and sum them up."""
    start, total = time.perf_counter(), np.zeros(shape)
    for path in members:
        with h5py.File(path) as file:
            total += file["scores"][:]
    return time.perf_counter() - start


def main() -> None:
    """Measure everything by turns, and print the record last."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    for name, value in (("models", 10), ("clips", 20371), ("classes", 527), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tiny", action="store_true", help="seconds, for CI; writes no record file")
    args = parser.parse_args()
    if args.tiny:
        args.models, args.clips, args.classes, args.rounds = 3, 400, 20, 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scores, targets = draw(args.clips, args.classes, 2.7)
        split = folder / "eval"
        members = write_members(folder, write_split(split, targets), scores, args.models)
        ours, alone = [], []
        read_alone(members, scores.shape)  # warms the disk's cache up
        for _ in range(args.rounds):
            ours.append(run_ours(members, split))
            print("ours: {:.1f} s, CPU {:.1f} s, {:.0f} MB".format(*ours[-1]), flush=True)
            alone.append(read_alone(members, scores.shape))
        of_two = run_ours(members[:2], split)
        np.savetxt(folder / "predictions.csv", scores, delimiter=",")
        reading, measuring = run_upstreams_way(folder / "predictions.csv", targets)
    upstream = args.models * reading + (args.models + 1) * measuring
    seconds, cpu_seconds, peaks = (list(column) for column in zip(*ours, strict=True))
    figures = {"ours": summarise(seconds), "ours, CPU": summarise(cpu_seconds), "reading": summarise(alone)}
    print(f"{args.models} models × {args.clips} clips × {args.classes} classes")
    rows = [[name, *found.values()] for name, found in figures.items()]
    print_table(["", "s", "p10", "p90"], [*rows, ["upstream's, from one model", f"{upstream:.4g}", "", ""]])
    print(f"peak memory {max(peaks):.0f} MB, of two models {of_two[2]:.0f} MB")
    ratios = {
        "upstream/ours": summarise([upstream / value for value in seconds])["median"],
        "reading/ours": paired_ratio(alone, seconds)["median"],
        "peak of all/of two": round(max(peaks) / of_two[2], 3),
    }
    print("  ".join(f"{name} {ratio:.3g}" for name, ratio in ratios.items()))
    measured = {"seconds": figures, "upstream_one_model": {"read": reading, "measure": measuring}}
    measured |= {"peak_mb": round(max(peaks), 1), "peak_mb_of_two": round(of_two[2], 1)}
    config = {key: value for key, value in vars(args).items() if key != "tiny"}
    record = {"benchmark": "ensemble", "ratios": ratios, "device": "cpu", "config": config}
    write_record({**record, "measured": measured, "environment": read_environment()}, keep=not args.tiny)


if __name__ == "__main__":
    main()
