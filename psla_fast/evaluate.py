"""Evaluate: model + shards -> the scores of every clip, and their metrics."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from psla_fast.augment import InputSpec, dequantise, pad_and_normalise
from psla_fast.checkpoint import Card, load_checkpoint
from psla_fast.distributed import DeviceName, World, gather_rows, start_world
from psla_fast.metrics import Metrics, compute_metrics
from psla_fast.models import use_channels_last
from psla_fast.scores import write_scores
from psla_fast.shards import Shards, open_shards
from psla_fast.stream import SequentialPlan, StreamConfig, open_stream

Precision = Literal["auto", "bf16", "fp16", "fp32"]


def resolve_precision(precision: Precision, device: torch.device) -> Literal["bf16", "fp16", "fp32"]:
    """Choose for `auto`: bf16 where the device computes in it, else fp16, on CPUs fp32."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        found = torch.cpu.get_capabilities()  # other CPUs emulate bf16, slower than fp32
        return "bf16" if found.get("amx_bf16") or found.get("avx512_bf16") else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(
    precision: Literal["bf16", "fp16", "fp32"], device: torch.device
) -> contextlib.AbstractContextManager[None]:
    """Return the autocast context of a precision; none for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


def score_shards(
    model: nn.Module,
    shards: Shards,
    spec: InputSpec,
    batch_size: int,
    precision: Precision,
    world: World,
    check_crc: bool = False,
    before_batch: Callable[[], None] | None = None,
) -> Tensor:
    """Score every clip of a split: (N, C) float32 on the CPU, in index order, the same on every rank.

    Clips are cut at the end or padded to `spec.clip_frames`; the model is left in eval mode. Every rank must
    call it. What `before_batch` raises ends it.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}; give 1 or more.")
    model.eval()
    plan = SequentialPlan(
        shards.index.num_frames, batch_size, spec.buckets or (spec.clip_frames,), world.rank, world.size
    )
    storage, context = shards.storage, autocast(resolve_precision(precision, world.device), world.device)
    reading = StreamConfig(read_ahead=2, check_crc=check_crc)
    if shards.remote:  # in the order of the index, so clips needn't wait long in memory
        reading = StreamConfig("webdataset", read_ahead=2, lanes=1, shuffle_clips=64)
    stream = open_stream(shards, reading, plan.shapes, world.device)
    masks_padding = getattr(model, "mask_padding", False)
    local = torch.empty(len(plan.clip_ids), len(shards.classes), device=world.device)
    try:
        hidden = None if world.is_first else True  # None: shown where there is a terminal
        bar = tqdm(stream.batches(plan.batches()), f"score {shards.folder.name}", leave=False, disable=hidden)
        for batch in bar:
            if before_batch:
                before_batch()
            if world.device.type == "cuda":  # CUDA graphs may overwrite the last batch's scores
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            with torch.inference_mode(), context:
                fbank = dequantise(batch.fbank, batch.num_frames, storage.scale, storage.offset)
                lengths = (batch.num_frames,) if masks_padding else ()
                scores = model(pad_and_normalise(fbank, batch.num_frames, spec), *lengths)
            rows = torch.from_numpy(batch.clip_ids // world.size)  # rank r has clips r, r + size, …
            if world.device.type == "cuda":
                rows = rows.pin_memory().to(world.device, non_blocking=True)
            local[rows] = scores[: len(rows)].float()
    finally:
        stream.close()
    return gather_rows(local, len(shards), world).cpu()


def check_compatible(card: Card, shards: Shards, path: Path) -> None:
    """Raise ValueError where shards don't hold what a checkpoint's model hears and names."""
    if card.classes.mids != shards.classes.mids:
        raise ValueError(
            f"{path} was trained on other classes ({len(card.classes)}) than {shards.location} has "
            f"({len(shards.classes)})."
        )
    if card.fbank != shards.fbank_config:
        raise ValueError(
            f"{path} hears {card.fbank}, {shards.location} holds {shards.fbank_config}. Pack again."
        )


@dataclass(frozen=True)
class Evaluation:
    """Keys, scores (N, C), targets (N, C) and metrics of a model on a split, and its classes' mids (C,)."""

    keys: list[str]
    mids: tuple[str, ...]
    scores: npt.NDArray[np.float32]
    targets: npt.NDArray[np.float32]
    metrics: Metrics


def evaluate_checkpoint(
    path: Path, data: str | Path, batch_size: int, precision: Precision = "auto", device: DeviceName = "auto"
) -> Evaluation:
    """Score a split with a checkpoint's model and measure it; raises ValueError where they don't fit."""
    checkpoint = load_checkpoint(path)
    with open_shards(data) as shards:
        check_compatible(checkpoint.card, shards, path)
        world = start_world(device)
        model = checkpoint.build().to(world.device)
        use_channels_last(model)
        scores = score_shards(model, shards, checkpoint.card.input, batch_size, precision, world).numpy()
        targets = shards.targets(np.arange(len(shards)))
        metrics = compute_metrics(scores, targets)
        return Evaluation(shards.keys, shards.classes.mids, scores, targets, metrics)


def save_evaluation(path: Path, evaluation: Evaluation, origin: str = "") -> None:
    """Write an evaluation as a score file; origin says what was scored, and by what."""
    write_scores(path, evaluation.keys, evaluation.scores, evaluation.targets, evaluation.mids, origin)
