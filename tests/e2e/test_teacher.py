"""A student that learns from a teacher's scores, from the teacher's own training to a resume."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy

from psla_fast.augment import StoredBatch, augment, draw_uniforms
from psla_fast.cli import main
from psla_fast.distributed import World
from psla_fast.models import build_model
from psla_fast.scores import read_scores, write_scores
from psla_fast.shards import open_shards
from psla_fast.stream import open_stream
from psla_fast.train.loop import Trainer
from tests.tiny import step_rows, tiny_config, train_tiny

CPU = torch.device("cpu")
SHORT = ("--optim.epochs", "1", "--wa.start", "1", "--wa.end", "1", "--model.drop-connect", "0")


@pytest.fixture(scope="module")
def teacher(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scores that a trained net's checkpoint gives the training split, as a user writes them."""
    folder = tmp_path_factory.mktemp("teacher")
    train_tiny(tiny_config(packed, folder / "run", "--seed", "5"))
    checkpoint, out = folder / "run/checkpoints/best.pt", folder / "teacher.h5"
    main(["evaluate", str(checkpoint), str(packed / "train"), "--out", str(out)])
    return out


@pytest.mark.parametrize(
    "stream",
    [
        (),
        ("--stream.kind", "resident"),
        ("--stream.kind", "webdataset"),
        ("--stream.kind", "dali"),
        ("--stream.buckets", "50", "100"),
    ],
)
def test_the_student_s_loss_is_the_one_computed_by_hand(
    packed: Path, tmp_path: Path, teacher: Path, stream: tuple[str, ...]
):
    if "dali" in stream:
        pytest.importorskip("nvidia.dali")
    flags = (*SHORT, *stream, "--distill.scores", str(teacher), "--distill.weight", "0.7")
    config = tiny_config(packed, tmp_path / "run", *flags)
    train_tiny(config)

    trainer = Trainer(tiny_config(packed, tmp_path / "plain", *SHORT, *stream), World(0, 1, CPU))
    torch.manual_seed(config.seed)
    model = build_model(config.model, len(trainer.train.classes))
    plan = next(trainer.plan.batches(1))
    opened = open_stream(trainer.train, config.stream, trainer.plan.shapes, CPU)
    batch = next(iter(opened.batches(iter([plan]))))
    tensors = batch.fbank, batch.num_frames, batch.targets, batch.partner_row, batch.lam
    uniforms = draw_uniforms(config.seed, 1, 0, len(batch.clip_ids))
    x, _ = augment(StoredBatch(*tensors), uniforms, config.augment, trainer.card.input)
    opened.close()
    with open_shards(packed / "train") as shards:
        scores = torch.from_numpy(read_scores(teacher).ordered(shards.keys, "teacher"))
        labels = torch.from_numpy(shards.targets(np.arange(len(shards))))
    blended = 0.3 * labels + 0.7 * scores
    lam = torch.from_numpy(plan.lam)[:, None]
    partners = np.where(plan.partner_ids >= 0, plan.partner_ids, plan.clip_ids)
    wanted = lam * blended[plan.clip_ids] + (1 - lam) * blended[partners]
    scored = model(x).detach()
    loss = float(binary_cross_entropy(scored, wanted))
    assert step_rows(config.run)[0]["loss"] == pytest.approx(loss, rel=1e-5)
    without = lam * labels[plan.clip_ids] + (1 - lam) * labels[partners]
    assert float(binary_cross_entropy(scored, without)) != pytest.approx(loss, rel=1e-4)


def test_validation_is_scored_against_the_labels(packed: Path, tmp_path: Path, teacher: Path):
    train_tiny(tiny_config(packed, tmp_path / "run", *SHORT, "--distill.scores", str(teacher)))
    targets = read_scores(tmp_path / "run/scores/val.h5").targets
    with open_shards(packed / "val") as shards:
        assert np.array_equal(targets, shards.targets(np.arange(len(shards))))


def test_going_on_with_another_teacher_is_refused(packed: Path, tmp_path: Path, teacher: Path):
    scores = Path(shutil.copy(teacher, tmp_path / "t.h5"))
    flags = (*SHORT, "--distill.scores", str(scores))
    config = tiny_config(packed, tmp_path / "run", *flags)
    train_tiny(config)
    train_tiny(config)  # the same one goes on
    with pytest.raises(ValueError, match=r"was begun with distill\.scores = '.*t\.h5', now it is ''"):
        train_tiny(tiny_config(packed, tmp_path / "run", *SHORT))
    with pytest.raises(ValueError, match=r"was begun with distill\.weight = 0\.9, now it is 0\.5"):
        train_tiny(tiny_config(packed, tmp_path / "run", *flags, "--distill.weight", "0.5"))
    read = read_scores(scores)
    write_scores(scores, read.keys, read.scores * 0.99, read.targets)
    with pytest.raises(ValueError, match="trained on other draws .shards: others than before"):
        train_tiny(config)
