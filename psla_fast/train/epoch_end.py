"""The end of an epoch: scores of the splits -> result files, averages, the best epoch so far."""

# N clips, C classes

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from psla_fast.checkpoint import Card, save_checkpoint
from psla_fast.distributed import World, broadcast_model, sum_over_ranks
from psla_fast.evaluate import score_shards
from psla_fast.metrics import compute_metrics
from psla_fast.scores import add_epoch_scores
from psla_fast.shards import Shards
from psla_fast.train.averaging import Ema
from psla_fast.train.config import TrainConfig
from psla_fast.train.losses import compute_loss
from psla_fast.train.results import EpochResult, RunFolder
from psla_fast.train.state import Best, TrainState

Scored = list[tuple[Tensor, Tensor]]  # scores and targets (N, C) of each split


class EpochEnd:
    """Scores the splits on all ranks; the first one keeps the results and writes the run's files."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        card: Card,
        splits: list[tuple[str, Shards]],
        world: World,
        say: Callable[[str], None],
    ) -> None:
        """Take what a run has from its start; `say` prints a line, on the first rank."""
        self.config, self.folder, self.card, self.world, self.say = config, folder, card, world, say
        self.splits = splits
        self.names = [name for name, _ in splits]

    def score(self, model: nn.Module, check_stop: Callable[[], None]) -> Scored:
        """Score each split with the first rank's weights and statistics; the same on every rank.

        `check_stop` may raise; it is called between batches, with several ranks between splits.
        """
        broadcast_model(model, self.world)  # each rank has its own BatchNorm statistics
        config, scored = self.config, []
        batch_size = config.optim.batch_size // self.world.size
        for _, shards in self.splits:
            check_stop()
            scores = score_shards(
                model,
                shards,
                self.card.input,
                batch_size,
                config.precision,
                self.world,
                config.stream.check_crc,
                check_stop if self.world.size == 1 else None,
            )
            scored.append((scores, torch.from_numpy(shards.targets(np.arange(len(shards))))))
        return scored

    def finish_epoch(
        self, state: TrainState, model: nn.Module, scored: Scored, train_loss: float, lr: float
    ) -> None:
        """Take an epoch's scores into averages and files, on the first rank only; last.pt is not written."""
        epoch = state.epoch
        metrics = [compute_metrics(scores, targets) for scores, targets in scored]
        state.scores.add({name: scores for name, (scores, _) in zip(self.names, scored, strict=True)})
        mean = state.scores.mean()
        ensemble = [
            compute_metrics(mean[name], targets)
            for name, (_, targets) in zip(self.names, scored, strict=True)
        ]
        val_loss = float(compute_loss(*scored[0], self.config.loss))
        result = EpochResult(metrics[0], ensemble[0], train_loss, val_loss, lr)
        state.rows.append(result.row())
        weights = model.state_dict()
        if self.config.wa.start <= epoch <= self.config.wa.end:
            state.weights.add(weights)
            if self.config.wa.upstream and state.weights.count == 1:
                state.weights.add(weights)
        checkpoints = self.folder.checkpoints
        is_best = not state.best.epoch or metrics[0].mean_ap > state.best.metrics[0].mean_ap
        if is_best:
            state.best = Best(epoch, metrics)
            save_checkpoint(checkpoints / "best.pt", self.card, weights, epoch)
            self.folder.write_summary("best_single_result.csv", metrics)
        if self.config.keep_epochs:
            save_checkpoint(checkpoints / f"epoch_{epoch:02d}.pt", self.card, weights, epoch)
        for (name, shards), (scores, targets) in zip(self.splits, scored, strict=True):
            path = self.folder.scores / f"{name}.h5"
            add_epoch_scores(path, epoch, shards.keys, scores.numpy(), mean[name].numpy(), targets.numpy())
        self.folder.write_summary("ensemble_result.csv", ensemble)
        self.folder.write_table("result.csv", state.rows)
        self.folder.log_epoch(epoch, result, self.names, metrics, ensemble)
        self.say(
            f"epoch {epoch}/{self.config.optim.epochs} done  train loss {train_loss:.4f}  "
            f"{self.names[0]} loss {val_loss:.4f}  {metrics[0]}{' (best)' if is_best else ''}  "
            f"ensemble mAP {ensemble[0].mean_ap:.6f}"
        )

    def finish_run(
        self,
        state: TrainState,
        model: nn.Module,
        ema: Ema | None,
        settle: Callable[[], None],
        check_stop: Callable[[], None],
    ) -> None:
        """Score the averaged weights, write wa.pt and by choice ema.pt, and say how the run ended.

        `settle` is called on every rank once the first one's model holds averaged weights; it may change
        their BatchNorm statistics. Only the first rank has an `ema`.
        """
        epochs, first = self.config.optim.epochs, self.world.is_first
        averages = []
        averaged = torch.tensor(state.weights.count, device=self.world.device)
        if int(sum_over_ranks(averaged, self.world)):
            averages.append(("wa", state.weights.mean() if first else {}, min(self.config.wa.end, epochs)))
        else:
            self.say("no epoch lies in wa.start … wa.end: no weight average was made")
        if self.config.wa.ema_decay:
            averages.append(("ema", ema.state_dict() if ema else {}, epochs))
        for name, weights, epoch in averages:
            if first:
                model.load_state_dict(weights)
            settle()
            scored = self.score(model, check_stop)
            if first:
                save_checkpoint(self.folder.checkpoints / f"{name}.pt", self.card, model.state_dict(), epoch)
                metrics = [compute_metrics(scores, targets) for scores, targets in scored]
                self.folder.write_summary(f"{name}_result.csv", metrics)
        if first:
            for line in self.folder.closing_lines(self.names, state.best.epoch):
                self.say(line)
