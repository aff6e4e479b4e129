"""Training state: where a run is, and all that it has summed up; what last.pt holds beside the weights."""

from dataclasses import asdict, dataclass, field
from typing import Any

from psla_fast.metrics import Metrics
from psla_fast.train.averaging import RunningMean

NUMBERS = ("epoch", "step", "loss_sum", "updates", "skipped")


@dataclass
class Best:
    """The best epoch by validation mAP, with the metrics of each split; epoch 0: none yet."""

    epoch: int = 0
    metrics: list[Metrics] = field(default_factory=list)


@dataclass
class TrainState:
    """Position and sums of a run. `epoch` counts from 1; `step` is the next one of that epoch, from 0.

    updates counts the optimiser's steps of the run; skipped the unreadable clips of the epoch so far.
    """

    epoch: int = 1
    step: int = 0
    loss_sum: float = 0.0
    updates: int = 0
    skipped: int = 0
    rows: list[list[float]] = field(default_factory=list)
    best: Best = field(default_factory=Best)
    weights: RunningMean = field(default_factory=RunningMean)
    scores: RunningMean = field(default_factory=RunningMean)

    def to_plain(self) -> dict[str, Any]:
        """Turn into tensors and plain values."""
        return {
            **{name: getattr(self, name) for name in NUMBERS},
            "rows": [list(row) for row in self.rows],
            "best": {"epoch": self.best.epoch, "metrics": [asdict(metrics) for metrics in self.best.metrics]},
            "weights": self.weights.state_dict(),
            "scores": self.scores.state_dict(),
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "TrainState":
        """Turn back."""
        best = Best(plain["best"]["epoch"], [Metrics(**metrics) for metrics in plain["best"]["metrics"]])
        state = cls(**{name: plain[name] for name in NUMBERS}, rows=plain["rows"], best=best)
        state.weights.load_state_dict(plain["weights"])
        state.scores.load_state_dict(plain["scores"])
        return state
