"""Training step: upstream's way, ours, and the ceiling that memory bandwidth sets, in clips a second.

Upstream's way is float32, NCHW, eager (step_upstream.py). Ours is the trainer's own step on synthetic batches
that lie on the device: PSLA's augmentation and mixup, autocast, channels-last, fused Adam, with and without
torch.compile. The ceiling is in roofline.py.

Last, what length buckets gain where clips are as long as FSD50K's (step_buckets.py).

    python benchmarks/step.py [--models b0 b2] [--frames 1056] [--batch 8] [--compile none default] [--tiny]
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from record import interleave, paired_ratio, print_table, read_environment, summarise, write_record
from roofline import NUM_CLASSES, compute_roofline, count_convolution_outputs, measure_copy_bandwidth
from step_buckets import measure_buckets
from step_ours import build_our_step, on_synthetic, timed
from step_upstream import build_upstream_step

from psla_fast.evaluate import resolve_precision
from psla_fast.models import ModelConfig


def measure(name: str, args: argparse.Namespace, device: torch.device, precision: str) -> dict[str, object]:
    """Time all ways for one model at one length; prints their table."""
    batch, frames = args.batch, args.frames
    x, y = (
        torch.randn(batch, frames, 128, device=device),
        torch.rand(batch, NUM_CLASSES, device=device).round(),
    )
    model = ModelConfig(name=f"efficientnet_{name}")
    ways: dict[str, Callable[[], None]] = {
        "upstream": build_upstream_step(f"efficientnet-{name}", NUM_CLASSES, x, y)
    }
    for mode in args.compile:
        step = on_synthetic(build_our_step(model, device, precision, mode), device)
        ways[f"ours/{mode}"] = partial(step, batch, frames)
    compile_seconds = {}
    for way, step in ways.items():
        start = time.perf_counter()
        step()
        compile_seconds[way] = round(time.perf_counter() - start, 1)
    seconds = interleave({way: partial(timed, step, device) for way, step in ways.items()}, args.trials)
    rates = {way: [batch / value for value in values] for way, values in seconds.items()}
    bandwidth, outputs = measure_copy_bandwidth(device), count_convolution_outputs(name, frames)
    roofline = compute_roofline(bandwidth, outputs, 4 if precision == "fp32" else 2)
    rows = []
    for way, values in rates.items():
        rate = summarise(values)
        shown = [f"{rate[key]:.2f}" for key in ("median", "p10", "p90")]
        ratio = f"{paired_ratio(values, rates['upstream'])['median']:.2f}"
        rows.append([way, *shown, ratio, f"{rate['median'] / roofline:.1%}", compile_seconds[way]])
    rows.append(["roofline", f"{roofline:.2f}", "", "", "", "", ""])
    print(f"\nefficientnet_{name}, {batch} clips of {frames} frames, {device.type}, {precision}")
    header = ["", "clips/s", "p10", "p90", "× upstream", "of roofline", "first step s"]
    print_table(header, rows)
    ours = max((w for w in rates if w != "upstream"), key=lambda way: summarise(rates[way])["median"])
    return {
        "ratios": {
            f"{name}@{frames} ours/upstream": paired_ratio(rates[ours], rates["upstream"])["median"],
            f"{name}@{frames} ours/roofline": round(summarise(rates[ours])["median"] / roofline, 4),
        },
        "clips_per_second": {way: summarise(values) for way, values in rates.items()},
        "first_step_seconds": compile_seconds,
        "roofline_clips_per_second": round(roofline, 2),
        "copy_gb_per_second": round(bandwidth / 1e9, 2),
        "convolution_outputs": outputs,
    }


def main() -> None:
    """Run every model and print the record last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["b0", "b2"])
    parser.add_argument("--frames", type=int, default=1056)
    parser.add_argument("--batch", type=int, default=0, help="clips a step; 0: 8 on a CPU, 100 on a GPU")
    parser.add_argument(
        "--compile", nargs="+", default=["none", "default"], choices=["none", "default", "max"]
    )
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--buckets", type=int, nargs="*", default=[250, 500, 1000, 2000, 3000])
    parser.add_argument("--tiny", action="store_true", help="seconds, for CI; writes no record file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.batch = args.batch or (100 if device.type == "cuda" else 8)
    if args.tiny:
        args.models, args.frames, args.batch, args.compile, args.trials = ["b0"], 64, 2, ["none"], 2
        args.buckets = [40, 80]
    precision = resolve_precision(args.precision, device)
    measured = {name: measure(name, args, device, precision) for name in args.models}
    ratios = {k: v for result in measured.values() for k, v in result.pop("ratios").items()}  # type: ignore[attr-defined]
    if args.buckets:
        model = ModelConfig(name=f"efficientnet_{args.models[0]}", mask_padding=True)
        step = on_synthetic(build_our_step(model, device, precision, "none"), device)
        smallest = max(1, args.batch // 4)

        def run_step(batch: int, frames: int) -> float:
            return timed(partial(step, batch, frames), device)

        bucket_ratios, details = measure_buckets(run_step, tuple(args.buckets), smallest, args.trials)
        ratios |= bucket_ratios
        measured["buckets"] = {"model": args.models[0], "smallest_batch": smallest, **details}
    config = {k: v for k, v in vars(args).items() if k != "tiny"} | {"precision": precision}
    record = {"benchmark": "step", "ratios": ratios, "device": device.type, "config": config}
    write_record({**record, "measured": measured, "environment": read_environment()}, keep=not args.tiny)


if __name__ == "__main__":
    main()
