"""What length buckets gain on FSD50K's lengths, against padding every clip to the longest."""

# B clips of a batch, T frames

from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
from record import interleave, paired_ratio, print_table, summarise

from psla_fast.stream import StreamConfig
from psla_fast.stream.order import bucket_sizes, make_steps

NUM_CLIPS = 36_796  # FSD50K's training split
MEAN_SECONDS, SHORTEST, LONGEST = 7.1, 0.3, 30.0
RunStep = Callable[[int, int], float]  # (B, T) -> seconds of a training step


def draw_lengths(num_clips: int) -> npt.NDArray[np.int64]:
    """Draw lengths in frames like FSD50K's: log-normal, clipped to 0.3 … 30 s, with a mean of 7.1 s."""
    spread, location = 1.1, 1.5
    normal = np.random.default_rng(0).standard_normal(num_clips)
    for _ in range(50):  # clipping moves the mean; find the location that gives FSD50K's
        seconds = np.clip(np.exp(location + spread * normal), SHORTEST, LONGEST)
        location += float(np.log(MEAN_SECONDS / seconds.mean()))
    return (seconds * 100).astype(np.int64)


def measure_buckets(
    run_step: RunStep, buckets: tuple[int, ...], global_batch: int, trials: int
) -> tuple[dict[str, float], dict[str, object]]:
    """Time a step of each shape an epoch has, add the epoch up, and compare; returns ratios and details."""
    lengths = np.minimum(draw_lengths(NUM_CLIPS // global_batch * global_batch), buckets[-1])
    ways: dict[str, Counter[tuple[int, int]]] = {"padded": Counter()}
    ways["padded"][global_batch, buckets[-1]] = len(lengths) // global_batch
    for bucket_by in ("clips", "frames"):
        stream = StreamConfig(buckets=buckets, bucket_by=bucket_by)  # type: ignore[arg-type]
        sizes = bucket_sizes(stream, global_batch, buckets[-1])
        steps = make_steps(lengths, sizes, global_batch, stream.bucket_window * global_batch, 0, 1)
        pairs = zip(np.diff(steps.starts).tolist(), steps.num_frames.tolist(), strict=True)
        ways[f"buckets, equal {bucket_by}"] = Counter(pairs)
    shapes = sorted({shape for way in ways.values() for shape in way})
    seconds = interleave({str(shape): partial(run_step, *shape) for shape in shapes}, trials)
    rates = {
        name: [
            len(lengths) / sum(count * seconds[str(shape)][trial] for shape, count in way.items())
            for trial in range(trials)
        ]
        for name, way in ways.items()
    }
    used = {
        name: lengths.sum() / sum(b * t * count for (b, t), count in way.items())
        for name, way in ways.items()
    }
    rows = [
        [name, *(f"{v:.2f}" for v in summarise(rate).values()), f"{used[name]:.0%}"]
        + [f"{paired_ratio(rate, rates['padded'])['median']:.2f}"]
        for name, rate in rates.items()
    ]
    print(f"\nlengths like FSD50K's, mean {lengths.mean() / 100:.1f} s, buckets {list(buckets)}")
    print_table(["", "clips/s", "p10", "p90", "frames that are clip", "× padded"], rows)
    ratios = {f"{name} / padded": paired_ratio(rates[name], rates["padded"])["median"] for name in rates}
    del ratios["padded / padded"]
    medians = {name: summarise(values)["median"] for name, values in seconds.items()}
    rates_of = {name: summarise(rate) for name, rate in rates.items()}
    return ratios, {"clips_per_second": rates_of, "step_seconds_by_shape": medians}
