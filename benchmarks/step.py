"""Training step: upstream's way, ours, and the ceiling that memory bandwidth sets, in clips a second.

Upstream's way is float32, NCHW, eager (step_upstream.py). Ours is the trainer's own step on synthetic batches
that lie on the device: PSLA's augmentation and mixup, autocast, channels-last, fused Adam, with and without
torch.compile. The ceiling is in roofline.py.

    python benchmarks/step.py [--models b0 b2] [--frames 1056] [--batch 8] [--compile none default] [--tiny]
"""

import argparse
import time
from collections.abc import Callable

import torch
from record import interleave, paired_ratio, print_table, read_environment, summarise, write_record
from roofline import NUM_CLASSES, compute_roofline, count_convolution_outputs, measure_copy_bandwidth
from step_upstream import build_upstream_step

from psla_fast.augment import AugmentConfig, InputSpec, StoredBatch, augment, draw_uniforms
from psla_fast.evaluate import autocast, resolve_precision
from psla_fast.models import ModelConfig, build_model, use_channels_last
from psla_fast.train.optim import OptimConfig, build_optimizer, compute_loss


def build_our_step(
    name: str, batch: int, frames: int, device: torch.device, precision: str, mode: str
) -> Callable[[], None]:
    """Return a call that does what Trainer._step does, on one synthetic slab of clips and partners."""
    model = build_model(ModelConfig(name=f"efficientnet_{name}"), NUM_CLASSES).to(device).train()
    use_channels_last(model)
    optimizer = build_optimizer(OptimConfig(), model)
    prepare = augment
    if mode != "none":
        compile_mode = "max-autotune-no-cudagraphs" if mode == "max" else "default"
        model.compile(mode=compile_mode)
        prepare = torch.compile(augment, mode=compile_mode)
    spec = InputSpec(frames, 128, 0.0, -4.6476, 4.5699)
    stored = (torch.randn(2 * batch, frames, 128) * 4 - 5).half().to(device)
    targets = (torch.rand(2 * batch, NUM_CLASSES) < 0.005).float().to(device)
    lengths = torch.full((2 * batch,), min(frames, 998), device=device)
    partners = torch.arange(batch, 2 * batch, device=device)
    lam, uniforms = torch.full((batch,), 0.5, device=device), draw_uniforms(0, 1, 0, batch).to(device)
    slab = StoredBatch(stored, lengths, targets, partners, lam)

    def step() -> None:
        x, mixed = prepare(slab, uniforms, AugmentConfig(), spec)
        with autocast(precision, device):  # type: ignore[arg-type]
            scores = model(x)
        loss = compute_loss(scores, mixed)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def timed(step: Callable[[], None], batch: int, device: torch.device) -> Callable[[], float]:
    """Turn a step into a measurement in clips a second."""

    def measure() -> float:
        if device.type == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            for _ in range(10):
                step()
            last.record()
            last.synchronize()
            return 10 * batch * 1000 / first.elapsed_time(last)
        start = time.perf_counter()
        step()
        return batch / (time.perf_counter() - start)

    return measure


def measure(name: str, args: argparse.Namespace, device: torch.device, precision: str) -> dict[str, object]:
    """Time all ways for one model at one length; prints their table."""
    batch, frames = args.batch, args.frames
    x, y = (
        torch.randn(batch, frames, 128, device=device),
        torch.rand(batch, NUM_CLASSES, device=device).round(),
    )
    ways = {"upstream": build_upstream_step(f"efficientnet-{name}", NUM_CLASSES, x, y)}
    ways |= {f"ours/{m}": build_our_step(name, batch, frames, device, precision, m) for m in args.compile}
    compile_seconds = {}
    for way, step in ways.items():
        start = time.perf_counter()
        step()
        compile_seconds[way] = round(time.perf_counter() - start, 1)
    rates = interleave({way: timed(step, batch, device) for way, step in ways.items()}, args.trials)
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
    parser.add_argument("--tiny", action="store_true", help="seconds, for CI; writes no record file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.batch = args.batch or (100 if device.type == "cuda" else 8)
    if args.tiny:
        args.models, args.frames, args.batch, args.compile, args.trials = ["b0"], 64, 2, ["none"], 2
    precision = resolve_precision(args.precision, device)
    measured = {name: measure(name, args, device, precision) for name in args.models}
    ratios = {k: v for result in measured.values() for k, v in result.pop("ratios").items()}  # type: ignore[attr-defined]
    config = {k: v for k, v in vars(args).items() if k != "tiny"} | {"precision": precision}
    record = {"benchmark": "step", "ratios": ratios, "device": device.type, "config": config}
    write_record({**record, "measured": measured, "environment": read_environment()}, keep=not args.tiny)


if __name__ == "__main__":
    main()
