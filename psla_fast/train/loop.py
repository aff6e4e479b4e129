"""The training loop: draws -> batches -> steps; after each epoch scores and files; any signal stops it."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from psla_fast.augment import InputSpec
from psla_fast.checkpoint import Card, save_checkpoint
from psla_fast.distributed import World, broadcast_model, find_difference, sum_over_ranks
from psla_fast.fbank import PSLA_MEAN, PSLA_STD
from psla_fast.files import keep_copy
from psla_fast.models import build_model, check_input, use_channels_last
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
from psla_fast.train.averaging import Ema
from psla_fast.train.batch_norm import find_batch_norms, recompute_statistics
from psla_fast.train.compiling import count_graphs
from psla_fast.train.config import TrainConfig
from psla_fast.train.curves import check_wandb, open_curves
from psla_fast.train.epoch_end import EpochEnd
from psla_fast.train.finite import describe_batch
from psla_fast.train.optim import compute_lr
from psla_fast.train.pretrained import load_pretrained
from psla_fast.train.profiling import StepProfiler
from psla_fast.train.progress import Progress
from psla_fast.train.results import RunFolder
from psla_fast.train.signals import Stopped, StopSignals, name_signal
from psla_fast.train.splits import open_splits
from psla_fast.train.state import TrainState
from psla_fast.train.step import StepPlace, TrainStep
from psla_fast.train.sync_batch_norm import synchronise_batch_norm

StreamOpener = Callable[[Shards, StreamConfig, Sequence[BatchShape], torch.device], Stream]


class Trainer:
    """One run on one rank."""

    def __init__(self, config: TrainConfig, world: World, streams: StreamOpener = open_stream) -> None:
        """Open the data, build model and optimiser, and go on from last.pt where it is.

        `streams` opens what batches come from; benchmarks pass others.
        """
        self.config, self.world, self.streams = config, world, streams
        check_wandb(config.wandb)
        self.folder = RunFolder(config.run)
        self.train, self.scored = open_splits(config)
        statistics = (
            (PSLA_MEAN, PSLA_STD) if config.input.statistics == "psla" else (self.train.mean, self.train.std)
        )
        num_mels = self.train.fbank_config.num_mels
        pad_value = statistics[0] if config.input.pad_value == "mean" else config.input.pad_value
        spec = InputSpec(config.input.clip_frames, num_mels, pad_value, *statistics, config.stream.buckets)
        self.card = Card(config.model, self.train.classes, spec, self.train.fbank_config)
        self.draws = PlanConfig(
            config.sampling, config.stream, config.seed, config.optim.batch_size, config.input.clip_frames
        )
        self.plan = DrawPlan(self.train, self.draws, world.rank, world.size)
        # of the first epoch's steps: with buckets of equal frames others may have a few more or less
        self.total_updates = config.optim.epochs * -(-self.plan.num_steps(1) // config.optim.accumulate)
        if config.optim.schedule != "step" and config.optim.warmup_steps >= self.total_updates - 1:
            raise ValueError(
                f"optim.warmup_steps is {config.optim.warmup_steps}, the run has {self.total_updates} "
                "updates. Lower it, or train for more epochs."
            )
        torch.manual_seed(config.seed)
        start = replace(config.model, pretrained="none") if self.folder.goes_on else config.model
        self.progress = Progress(config.optim.epochs, world)
        path = "" if start.pretrained in ("none", "imagenet") else start.pretrained
        start = replace(start, pretrained="none") if path else start
        self.model = build_model(start, len(self.train.classes), num_mels).to(world.device)
        if path:
            load_pretrained(self.model, Path(path), self.card, config.strict, self.progress.say)
        if config.optim.freeze_epochs and config.model.pretrained == "none":
            self.progress.say("note: the backbone that is frozen at first starts from nothing")
        check_input(self.model, num_mels, spec.buckets or (spec.clip_frames,), len(self.train.classes))
        if config.model.mask_padding and not getattr(self.model, "mask_padding", False):
            raise ValueError(f"{config.model.name} can't mask padding. Leave --model.mask-padding off.")
        if config.channels_last:
            use_channels_last(self.model)
        if config.sync_batch_norm:
            self.model = synchronise_batch_norm(self.model, world)
        if config.compile == "graphs" and world.size > 1:
            raise ValueError(
                "compile graphs is for one rank; torch can't capture DDP's. Use --compile default."
            )
        self.step = TrainStep(config, self.model, spec, self.train.storage, world)
        self.state = TrainState()
        self.ema = Ema(self.model, config.wa.ema_decay) if config.wa.ema_decay and world.is_first else None
        self.signals, self.num_graphs = StopSignals(world), count_graphs()
        self.profiler = StepProfiler(config, world, self.progress.say)
        self.end = EpochEnd(config, self.folder, self.card, self.scored, world, self.progress.say)
        if world.is_first:
            self.folder.start(config)
        self._resume()
        place = [self.state.epoch, self.state.step, self.state.updates]
        if different := find_difference(place, world):
            rank, (epoch, step, _) = different
            raise ValueError(
                f"rank {rank} would go on at epoch {epoch}, step {step + 1}, rank 0 elsewhere. Pass a --run "
                "on a disk that all machines share."
            )
        if world.is_first:
            self.folder.curves = open_curves(config, self.state.epoch, self.state.updates)

    def run(self) -> None:
        """Train the epochs that are left and write the results; raises Stopped on SIGTERM or SIGUSR1."""
        config, state = self.config, self.state
        self._say_start()
        self.signals.listen()
        stream = self.streams(self.train, config.stream, self.plan.shapes, self.world.device)
        try:
            for epoch in range(state.epoch, config.optim.epochs + 1):
                self.progress.start_epoch(epoch, self.plan.batch_sizes(epoch), state.step)
                batches = self.progress.timed(stream.batches(self.plan.batches(epoch, state.step)))
                num_steps = self.plan.num_steps(epoch) - state.step
                loss = self.train_epoch(epoch, self.profiler.watch(batches, num_steps))
                self._finish_epoch(epoch, loss)
            settle = partial(self._settle_batch_norm, stream)
            self.end.finish_run(state, self.model, self.ema, settle, self._check_stop)
        finally:
            stream.close()
            for shards in (self.train, *(shards for _, shards in self.scored)):
                shards.close()
            self.profiler.close()
            self.progress.close()
            self.folder.curves.close()

    def train_epoch(self, epoch: int, batches: Iterator[Batch]) -> float:
        """Run the epoch's steps from `state.step` on; returns the mean loss over all its clips."""
        config, state, num_steps = self.config, self.state, self.plan.num_steps(epoch)
        self.step.start_epoch(epoch)
        skipped, accumulate = state.skipped, config.optim.accumulate
        sizes = self.plan.batch_sizes(epoch)
        shares = sizes / sizes.mean()  # with length buckets a batch may hold more clips than another
        loss_sum = torch.tensor(state.loss_sum, device=self.world.device, dtype=torch.float64)
        saved, due = time.monotonic(), False
        for step, batch in enumerate(batches, start=state.step):
            lr = compute_lr(config.optim, epoch, state.updates, self.total_updates)
            begun = step // accumulate * accumulate  # the update's first batch
            is_last = step + 1 == min(begun + accumulate, num_steps)
            loss = self._step(epoch, step, lr, batch, min(accumulate, num_steps - begun), is_last)
            loss_sum += loss * float(shares[step])
            state.updates += is_last
            if is_last and self.ema:
                self.ema.update(state.updates)
            if batch.skipped and not skipped:
                text = f"rank {self.world.rank} skipped: {batch.skipped[0]}"
                self.progress.say(text) if self.world.is_first else print(text, flush=True)
            skipped += len(batch.skipped)
            logs = (step + 1) % config.log_every_steps == 0 or step + 1 == num_steps
            if logs:
                self._check_finite(epoch)
                self._say_compiled(epoch, step)
                row = self.progress.report(epoch, step + 1, self._mean_over_ranks(loss), lr)
                if self.world.is_first:
                    self.folder.log_step(row, state.updates + (not is_last))
            # GPUs wait for each other at log steps only, or at the end of the update that such a one is in
            due |= logs or self.world.size == 1 or self.world.device.type == "cpu"
            if due and is_last:
                due = False
                stop, save = self.signals.agree(time.monotonic() - saved > 60 * config.checkpoint_minutes)
                if stop or save:
                    state.step, state.loss_sum = step + 1, self._mean_over_ranks(loss_sum)
                    state.skipped = self._sum_over_ranks(skipped)
                    self._check_finite(epoch)
                    self._save_last()
                    saved = time.monotonic()
                if stop:
                    raise Stopped(name_signal(stop))
        state.step, state.loss_sum = num_steps, self._mean_over_ranks(loss_sum)
        state.skipped = self._sum_over_ranks(skipped)
        return state.loss_sum / num_steps

    def _step(self, epoch: int, step: int, lr: float, batch: Batch, parts: int, updates: bool) -> Tensor:
        return self.step(batch, StepPlace(epoch, step, lr, parts, updates))

    def _finish_epoch(self, epoch: int, train_loss: float) -> None:
        """Score the splits; the first rank writes the files, last.pt as the last of them."""
        state = self.state
        scored = self.end.score(self.model, self._save_and_stop)
        if self.world.is_first:
            lr = compute_lr(self.config.optim, epoch, state.updates - 1, self.total_updates)
            self.end.finish_epoch(state, self.model, scored, train_loss, lr)
        if state.skipped:
            self.progress.say(f"epoch {epoch}: {state.skipped} clips couldn't be read, other draws stood in")
            if self.world.is_first:
                self.folder.log({"epoch": epoch, "skipped": state.skipped})
        state.epoch, state.step, state.loss_sum, state.skipped = epoch + 1, 0, 0.0, 0
        self._save_last()

    def _settle_batch_norm(self, stream: Stream) -> None:
        """By choice, measure BatchNorm's statistics anew for the weights that the first rank's model has."""
        num_clips, model = self.config.wa.batch_norm_clips, self.model
        if not num_clips:
            return
        if not find_batch_norms(model):
            self.progress.say(f"{self.config.model.name} has no BatchNorm: wa.batch_norm_clips does nothing")
            return
        broadcast_model(model, self.world)
        inputs = self._inputs_beyond(stream, num_clips)
        if left_out := recompute_statistics(model, inputs, self.config.precision, self.world):
            self.progress.say(f"{left_out} batches weren't finite; BatchNorm's statistics are of the others")

    def _inputs_beyond(self, stream: Stream, num_clips: int) -> Iterator[tuple[Tensor, ...]]:
        """Give the model's arguments for batches of so many clips or a few more, of draws after the run's."""
        for epoch in count(self.config.optim.epochs + 1):
            sizes = self.plan.batch_sizes(epoch)
            num_steps = int(np.searchsorted(sizes.cumsum(), num_clips)) + 1
            for step, batch in enumerate(stream.batches(islice(self.plan.batches(epoch), num_steps))):
                self._check_stop()
                yield self.step.prepare(batch, epoch, step)[0]
            num_clips -= int(sizes[:num_steps].sum())
            if num_clips <= 0:
                return

    def _check_stop(self) -> None:
        """Raise Stopped where a signal has come; every rank must call it."""
        stop, _ = self.signals.agree()
        if stop:
            raise Stopped(name_signal(stop))

    def _save_and_stop(self) -> None:
        """While an epoch is scored: its steps are done, so the run goes on with the scoring."""
        try:
            self._check_stop()
        except Stopped:
            self._save_last()
            raise

    def _say_compiled(self, epoch: int, step: int) -> None:
        """Say where the run stopped to compile; after each shape's first batch it shouldn't again."""
        num_graphs = count_graphs()
        if num_graphs > self.num_graphs:
            self.progress.say(f"{num_graphs} graphs compiled by epoch {epoch}, step {step + 1}")
        self.num_graphs = num_graphs

    def _mean_over_ranks(self, value: Tensor) -> float:
        return float(sum_over_ranks(value.clone(), self.world)) / self.world.size

    def _sum_over_ranks(self, count: int) -> int:
        return int(sum_over_ranks(torch.tensor(count, device=self.world.device), self.world))

    def _check_finite(self, epoch: int) -> None:
        """Stop at a loss that isn't finite, or say which steps were left out; waits for the device."""
        step, count = self.step.guard.take()
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
        self.progress.say(f"{where}; its clips are {clips}. {count} such losses are left out.")
        if self.world.is_first:
            self.folder.log({"epoch": epoch, "first_step": step + 1, "not_finite": count, "clips": clips})

    def _save_last(self) -> None:
        if not self.world.is_first:
            return
        extra = {
            "state": self.state.to_plain(),
            "optimizer": self.step.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "precision": self.step.precision,
            "draws": self.plan.identity,
            "scored": {name: shards.fingerprint for name, shards in self.scored},
            "ema": self.ema.state_dict() if self.ema else {},
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
        if checkpoint.extra["precision"] != self.step.precision:
            before = checkpoint.extra["precision"]
            raise ValueError(
                f"{self.folder.last} was trained in {before}; pass --precision {before} to go on."
            )
        self.model.load_state_dict(checkpoint.state)
        try:
            self.step.optimizer.load_state_dict(checkpoint.extra["optimizer"])
        except ValueError as error:
            raise ValueError(f"{self.folder.last}: {error}. Use another --run.") from error
        if checkpoint.extra["scaler"] and self.step.scaler.is_enabled():  # --on-nan may have changed
            self.step.scaler.load_state_dict(checkpoint.extra["scaler"])
        self.state = TrainState.from_plain(checkpoint.extra["state"])
        if self.ema:
            self.ema.load_state_dict(checkpoint.extra["ema"])
        if self.world.is_first:
            self.state.loss_sum *= self.world.size
            self.folder.cut_log(checkpoint.extra["log_size"])
            self.folder.write_table("result.csv", self.state.rows)
        else:
            self.state.loss_sum, self.state.skipped = 0.0, 0

    def _say_start(self) -> None:
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        config, state = self.config, self.state
        self.progress.say(
            f"{config.model.name}, {num_parameters:,} parameters, {len(self.train.classes)} classes; "
            f"{len(self.train)} clips, {self.plan.num_steps(state.epoch)} steps an epoch; "
            f"{self.world.size} × {self.world.device.type}, {self.step.precision}, compile {config.compile}; "
            f"run {config.run}"
        )
        if state.epoch > 1 or state.step:
            done = state.epoch > config.optim.epochs
            self.progress.say(
                "already trained" if done else f"going on at epoch {state.epoch}, step {state.step + 1}"
            )
