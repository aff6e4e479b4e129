"""The training step: a batch as stored -> augmented -> loss and gradients -> by choice the update."""

# B clips of a rank's batch, T frames, F mels, C classes

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from psla_fast.augment import InputSpec, StoredBatch, augment, draw_uniforms, fill_masks
from psla_fast.distributed import World, sum_over_ranks
from psla_fast.evaluate import autocast, resolve_precision
from psla_fast.shards import Storage
from psla_fast.stream import Batch
from psla_fast.train.compiling import compile_parts
from psla_fast.train.config import TrainConfig
from psla_fast.train.finite import FiniteGuard
from psla_fast.train.losses import compute_loss
from psla_fast.train.optim import build_optimizer, split_parameters


@dataclass(frozen=True)
class StepPlace:
    """Where a step stands: epoch counts from 1, step from 0 within it.

    It is one of `parts` batches whose gradients make an update, the last of them where `updates`.
    """

    epoch: int
    step: int
    lr: float
    parts: int = 1
    updates: bool = True


class TrainStep:
    """What a step changes: the model, its optimiser and the loss scale; on one rank of several, or alone."""

    def __init__(
        self, config: TrainConfig, model: nn.Module, spec: InputSpec, storage: Storage, world: World
    ):
        """Compile where the config says so; call `start_epoch` once the weights are there."""
        self.config, self.world, self.spec, self.storage = config, world, spec, storage
        self.model = self.ddp = model
        self.masks_padding = getattr(model, "mask_padding", False)
        self.optimizer = build_optimizer(config.optim, model)
        self.precision = resolve_precision(config.precision, world.device)
        skips, scales = config.on_nan == "skip", self.precision == "fp16"
        self.scaler = GradScaler(world.device.type, enabled=scales)
        if skips and not scales:  # it only leaves out updates whose gradients aren't finite
            self.scaler = GradScaler(world.device.type, init_scale=1.0)
        self._skips, self._scales = skips, scales
        self._bad = torch.zeros((), dtype=torch.int32, device=world.device)  # losses of the update so far
        self.guard = FiniteGuard(model, skips, world.device)
        self._backbone = split_parameters(model)[0] if config.optim.freeze_epochs else []
        self._frozen: bool | None = None  # None: no epoch was started
        self._augment_config = fill_masks(config.augment, spec)
        self._augment = compile_parts(model, augment, config.compile, max(1, len(spec.buckets)))

    def start_epoch(self, epoch: int) -> None:
        """Go to training mode, but for a backbone that is frozen; several ranks average their gradients."""
        frozen = epoch <= self.config.optim.freeze_epochs
        if frozen != self._frozen:
            for parameter in self._backbone:
                parameter.requires_grad_(not frozen)
            self._frozen = frozen
            self._distribute()  # DDP keeps to the parameters that learn when it is made
        self.ddp.train()
        if frozen:
            for name, part in self.model.named_children():
                part.train(name == "attention")

    def _distribute(self) -> None:
        if self.world.size == 1:
            return
        self.ddp = self.model  # the old one's hooks go first
        static = self.config.optim.accumulate == 1
        self.ddp = DistributedDataParallel(
            self.model, gradient_as_bucket_view=True, static_graph=static, broadcast_buffers=False
        )

    def prepare(self, batch: Batch, epoch: int, step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Seed torch for a step, and augment its batch: the model's arguments, and targets (B, C)."""
        config, world = self.config, self.world
        if config.compile == "graphs":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # drop-connect and noise draw from torch's global generator; seeded by step, a resume repeats it
        entropy = [config.seed, epoch, step, world.rank, 2]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        share = len(batch.clip_ids)
        uniforms = draw_uniforms(config.seed, epoch, step, share * world.size)
        mine = uniforms[world.rank * share :][:share]
        if world.device.type == "cuda":  # copies from memory that isn't pinned may wait
            mine = mine.pin_memory().to(world.device, non_blocking=True)
        tensors = (batch.fbank, batch.num_frames, batch.targets, batch.partner_row, batch.lam)
        stored = StoredBatch(*tensors, self.storage.scale, self.storage.offset)
        x, targets = self._augment(stored, mine, self._augment_config, self.spec)
        return (x, *((batch.num_frames[: len(x)],) if self.masks_padding else ())), targets

    def __call__(self, batch: Batch, place: StepPlace) -> Tensor:
        """Take a step on a rank's batch; returns its loss, detached and on the device."""
        with record_function("augment"):  # of profiling.PHASES
            inputs, targets = self.prepare(batch, place.epoch, place.step)
        self.guard.before_step()
        alone = not place.updates and isinstance(self.ddp, DistributedDataParallel)
        with self.ddp.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            loss = self._backward(inputs, targets, place.parts)
        if self._skips and self._scales:
            self._bad += ~loss.isfinite()
        if place.updates:
            for group in self.optimizer.param_groups:
                group["lr"] = place.lr * group["lr_factor"]
            with record_function("optimiser"):
                self.scaler.step(self.optimizer)
                self._update_scale()
                self.optimizer.zero_grad(set_to_none=True)
        return self.guard.after_step(place.step, loss)

    def _update_scale(self) -> None:
        """Adapt the loss scale to gradients that overflowed, but not to losses that are bad without it."""
        if not self._skips or not self._scales:
            self.scaler.update(1.0 if self._skips else None)
            return
        kept = [getattr(self.scaler, name) for name in ("_scale", "_growth_tracker")]
        before = [tensor.clone() for tensor in kept]
        self.scaler.update()
        bad = sum_over_ranks(self._bad, self.world) > 0
        for tensor, old in zip(kept, before, strict=True):
            tensor.copy_(torch.where(bad, old, tensor))
        self._bad.zero_()

    def _backward(self, inputs: tuple[Tensor, ...], targets: Tensor, parts: int) -> Tensor:
        """Add the gradients of the model's arguments and targets (B, C); returns the loss."""
        with record_function("forward"):
            with autocast(self.precision, self.world.device):
                scores = self.ddp(*inputs)
            loss = compute_loss(scores, targets, self.config.loss)
        with record_function("backward"):
            self.scaler.scale(loss / parts if parts > 1 else loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()
