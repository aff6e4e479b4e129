"""Training step: upstream's way, ours, and the ceiling that memory bandwidth sets, in clips a second.

Upstream's way is float32, NCHW, eager (step_upstream.py), in a process of its own. Ours is the trainer's own
step on synthetic batches that lie on the device: PSLA's augmentation and mixup, autocast, channels-last,
fused Adam, with and without torch.compile. The ceiling is in roofline.py; MFU is three times the forward
pass's operations against the rate of a large matrix product in the same precision.

Last, what length buckets gain where clips are as long as FSD50K's (step_buckets.py).

    python benchmarks/step.py [--models b0 b2] [--frames 1056 3000] [--compile none default] [--tiny]
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from record import interleave, paired_ratio, print_table, read_environment, summarise, write_record
from roofline import (
    compute_roofline,
    count_convolution_outputs,
    count_forward_flops,
    measure_copy_bandwidth,
    measure_peak_flops,
)
from step_buckets import measure_buckets
from step_ours import build_our_step, measure_activations, measure_step, on_synthetic, timed
from step_upstream_process import UpstreamProcess

from psla_fast.evaluate import resolve_precision
from psla_fast.models import ModelConfig


def measure(
    name: str, frames: int, args: argparse.Namespace, device: torch.device, precision: str
) -> dict[str, object]:
    """Time all ways for one model at one length; prints their tables."""
    torch.compiler.reset()  # a way of another shape counts towards the same limit of graphs
    batch = max(1, args.batch * 1056 // frames) if frames > 1056 else args.batch
    model = ModelConfig(name=f"efficientnet_{name}")
    with UpstreamProcess(f"efficientnet-{name}", batch, frames) as upstream:
        ways: dict[str, Callable[[], float]] = {"upstream": upstream}
        ours = {}
        for mode in args.compile:
            step = on_synthetic(build_our_step(model, device, precision, mode, (frames,)), device)
            ours[f"ours/{mode}"] = partial(step, batch, frames)
        ways |= {way: partial(timed, step, device) for way, step in ours.items()}
        first_seconds = {}
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            first_seconds[way] = round(time.perf_counter() - start, 1)
        seconds = interleave(ways, args.trials)
    rates = {way: [batch / value for value in values] for way, values in seconds.items()}
    bandwidth, outputs = measure_copy_bandwidth(device), count_convolution_outputs(name, frames)
    roofline = compute_roofline(bandwidth, outputs, 4 if precision == "fp32" else 2)
    flops, peak = 3 * count_forward_flops(name, frames), measure_peak_flops(device, precision)
    rows = []
    for way, values in rates.items():
        rate = summarise(values)
        shown = [f"{rate[key]:.2f}" for key in ("median", "p10", "p90")]
        ratio = f"{paired_ratio(values, rates['upstream'])['median']:.2f}"
        shares = [f"{rate['median'] / roofline:.1%}", f"{rate['median'] * flops / peak:.1%}"]
        rows.append([way, *shown, ratio, *shares, first_seconds[way]])
    rows.append(["roofline", f"{roofline:.2f}", "", "", "", "", f"{roofline * flops / peak:.1%}", ""])
    print(f"\nefficientnet_{name}, {batch} clips of {frames} frames, {device.type}, {precision}")
    print_table(["", "clips/s", "p10", "p90", "× upstream", "of roofline", "MFU", "first step s"], rows)
    details = {}
    for way, step in ours.items():
        phases, syncs = measure_step(step, device)
        details[way] = {"ms": phases, "syncs": syncs, "activation_bytes": measure_activations(step, device)}
        parts = "  ".join(f"{phase} {value:.1f}" for phase, value in phases.items())
        held = f"activations {details[way]['activation_bytes'] / batch / 1e6:.0f} MB a clip"  # type: ignore[operator]
        print(f"{way}: ms {parts}; {held}; host waits: {syncs or 'none'}")
    best = max(ours, key=lambda way: summarise(rates[way])["median"])
    return {
        "ratios": {
            f"{name}@{frames} ours/upstream": paired_ratio(rates[best], rates["upstream"])["median"],
            f"{name}@{frames} ours/roofline": round(summarise(rates[best])["median"] / roofline, 4),
        },
        "batch": batch,
        "clips_per_second": {way: summarise(values) for way, values in rates.items()},
        "first_step_seconds": first_seconds,
        "details": details,
        "roofline_clips_per_second": round(roofline, 2),
        "copy_gb_per_second": round(bandwidth / 1e9, 2),
        "matmul_tflops": round(peak / 1e12, 3),
        "training_flops_per_clip": flops,
        "convolution_outputs": outputs,
    }


def main() -> None:
    """Run every model and print the record last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["b0", "b2"])
    parser.add_argument("--frames", type=int, nargs="+", default=[1056, 3000])
    parser.add_argument(
        "--batch", type=int, default=0, help="clips of 1056 frames a step; 0: 8, on a GPU 100"
    )
    modes = ["none", "default", "max", "graphs"]
    parser.add_argument("--compile", nargs="+", default=["none", "default"], choices=modes)
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--buckets", type=int, nargs="*", default=[250, 500, 1000, 2000, 3000])
    parser.add_argument("--tiny", action="store_true", help="seconds, for CI; writes no record file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.batch = args.batch or (100 if device.type == "cuda" else 8)
    if args.tiny:
        args.models, args.frames, args.batch, args.compile, args.trials = ["b0"], [64], 2, ["none"], 2
        args.buckets = [40, 80]
    precision = resolve_precision(args.precision, device)
    measured = {f"{n}@{t}": measure(n, t, args, device, precision) for n in args.models for t in args.frames}
    ratios = {k: v for result in measured.values() for k, v in result.pop("ratios").items()}  # type: ignore[attr-defined]
    if args.buckets:
        model, buckets = ModelConfig(f"efficientnet_{args.models[0]}", mask_padding=True), tuple(args.buckets)
        step = on_synthetic(build_our_step(model, device, precision, "none", buckets), device)
        smallest = max(1, args.batch // 4)

        def run_step(batch: int, frames: int) -> float:
            return timed(partial(step, batch, frames), device)

        bucket_ratios, details = measure_buckets(run_step, buckets, smallest, args.trials)
        ratios |= bucket_ratios
        measured["buckets"] = {"model": args.models[0], "smallest_batch": smallest, **details}
    config = {k: v for k, v in vars(args).items() if k != "tiny"} | {"precision": precision}
    record = {"benchmark": "step", "ratios": ratios, "device": device.type, "config": config}
    write_record({**record, "measured": measured, "environment": read_environment()}, keep=not args.tiny)


if __name__ == "__main__":
    main()
