"""Results: the files of a run folder, PSLA's names and columns among them, each written atomically."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import tomli_w

from psla_fast.checkpoint import Checkpoint, load_checkpoint
from psla_fast.files import keep_copy, naming, write_atomically
from psla_fast.metrics import Metrics
from psla_fast.recipe import flat_config, read_recipe, resolved
from psla_fast.train.config import TrainConfig
from psla_fast.train.curves import Curves

# what may differ when a run goes on: how fast it runs, not what it computes
FREE_KEYS: tuple[str, ...] = (
    "run",
    "resume",
    "data.shards",
    "device",
    "stream.",
    "compile",
    "channels_last",
    "keep_epochs",
)
FREE_KEYS += ("checkpoint_minutes", "log_every_steps", "on_nan", "profile", "wandb")


@dataclass(frozen=True)
class EpochResult:
    """What one epoch gives: a row of result.csv."""

    val: Metrics
    ensemble: Metrics
    train_loss: float
    val_loss: float
    lr: float

    def row(self) -> list[float]:
        """Give PSLA's ten columns: mAP, mAUC, precision, recall, d', losses, ensemble mAP and mAUC, lr."""
        val = self.val
        measured = [val.mean_ap, val.mean_auc, val.mean_precision, val.mean_recall, val.d_prime]
        return [
            *measured,
            self.train_loss,
            self.val_loss,
            self.ensemble.mean_ap,
            self.ensemble.mean_auc,
            self.lr,
        ]


class RunFolder:
    """The files of one run; only the first rank makes one."""

    def __init__(self, path: Path) -> None:
        """Name the folder; `start` makes it."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.scores = path / "scores"
        self.curves = Curves(path)

    @property
    def last(self) -> Path:
        """The checkpoint that a run goes on from."""
        return self.checkpoints / "last.pt"

    @property
    def previous(self) -> Path:
        """The last.pt before it, for when that is damaged."""
        return self.checkpoints / "previous.pt"

    @property
    def goes_on(self) -> bool:
        """Tell whether a run was stopped here."""
        return self.last.is_file() or self.previous.is_file()

    def load_last(self, says: bool) -> Checkpoint | None:
        """Load last.pt, or where it is damaged previous.pt, with a warning that one rank `says`.

        That rank puts previous.pt in its place as well, since the next save will make last.pt previous.pt.
        None where there is neither; raises ValueError where none can be read.
        """
        problem: ValueError | None = None
        for path in (self.last, self.previous):
            if path.is_file():
                try:
                    checkpoint = load_checkpoint(path)
                    if "state" not in checkpoint.extra:
                        raise ValueError(f"{path} holds a model alone, not a run. Use another --run.")
                except ValueError as error:
                    problem = problem or error
                    continue
                if problem and says:
                    print(f"warning: {problem} Going on from {path}, written before it.", flush=True)
                    keep_copy(self.previous, self.last)
                return checkpoint
        if problem:
            raise problem
        return None

    def start(self, config: TrainConfig) -> None:
        """Write config.toml, or raise ValueError where the run that goes on has another one."""
        if config.resume == "never" and self.goes_on:
            raise ValueError(
                f"{self.path} holds a run already. Use --resume auto to go on, or another --run."
            )
        written = self.path / "config.toml"
        if written.is_file() and self.goes_on:
            before, now = read_recipe(str(written)), flat_config(config)
            differing = [key for key in now if before.get(key) != now[key] and not key.startswith(FREE_KEYS)]
            if differing:
                key = differing[0]
                if key not in before:
                    raise ValueError(f"{self.path} was begun by an older version. Use another --run.")
                raise ValueError(
                    f"{self.path} was begun with {key} = {before.get(key)!r}, now it is {now[key]!r} "
                    f"({len(differing)} keys differ). Use the same settings, or another --run."
                )
            return
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.scores.mkdir(exist_ok=True)
        self.cut_log(0)  # of a run that was killed before its first checkpoint
        write_atomically(written, tomli_w.dumps(resolved(config)).encode())

    def write_table(self, name: str, rows: list[list[float]]) -> None:
        """Write numbers as PSLA's CSV files have them: no header, %.18e."""
        text = "".join(",".join(f"{value:.18e}" for value in row) + "\n" for row in rows)
        write_atomically(self.path / name, text.encode())

    def write_summary(self, name: str, splits: list[Metrics]) -> None:
        """Write best_single_, wa_, ema_ or ensemble_result.csv: mAP, AUC of val, then eval, one a line."""
        self.write_table(
            name, [[value] for metrics in splits for value in (metrics.mean_ap, metrics.mean_auc)]
        )

    def log(self, row: dict[str, object]) -> None:
        """Append a row to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        with naming(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(_json_values(row), allow_nan=False) + "\n")

    def log_step(self, row: dict[str, object], update: int) -> None:
        """Log a step's row to metrics.jsonl and the curves; `update` is the one its batch is part of."""
        self.log(row)
        self.curves.add_step(row, update)

    def log_epoch(
        self,
        epoch: int,
        result: EpochResult,
        names: list[str],
        single: list[Metrics],
        ensemble: list[Metrics],
    ) -> None:
        """Log an epoch's figures to metrics.jsonl and the curves; `names` are the scored splits."""
        row: dict[str, object] = {"train_loss": result.train_loss, "val_loss": result.val_loss}
        for name, alone, together in zip(names, single, ensemble, strict=True):
            row.update({f"{name}/{key}": value for key, value in asdict(alone).items()})
            row.update(
                {f"{name}_ensemble/mean_ap": together.mean_ap, f"{name}_ensemble/mean_auc": together.mean_auc}
            )
        self.log({"epoch": epoch, **row, "lr": result.lr})
        self.curves.add_epoch(row, epoch)

    def closing_lines(self, names: list[str], best_epoch: int) -> list[str]:
        """Say what the result files hold, and where they are."""
        lines = []
        for name, text in (
            ("best_single_result.csv", f"best epoch ({best_epoch})"),
            ("wa_result.csv", "weights averaged"),
            ("ema_result.csv", "weights' EMA"),
            ("ensemble_result.csv", "checkpoints ensembled"),
        ):
            if (self.path / name).is_file():
                values = [float(line) for line in (self.path / name).read_text().split()]
                figures = "  ".join(
                    f"{split} mAP {mean_ap:.4f} AUC {mean_auc:.4f}"
                    for split, mean_ap, mean_auc in zip(names, values[::2], values[1::2], strict=True)
                )
                lines.append(f"{text:<22} {figures}")
        return [*lines, f"results, checkpoints and scores are in {self.path}"]

    def log_size(self) -> int:
        """Give the size of metrics.jsonl in bytes, to cut it there when the run goes on."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.is_file() else 0

    def cut_log(self, size: int) -> None:
        """Drop the rows of steps that will be repeated."""
        path = self.path / "metrics.jsonl"
        if path.is_file() and path.stat().st_size > size:
            with open(path, "r+b") as file:
                file.truncate(size)


def _json_values(row: dict[str, object]) -> dict[str, object]:
    """Null for what JSON has no number for: d' is infinite where the AUC is 1."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
