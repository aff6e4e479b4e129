"""Our training step, as Trainer._step does it, and synthetic batches for it that lie on the device."""

# B clips of a batch, T frames

import time
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from roofline import NUM_CLASSES

from psla_fast.augment import AugmentConfig, InputSpec, StoredBatch, augment, draw_uniforms
from psla_fast.evaluate import autocast
from psla_fast.models import ModelConfig, build_model, use_channels_last
from psla_fast.train.losses import compute_loss
from psla_fast.train.optim import OptimConfig, build_optimizer

Step = Callable[[StoredBatch, torch.Tensor], None]


def build_our_step(config: ModelConfig, device: torch.device, precision: str, mode: str) -> Step:
    """Return a call that does what Trainer._step does with a batch on the device and its uniforms."""
    model = build_model(config, NUM_CLASSES).to(device).train()
    use_channels_last(model)
    optimizer = build_optimizer(OptimConfig(), model)
    prepare = augment
    if mode != "none":
        compile_mode = "max-autotune-no-cudagraphs" if mode == "max" else "default"
        model.compile(mode=compile_mode)
        prepare = torch.compile(augment, mode=compile_mode)

    def step(slab: StoredBatch, uniforms: torch.Tensor) -> None:
        spec = InputSpec(slab.fbank.shape[1], 128, 0.0, -4.6476, 4.5699)
        x, mixed = prepare(slab, uniforms, AugmentConfig(), spec)
        with autocast(precision, device):  # type: ignore[arg-type]
            scores = model(x, *((slab.num_frames[: len(x)],) if config.mask_padding else ()))
        loss = compute_loss(scores, mixed)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def on_synthetic(step: Step, device: torch.device) -> Callable[[int, int], None]:
    """Turn a step into a call (B, T) on random batches, one for each shape."""
    make_slab = lru_cache(partial(build_slab, device))
    return lambda batch, frames: step(*make_slab(batch, frames))


def build_slab(device: torch.device, batch: int, frames: int) -> tuple[StoredBatch, torch.Tensor]:
    """Random stored clips and partners on the device, and the uniforms of their augmentation."""
    stored = (torch.randn(2 * batch, frames, 128) * 4 - 5).half().to(device)
    targets = (torch.rand(2 * batch, NUM_CLASSES) < 0.005).float().to(device)
    lengths = torch.full((2 * batch,), min(frames, 998), device=device)
    partners = torch.arange(batch, 2 * batch, device=device)
    lam, uniforms = torch.full((batch,), 0.5, device=device), draw_uniforms(0, 1, 0, batch).to(device)
    return StoredBatch(stored, lengths, targets, partners, lam), uniforms


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a step; on a GPU the mean of 10."""
    if device.type == "cuda":
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(10):
            step()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 10_000
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
