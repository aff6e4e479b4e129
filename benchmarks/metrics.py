"""Metrics at the size of AudioSet's evaluation set, in seconds: upstream's way, ours, and sorting alone.

Upstream's way is scikit-learn's functions, class by class, with the accuracy of the whole matrix anew for
each class. Ours is compute_metrics on the same arrays. The ceiling sorts each class's scores, which lie there
class by class, in as many threads. A round is upstream's way once, and the others some times; ratios are of
one round. Both must agree to 1e-9. Then the bootstrap, against measuring each resample, at FSD50K's size.

    python benchmarks/metrics.py [--clips 20371] [--classes 527] [--rounds 3] [--tiny]
"""

import argparse
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from record import paired_ratio, print_table, read_environment, summarise, write_record
from sklearn import metrics as sk

from psla_fast.metrics import bootstrap_metrics, compute_metrics
from psla_fast.metrics.threads import map_in_threads

Array = npt.NDArray[np.float32]
TIMES_A_ROUND = 3


def draw(num_clips: int, num_classes: int, labels_a_clip: float) -> tuple[Array, Array]:
    """Scores as a good tagger's, and targets as rare as AudioSet's: a few classes have most labels."""
    rng = np.random.default_rng(0)
    share = rng.pareto(1.0, num_classes) + 0.1
    targets = rng.random((num_clips, num_classes)) < np.minimum(0.5, share / share.sum() * labels_a_clip)
    targets[rng.integers(num_clips, size=num_classes), np.arange(num_classes)] = True  # upstream's needs one
    logits = 1.5 * rng.standard_normal((num_clips, num_classes)) + 2.5 * targets - 4
    return (1 / (1 + np.exp(-logits))).astype(np.float32), targets.astype(np.float32)


def measure_upstreams_way(scores: Array, targets: Array) -> list[float]:
    """Mean AP, AUC, and precision and recall at the middle of each class's curve."""
    rows = []
    for index in range(targets.shape[1]):
        sk.accuracy_score(np.argmax(targets, 1), np.argmax(scores, 1))
        hits, values = targets[:, index], scores[:, index]
        precision, recall, _ = sk.precision_recall_curve(hits, values)
        sk.roc_curve(hits, values)
        figures = [sk.average_precision_score(hits, values), sk.roc_auc_score(hits, values)]
        rows.append([*figures, precision[len(precision) // 2], recall[len(recall) // 2]])
    return [float(mean) for mean in np.mean(rows, axis=0)]


def measure_ours(scores: Array | torch.Tensor, targets: Array | torch.Tensor) -> list[float]:
    """The same by compute_metrics."""
    found = compute_metrics(scores, targets)
    return [found.mean_ap, found.mean_auc, found.mean_precision, found.mean_recall]


def time_it(function: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(scores: Array, targets: Array, num_rounds: int) -> tuple[dict[str, list[float]], float, float]:
    """Time all ways by turns: name -> seconds of each round; the largest difference, and ours' peak in MB."""
    by_class = np.ascontiguousarray(scores.T)
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: measure_ours(scores, targets),
        "sort": lambda: list(map_in_threads(np.sort, by_class, by_class.size)),
    }
    if torch.cuda.is_available():
        there = torch.from_numpy(scores).cuda(), torch.from_numpy(targets).cuda()
        ways["ours, on the GPU"] = lambda: measure_ours(*there)
    expected: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in ("upstream", *ways)}
    for function in ways.values():
        function()  # warms up
    for _ in range(num_rounds):
        start = time.perf_counter()
        expected = measure_upstreams_way(scores, targets)
        seconds["upstream"].append(time.perf_counter() - start)
        for name, function in ways.items():
            seconds[name].append(float(np.median([time_it(function) for _ in range(TIMES_A_ROUND)])))
    found = [measure_ours(scores, targets), *([measure_ours(*there)] if len(ways) > 2 else [])]
    difference = float(np.abs(np.array(found) - expected).max())
    tracemalloc.start()
    measure_ours(scores, targets)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return seconds, difference, peak


def compare_bootstrap(num_clips: int, num_classes: int, resamples: int) -> tuple[list[float], list[float]]:
    """Seconds of the bootstrap, and of as many resamples measured one by one (told from ten)."""
    scores, targets = draw(num_clips, num_classes, 3.7)
    rows = np.random.default_rng(0).integers(num_clips, size=(10, num_clips))

    def measure_each() -> None:
        for chosen in rows:
            compute_metrics(scores[chosen], targets[chosen])

    together, each = [], []
    for _ in range(5):
        together.append(time_it(lambda: bootstrap_metrics(scores, targets, resamples)))
        each.append(time_it(measure_each) * resamples / len(rows))
    return together, each


def main() -> None:
    """Time everything, and print the record last."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    parser.add_argument("--clips", type=int, default=20371)
    parser.add_argument("--classes", type=int, default=527)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--tiny", action="store_true", help="seconds, for CI; writes no record file")
    args = parser.parse_args()
    size = (10231, 200)
    if args.tiny:
        args.clips, args.classes, args.rounds, args.resamples, size = 500, 20, 2, 20, (400, 10)
    seconds, difference, peak = compare(*draw(args.clips, args.classes, 2.7), args.rounds)
    assert difference < 1e-9, f"ours differ from scikit-learn's by {difference}"
    together, each = compare_bootstrap(*size, args.resamples)
    seconds |= {"bootstrap": together, "each resample measured": each}
    figures = {name: summarise(values) for name, values in seconds.items()}
    print(f"{args.clips} × {args.classes}; the bootstrap {args.resamples} × {size[0]} × {size[1]}")
    print_table(["", "s", "p10", "p90"], [[name, *found.values()] for name, found in figures.items()])
    print(f"means differ from scikit-learn's by {difference:.1e}; ours hold {peak:.1f} MB beside the arrays")
    ratios = {
        "upstream/ours": paired_ratio(seconds["upstream"], seconds["ours"])["median"],
        "sort/ours": paired_ratio(seconds["sort"], seconds["ours"])["median"],
        "each resample measured/bootstrap": paired_ratio(each, together)["median"],
    }
    print("  ".join(f"{name} {ratio:.3g}" for name, ratio in ratios.items()))
    details = {
        "largest_difference": difference,
        "own_peak_mb": round(peak, 2),
        "times_a_round": TIMES_A_ROUND,
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = {key: value for key, value in vars(args).items() if key != "tiny"}
    record = {"benchmark": "metrics", "ratios": ratios, "device": device, "config": config}
    measured = {"seconds": figures, **details, "threads": torch.get_num_threads()}
    write_record({**record, "measured": measured, "environment": read_environment()}, keep=not args.tiny)


if __name__ == "__main__":
    main()
