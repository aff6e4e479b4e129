"""TrainConfig: all that a run depends on; each part is a small config of the module that reads it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from psla_fast.augment import AugmentConfig
from psla_fast.distributed import DeviceName
from psla_fast.evaluate import Precision
from psla_fast.models import ModelConfig
from psla_fast.sampling import SamplingConfig
from psla_fast.stream import StreamConfig
from psla_fast.train.averaging import AverageConfig
from psla_fast.train.compiling import CompileMode
from psla_fast.train.distillation import DistillConfig
from psla_fast.train.losses import LossConfig
from psla_fast.train.optim import OptimConfig


@dataclass(frozen=True)
class DataConfig:
    """Where the packed splits are."""

    shards: str
    """Folder that pack wrote: classes.csv and a folder a split; or its URL (http://, https://, s3://), with
    --stream.kind webdataset."""
    train: str = "train"
    """Split that is trained on."""
    val: str = "val"
    """Split that is scored after each epoch and chooses the best one."""
    eval: str = "eval"
    """Split that is only reported; a set without such a folder reports val alone."""
    labels: str = ""
    """Label table (CSV key,mids, or a PSLA datafile) whose labels replace those of the training split; none:
    the split's own."""


@dataclass(frozen=True)
class InputConfig:
    """What the model hears of a clip."""

    clip_frames: int = 1056
    """Frames of a clip (of 10 ms, unless packed otherwise): longer clips are cut, shorter ones padded."""
    pad_value: float | Literal["mean"] = 0.0
    """Log-mel that pads, before normalising; mean: the one that normalises to 0. PSLA pads with 0, about one
    std above its mean."""
    statistics: Literal["psla", "shards"] = "psla"
    """Normalise by PSLA's mean and std (-4.6476, 4.5699) or by those measured on the packed training
    split."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 1 <= self.clip_frames <= 1_000_000:
            raise ValueError(f"input.clip_frames is {self.clip_frames}; give 1 to 1,000,000.")


@dataclass(frozen=True)
class TrainConfig:
    """Train a tagger: psla_fast.train RECIPE.toml… [--flag value]; later recipes and flags win."""

    data: DataConfig
    run: Path
    """Folder of the run; a run that was stopped there goes on."""
    input: InputConfig = field(default_factory=InputConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    wa: AverageConfig = field(default_factory=AverageConfig)
    strict: bool = True
    """False: --model.pretrained PATH may have other classes or another head; its backbone is taken, the head
    is new, and what wasn't used is said."""
    seed: int = 0
    """Seeds the weights, the draws and the augmentation."""
    precision: Precision = "auto"
    """Autocast; auto: bf16 on devices that compute in it, else fp16 with a scaler on GPUs, fp32 on CPUs."""
    compile: CompileMode = "none"
    """torch.compile of model and augmentation: none, default, max (max-autotune), or graphs (default with
    CUDA graphs, for batches so small that launching kernels takes the time)."""
    channels_last: bool = True
    """Keep activations channels-last in memory, which convolutions want."""
    sync_batch_norm: bool = False
    """Take BatchNorm's statistics over all ranks' clips, as if one had them all; False: each over its own."""
    device: DeviceName = "auto"
    """auto takes the GPU where there is one."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from RUN/checkpoints/last.pt where it is; never: refuse a folder that holds a run."""
    keep_epochs: bool = True
    """Keep a checkpoint of every epoch (epoch_NN.pt); averages and ensembles don't need them."""
    checkpoint_minutes: float = 10.0
    """Minutes between writes of last.pt within an epoch; it is also written after each and on SIGTERM,
    SIGUSR1."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What a loss that isn't finite does: stop the run, or have its step left out. Either names the clips."""
    log_every_steps: int = 20
    """Steps between progress lines and rows of metrics.jsonl; the only steps that wait for the device."""
    profile: bool = False
    """Profile a few steps of the first epoch, a little into it: a trace and a summary in RUN/profile."""
    wandb: str = ""
    """Project of Weights & Biases that gets the curves, too; none: they stay in the run's folder."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.log_every_steps < 1 or self.checkpoint_minutes < 0 or self.seed < 0:
            raise ValueError(
                f"log_every_steps is {self.log_every_steps}, checkpoint_minutes {self.checkpoint_minutes}, "
                f"seed {self.seed}; give 1 or more, 0 or more, and 0 or more."
            )
        if self.compile == "graphs" and self.optim.accumulate > 1:
            raise ValueError(
                "compile graphs reuses the memory of gradients, so optim.accumulate can't add to them. Use "
                "--compile default."
            )
        if self.distill.scores and self.loss.kind == "focal":
            raise ValueError(
                "loss.kind focal isn't linear in the targets, so a teacher's can't be blended into them. Use "
                "--loss.kind bce, or leave --distill.scores out."
            )
        if self.model.mask_padding and self.augment.roll_frames:
            raise ValueError(
                "augment.roll_frames rolls sound into the padding that model.mask_padding leaves out. Set "
                "one of them off."
            )
