"""The training loop: draws -> batches -> augmentation -> step; after each epoch scores and files."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import FrameType

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from psla_fast.augment import InputSpec, StoredBatch, augment, draw_uniforms
from psla_fast.checkpoint import Card, save_checkpoint
from psla_fast.distributed import World, broadcast_model, sum_over_ranks
from psla_fast.evaluate import autocast, resolve_precision, score_shards
from psla_fast.fbank import PSLA_MEAN, PSLA_STD
from psla_fast.files import keep_copy
from psla_fast.metrics import compute_metrics
from psla_fast.models import build_model, use_channels_last
from psla_fast.scores import add_epoch_scores
from psla_fast.shards import Shards
from psla_fast.stream import (
    Batch,
    BatchShape,
    DrawPlan,
    PlanConfig,
    Stream,
    StreamConfig,
    explain_difference,
    open_stream,
)
from psla_fast.train.config import TrainConfig
from psla_fast.train.finite import FiniteGuard, describe_batch
from psla_fast.train.losses import compute_loss
from psla_fast.train.optim import build_optimizer, compute_lr
from psla_fast.train.progress import Progress
from psla_fast.train.results import EpochResult, RunFolder
from psla_fast.train.splits import open_splits
from psla_fast.train.state import Best, TrainState

StreamOpener = Callable[[Shards, StreamConfig, Sequence[BatchShape], torch.device], Stream]


class Stopped(Exception):  # noqa: N818 - not an error: the run goes on later
    """A signal asked the run to stop; its state is saved."""


class Trainer:
    """One run on one rank."""

    def __init__(self, config: TrainConfig, world: World, streams: StreamOpener = open_stream) -> None:
        """Open the data, build model and optimiser, and go on from last.pt where it is.

        `streams` opens what batches come from; benchmarks pass others.
        """
        self.config, self.world, self.streams = config, world, streams
        self.folder = RunFolder(config.run)
        self.train, self.scored = open_splits(config)
        statistics = (
            (PSLA_MEAN, PSLA_STD) if config.input.statistics == "psla" else (self.train.mean, self.train.std)
        )
        num_mels = self.train.fbank_config.num_mels
        self.spec = InputSpec(
            config.input.clip_frames, num_mels, config.input.pad_value, *statistics, config.stream.buckets
        )
        self.card = Card(config.model, self.train.classes, self.spec, self.train.fbank_config)
        self.draws = PlanConfig(
            config.sampling, config.stream, config.seed, config.optim.batch_size, config.input.clip_frames
        )
        self.plan = DrawPlan(self.train, self.draws, world.rank, world.size)
        torch.manual_seed(config.seed)
        start = replace(config.model, pretrained="none") if self.folder.goes_on else config.model
        self.model = build_model(start, len(self.train.classes)).to(world.device)
        self.masks_padding = getattr(self.model, "mask_padding", False)
        if config.model.mask_padding and not self.masks_padding:
            raise ValueError(f"{config.model.name} can't mask padding. Leave --model.mask-padding off.")
        if config.channels_last:
            use_channels_last(self.model)
        self.optimizer = build_optimizer(config.optim, self.model)
        self.precision = resolve_precision(config.precision, world.device)
        skips, scales = config.on_nan == "skip", self.precision == "fp16"
        self.scaler = GradScaler(world.device.type, enabled=scales)
        if skips and not scales:  # it only leaves out updates whose gradients aren't finite
            self.scaler = GradScaler(world.device.type, init_scale=1.0, growth_interval=2**31 - 1)
        self.guard = FiniteGuard(self.model, skips, world.device)
        # of the first epoch's steps: with buckets of equal frames others may have a few more or less
        self.total_updates = config.optim.epochs * -(-self.plan.num_steps(1) // config.optim.accumulate)
        if config.optim.schedule != "step" and config.optim.warmup_steps >= self.total_updates - 1:
            raise ValueError(
                f"optim.warmup_steps is {config.optim.warmup_steps}, the run has {self.total_updates} "
                "updates. Lower it, or train for more epochs."
            )
        self.state = TrainState()
        self.stop_signal = 0
        if world.is_first:
            self.folder.start(config)
        self._resume()
        self.augment: Callable[..., tuple[Tensor, Tensor]] = augment
        if config.compile != "none":
            mode = "max-autotune-no-cudagraphs" if config.compile == "max" else "default"
            self.model.compile(mode=mode)
            self.augment = torch.compile(augment, mode=mode)
        self.ddp: nn.Module = self.model
        if world.size > 1:
            self.ddp = DistributedDataParallel(
                self.model, gradient_as_bucket_view=True, static_graph=config.optim.accumulate == 1
            )

    def run(self) -> None:
        """Train the epochs that are left and write the results; raises Stopped on SIGTERM or SIGUSR1."""
        config = self.config
        progress = Progress(config.optim.epochs, self.world)
        self._say_start(progress)
        handler = partial(_note_signal, self)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, handler)
        stream = self.streams(self.train, config.stream, self.plan.shapes, self.world.device)
        try:
            for epoch in range(self.state.epoch, config.optim.epochs + 1):
                progress.start_epoch(self.plan.batch_sizes(epoch), self.state.step)
                batches = stream.batches(self.plan.batches(epoch, self.state.step))
                loss = self._train_epoch(epoch, progress, progress.timed(batches))
                self._finish_epoch(epoch, loss, progress)
        finally:
            stream.close()
        self._finish_run(progress)

    def _train_epoch(self, epoch: int, progress: Progress, batches: Iterator[Batch]) -> float:
        """Run the epoch's steps from `state.step` on; returns the mean loss over all its clips."""
        config, state, num_steps = self.config, self.state, self.plan.num_steps(epoch)
        self.ddp.train()
        skipped, accumulate = state.skipped, config.optim.accumulate
        sizes = self.plan.batch_sizes(epoch)
        shares = sizes / sizes.mean()  # with length buckets a batch may hold more clips than another
        loss_sum = torch.tensor(state.loss_sum, device=self.world.device, dtype=torch.float64)
        saved = time.monotonic()
        for step, batch in enumerate(batches, start=state.step):
            lr = compute_lr(config.optim, epoch, state.updates, self.total_updates)
            begun = step // accumulate * accumulate  # the update's first batch
            is_last = step + 1 == min(begun + accumulate, num_steps)
            loss = self._step(epoch, step, lr, batch, min(accumulate, num_steps - begun), is_last)
            loss_sum += loss * float(shares[step])
            state.updates += is_last
            if batch.skipped and not skipped:
                print(f"rank {self.world.rank} skipped: {batch.skipped[0]}", flush=True)
            skipped += len(batch.skipped)
            logs = (step + 1) % config.log_every_steps == 0 or step + 1 == num_steps
            if logs:
                self._check_finite(progress, epoch)
                self._log_step(progress, epoch, step, self._mean_over_ranks(loss), lr)
            waits = logs or self.world.size == 1 or self.world.device.type == "cpu"  # GPUs: at log steps only
            if waits and is_last:
                due = time.monotonic() - saved > 60 * config.checkpoint_minutes
                stop, save = self._agree(self.stop_signal, int(due))
                if stop or save:
                    state.step, state.loss_sum = step + 1, self._mean_over_ranks(loss_sum)
                    state.skipped = self._sum_over_ranks(skipped)
                    self._check_finite(progress, epoch)
                    self._save_last()
                    saved = time.monotonic()
                if stop:
                    raise Stopped(signal.Signals(stop).name)
        state.skipped = self._sum_over_ranks(skipped)
        return self._mean_over_ranks(loss_sum) / num_steps

    def _step(self, epoch: int, step: int, lr: float, batch: Batch, parts: int, is_last: bool) -> Tensor:
        """One of the `parts` of an update, which the last makes; returns the rank's loss, on the device."""
        config, world = self.config, self.world
        # drop-connect and noise draw from torch's global generator; seeded by step, a resume repeats it
        torch.manual_seed(
            int(np.random.SeedSequence([config.seed, epoch, step, world.rank, 2]).generate_state(1)[0])
        )
        share = len(batch.clip_ids)
        uniforms = draw_uniforms(config.seed, epoch, step, share * world.size)
        mine = uniforms[world.rank * share :][:share].to(world.device, non_blocking=True)
        storage = self.train.storage
        tensors = (batch.fbank, batch.num_frames, batch.targets, batch.partner_row, batch.lam)
        stored = StoredBatch(*tensors, storage.scale, storage.offset)
        x, targets = self.augment(stored, mine, config.augment, self.spec)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.guard.before_step()
        alone = not is_last and isinstance(self.ddp, DistributedDataParallel)
        with self.ddp.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            loss = self._backward(batch, x, targets, parts)
        if is_last:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        return self.guard.after_step(step, loss)

    def _backward(self, batch: Batch, x: Tensor, targets: Tensor, parts: int) -> Tensor:
        """Add the gradients of a batch's input (B, T, F) and targets (B, C); returns its loss."""
        with autocast(self.precision, self.world.device):
            scores = self.ddp(x, *((batch.num_frames[: len(x)],) if self.masks_padding else ()))
        loss = compute_loss(scores, targets, self.config.loss)
        self.scaler.scale(loss / parts if parts > 1 else loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _log_step(self, progress: Progress, epoch: int, step: int, loss: float, lr: float) -> None:
        row = progress.report(epoch, step + 1, loss, lr)
        if self.world.is_first:
            self.folder.log(row)

    def _mean_over_ranks(self, value: Tensor) -> float:
        return float(sum_over_ranks(value.clone(), self.world)) / self.world.size

    def _sum_over_ranks(self, count: int) -> int:
        return int(sum_over_ranks(torch.tensor(count, device=self.world.device), self.world))

    def _check_finite(self, progress: Progress, epoch: int) -> None:
        """Stop at a loss that isn't finite, or say which steps were left out; waits for the device."""
        step, count = self.guard.take()
        if not count:
            return
        whole = DrawPlan(self.train, self.draws)  # all ranks'
        clips = describe_batch(self.train, next(whole.batches(epoch, step)))
        where = f"the loss isn't finite at epoch {epoch}, step {step + 1}"
        if self.config.on_nan == "stop":
            raise ValueError(
                f"{where}; its clips are {clips}. {self.folder.last} holds the last good state; mend the "
                "shards, try a lower --optim.lr, --precision fp32, or --on-nan skip."
            )
        progress.say(f"{where}; its clips are {clips}. {count} such losses are left out.")
        if self.world.is_first:
            self.folder.log({"epoch": epoch, "first_step": step + 1, "not_finite": count, "clips": clips})

    def _finish_epoch(self, epoch: int, train_loss: float, progress: Progress) -> None:
        """Score the splits; on the first rank update averages, best and files. last.pt comes last."""
        state = self.state
        broadcast_model(self.model, self.world)  # each rank has its own BatchNorm statistics
        scored = self._score()
        if self.world.is_first:
            metrics = [compute_metrics(scores, targets) for scores, targets in scored]
            state.scores.add(
                {name: scores for (name, _), (scores, _) in zip(self.scored, scored, strict=True)}
            )
            mean = state.scores.mean()
            ensemble = [
                compute_metrics(mean[n], t) for (n, _), (_, t) in zip(self.scored, scored, strict=True)
            ]
            val_loss = float(compute_loss(*scored[0], self.config.loss))
            lr = compute_lr(self.config.optim, epoch, state.updates - 1, self.total_updates)
            result = EpochResult(metrics[0], ensemble[0], train_loss, val_loss, lr)
            state.rows.append(result.row())
            weights = self.model.state_dict()
            if self.config.wa.start <= epoch <= self.config.wa.end:
                state.weights.add(weights)
            is_best = not state.best.epoch or metrics[0].mean_ap > state.best.metrics[0].mean_ap
            if is_best:
                state.best = Best(epoch, metrics)
                save_checkpoint(self.folder.checkpoints / "best.pt", self.card, weights, epoch)
                self.folder.write_summary("best_single_result.csv", metrics)
            if self.config.keep_epochs:
                save_checkpoint(self.folder.checkpoints / f"epoch_{epoch:02d}.pt", self.card, weights, epoch)
            for (name, shards), (scores, targets) in zip(self.scored, scored, strict=True):
                path = self.folder.scores / f"{name}.h5"
                add_epoch_scores(
                    path, epoch, shards.keys, scores.numpy(), mean[name].numpy(), targets.numpy()
                )
            self.folder.write_summary("ensemble_result.csv", ensemble)
            self.folder.write_table("result.csv", state.rows)
            self.folder.log_epoch(epoch, result, [name for name, _ in self.scored], metrics, ensemble)
            progress.say(
                f"epoch {epoch}/{self.config.optim.epochs} done  train loss {train_loss:.4f}  "
                f"{self.scored[0][0]} loss {val_loss:.4f}  {metrics[0]}{' (best)' if is_best else ''}  "
                f"ensemble mAP {ensemble[0].mean_ap:.6f}"
            )
        if state.skipped:
            progress.say(f"epoch {epoch}: {state.skipped} clips couldn't be read, other draws stood in")
            if self.world.is_first:
                self.folder.log({"epoch": epoch, "skipped": state.skipped})
        state.epoch, state.step, state.loss_sum, state.skipped = epoch + 1, 0, 0.0, 0
        if self.world.is_first:
            self._save_last()

    def _finish_run(self, progress: Progress) -> None:
        """Score the averaged weights, write wa.pt and say how the run ended."""
        averaged = torch.tensor(self.state.weights.count, device=self.world.device)
        if int(sum_over_ranks(averaged, self.world)):
            if self.world.is_first:
                self.model.load_state_dict(self.state.weights.mean())
            broadcast_model(self.model, self.world)
            scored = self._score()
            if self.world.is_first:
                epoch = min(self.config.wa.end, self.config.optim.epochs)
                save_checkpoint(self.folder.checkpoints / "wa.pt", self.card, self.model.state_dict(), epoch)
                self.folder.write_summary("wa_result.csv", [compute_metrics(s, t) for s, t in scored])
        else:
            progress.say("no epoch lies in wa.start … wa.end: no weight average was made")
        if self.world.is_first:
            for line in self.folder.closing_lines([name for name, _ in self.scored], self.state.best.epoch):
                progress.say(line)

    def _score(self) -> list[tuple[Tensor, Tensor]]:
        """Scores and targets of each scored split."""
        batch_size, precision = self.config.optim.batch_size // self.world.size, self.config.precision
        check_crc = self.config.stream.check_crc
        return [
            (
                score_shards(self.model, shards, self.spec, batch_size, precision, self.world, check_crc),
                torch.from_numpy(shards.targets(np.arange(len(shards)))),
            )
            for _, shards in self.scored
        ]

    def _agree(self, stop: int, save: int) -> tuple[int, int]:
        """Give the greatest of what the ranks ask for: a signal to stop at, and whether to save."""
        if self.world.size == 1:
            return stop, save
        asked = torch.tensor([stop, save], device=self.world.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return int(asked[0]), int(asked[1])

    def _save_last(self) -> None:
        if not self.world.is_first:
            return
        extra = {
            "state": self.state.to_plain(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "precision": self.precision,
            "draws": self.plan.identity,
            "scored": {name: shards.fingerprint for name, shards in self.scored},
            "log_size": self.folder.log_size(),
        }
        keep_copy(self.folder.last, self.folder.previous)
        save_checkpoint(self.folder.last, self.card, self.model.state_dict(), self.state.epoch - 1, extra)

    def _resume(self) -> None:
        """Go on from last.pt on every rank; raises ValueError where it belongs to other draws."""
        checkpoint = self.folder.load_last(self.world.is_first)
        if checkpoint is None:
            return
        if not isinstance(checkpoint.extra["draws"], dict):
            raise ValueError(f"{self.folder.last} is of an older version. Use another --run.")
        if difference := explain_difference(checkpoint.extra["draws"], self.plan.identity):
            raise ValueError(
                f"{self.folder.last} was trained on other draws ({difference}). Pass the same data and "
                "settings, or another --run."
            )
        scored = {name: shards.fingerprint for name, shards in self.scored}
        if checkpoint.extra["scored"] != scored:
            raise ValueError(
                f"{self.folder.last} was scored on other splits than {', '.join(scored)} are now."
            )
        if checkpoint.extra["precision"] != self.precision:
            before = checkpoint.extra["precision"]
            raise ValueError(
                f"{self.folder.last} was trained in {before}; pass --precision {before} to go on."
            )
        self.model.load_state_dict(checkpoint.state)
        self.optimizer.load_state_dict(checkpoint.extra["optimizer"])
        if checkpoint.extra["scaler"] and self.scaler.is_enabled():  # --on-nan may have changed
            self.scaler.load_state_dict(checkpoint.extra["scaler"])
        self.state = TrainState.from_plain(checkpoint.extra["state"])
        if self.world.is_first:
            self.state.loss_sum *= self.world.size
            self.folder.cut_log(checkpoint.extra["log_size"])
            self.folder.write_table("result.csv", self.state.rows)
        else:
            self.state.loss_sum, self.state.skipped = 0.0, 0

    def _say_start(self, progress: Progress) -> None:
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        config, state = self.config, self.state
        progress.say(
            f"{config.model.name}, {num_parameters:,} parameters, {len(self.train.classes)} classes; "
            f"{len(self.train)} clips, {self.plan.num_steps(state.epoch)} steps an epoch; "
            f"{self.world.size} × {self.world.device.type}, {self.precision}, compile {config.compile}; "
            f"run {config.run}"
        )
        if state.epoch > 1 or state.step:
            done = state.epoch > config.optim.epochs
            progress.say(
                "already trained" if done else f"going on at epoch {state.epoch}, step {state.step + 1}"
            )


def _note_signal(trainer: Trainer, number: int, _: FrameType | None) -> None:
    trainer.stop_signal = number
