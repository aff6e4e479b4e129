"""The command average: files, epochs of a run, BatchNorm anew, greedy soups, and what it refuses."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

import tests.tiny  # noqa: F401 - registers tiny
from psla_fast.augment import LOG_FLOOR
from psla_fast.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from psla_fast.cli import main
from psla_fast.ensemble import Scoring
from psla_fast.evaluate import evaluate_checkpoint
from psla_fast.sampling import SamplingConfig, compute_draws
from psla_fast.shards import open_shards
from psla_fast.soup import GreedySoup, SamplingKind
from tests.taggers import save_model
from tests.tiny import tiny_config, train_tiny

NUM_BATCHES = 7  # what num_batches_tracked of the last checkpoint says
PLAIN = ["--precision", "fp32", "--device", "cpu", "--batch-size", "8"]


def average(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """The lines that the command prints."""
    capsys.readouterr()
    main(["average", *map(str, words)])
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which the command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["average", *map(str, words)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def weights(path: Path) -> dict[str, Tensor]:
    return load_checkpoint(path).state


def measure(path: Path, data: Path) -> float:
    return evaluate_checkpoint(path, data, 8, "fp32", "cpu").metrics.mean_ap


@pytest.fixture(scope="module")
def run(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs, of which 2 to 4 are averaged."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_tiny(tiny_config(packed, folder, "--optim.epochs", "4", "--wa.end", "4"))
    return folder


@pytest.fixture
def nets(packed: Path, tmp_path: Path) -> list[Path]:
    """Two checkpoints of a network with BatchNorm, and clips of 64 frames."""
    with open_shards(packed / "val") as shards:
        classes = shards.classes
    first = save_model(tmp_path / "a.pt", "efficientnet_lite0", 64, classes)
    loaded = load_checkpoint(first)
    torch.manual_seed(1)
    state = {
        name: value * (1 + 0.01 * torch.randn_like(value))
        if value.is_floating_point()
        else value + NUM_BATCHES
        for name, value in loaded.state.items()
    }
    save_checkpoint(tmp_path / "b.pt", loaded.card, state, 2)
    return [first, tmp_path / "b.pt"]


def test_a_range_of_a_run_s_epochs_gives_the_run_s_own_average(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lines = average(capsys, "--run", run, "--epochs", "2-4", "--out", tmp_path / "wa.pt")
    assert lines == [f"averaged 3 checkpoints into {tmp_path / 'wa.pt'}"]
    made, own = load_checkpoint(tmp_path / "wa.pt"), load_checkpoint(run / "checkpoints/wa.pt")
    assert (made.card, made.epoch) == (own.card, own.epoch)
    assert all(torch.equal(made.state[name], value) for name, value in own.state.items())
    lines = average(capsys, "--run", run, "--epochs", "3", "--out", tmp_path / "one.pt")
    assert lines == [f"averaged 1 checkpoint into {tmp_path / 'one.pt'}"]
    one = weights(run / "checkpoints/epoch_03.pt")
    assert all(torch.equal(value, one[name]) for name, value in weights(tmp_path / "one.pt").items())


def test_missing_epochs_are_named_with_those_that_are_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for epoch in (1, 2, 4):
        shutil.copy(run / f"checkpoints/epoch_0{epoch}.pt", tmp_path / "run/checkpoints")
    words = ["--run", tmp_path / "run", "--out", tmp_path / "wa.pt", "--epochs"]
    said = refused(capsys, *words, "2-7")
    assert f"{tmp_path}/run/checkpoints has no checkpoint of epoch 3, 5-7; there is 1-2, 4." in said
    assert "there is none" in refused(capsys, "--run", tmp_path, "--epochs", "1", "--out", tmp_path / "w.pt")
    assert "no checkpoint of epoch 3, 5-20000000000; there is 1-2, 4." in refused(
        capsys, *words, "1-20000000000"
    )
    for epochs in ("3-2", "0-2", "two", "1-2-3"):
        assert f"--epochs is '{epochs}'; give a range such as 31-40" in refused(capsys, *words, epochs)
    assert not (tmp_path / "wa.pt").exists()


def hear(packed: Path, num_clips: int, kind: SamplingKind) -> Iterator[Tensor]:
    """Batches of 8 of the draws that the command takes, as a network of 64 frames hears them."""
    with open_shards(packed / "train") as shards:
        counts = shards.targets(np.arange(len(shards))).sum(0) + 0.01
        share = shards.targets(np.arange(len(shards))) @ (1000 / counts)
        chosen = compute_draws(SamplingConfig(kind, num_clips, 0.0), share.astype(float), 0, 1).clip_ids
        fbanks = [torch.from_numpy(shards.fbank(clip)) for clip in chosen.tolist()]
    for start in range(0, num_clips, 8):
        batch = torch.full((8, 64, 128), -15.94)
        for row, fbank in enumerate(fbanks[start : start + 8]):
            batch[row, : len(fbank)] = fbank[:64].clamp(min=LOG_FLOOR)
        yield (batch + 4.6476) / 4.5699


@pytest.mark.parametrize("kind", ["balanced", "shuffle"])
def test_batch_norm_is_measured_anew_on_training_draws_and_integers_are_the_last_s(
    nets: list[Path], packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: SamplingKind
):
    out = tmp_path / "plain.pt"
    average(capsys, *nets, "--out", out)
    plain = load_checkpoint(out)
    counts = {name: value for name, value in plain.state.items() if name.endswith("num_batches_tracked")}
    assert counts
    assert all(value == NUM_BATCHES for value in counts.values())
    anew = ["--batch-norm-clips", 30, "--sampling", kind, "--shards"]  # a fourth batch isn't filled
    lines = average(capsys, *nets, "--out", tmp_path / "1.pt", *anew, packed, *PLAIN)
    assert lines[-1] == f"BatchNorm's statistics are of 24 {kind} draws of {packed / 'train'}"
    average(capsys, *nets, "--out", tmp_path / "2.pt", *anew, packed / "train", *PLAIN)
    first, second = weights(tmp_path / "1.pt"), weights(tmp_path / "2.pt")
    card = replace(plain.card, model=replace(plain.card.model, drop_connect=0.0))
    model = Checkpoint(card, plain.state, 0, {}).build()
    update_bn(islice(hear(packed, 30, kind), 3), model)
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], value, rtol=1e-3, atol=1e-4), name
        if name.endswith("running_var"):
            assert not torch.allclose(value, plain.state[name], rtol=0.05), name


def test_a_soup_is_never_below_its_best_member_on_validation(
    run: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    members = [run / f"checkpoints/epoch_0{number}.pt" for number in (1, 2, 3, 4)]
    own = {path: measure(path, packed / "val") for path in members}
    flags = ["--soup", "--data", packed / "val", "--out", tmp_path / "soup.pt"]
    lines = average(capsys, *members, *flags, *PLAIN)
    assert lines[:4] == [f"val mAP {own[path]:.6f}  {path}" for path in members]
    ranked = sorted(members, key=lambda path: -own[path])
    assert [line.split(" with ")[1].split(": ")[0] for line in lines[4:8]] == [str(path) for path in ranked]
    assert lines[4].endswith(": best")
    kept = [path for path, line in zip(ranked, lines[4:8], strict=True) if not line.endswith(": left out")]
    assert lines[8] == f"averaged {len(kept)} of 4 checkpoints into {tmp_path / 'soup.pt'}"
    reached = measure(tmp_path / "soup.pt", packed / "val")
    assert reached >= max(own.values()) - 1e-9
    assert f"{reached:.6f}" in [line.split()[2] for line in lines[4:8] if not line.endswith(": left out")][-1]
    average(capsys, *kept, "--out", tmp_path / "kept.pt")
    wanted = weights(tmp_path / "kept.pt")
    assert all(torch.equal(value, wanted[name]) for name, value in weights(tmp_path / "soup.pt").items())


@pytest.mark.parametrize("spread", [0.02, 3.0])
def test_a_soup_keeps_what_helps_or_does_no_harm_and_leaves_ruin_out(
    run: Path, packed: Path, tmp_path: Path, spread: float
):
    base = load_checkpoint(run / "checkpoints/epoch_04.pt")
    torch.manual_seed(0)
    paths = [tmp_path / f"{number}.pt" for number in range(5)]
    for path in paths:
        shaken = {
            name: value + spread * value.std() * torch.randn_like(value) for name, value in base.state.items()
        }
        save_checkpoint(path, base.card, shaken, 1)
    with open_shards(packed / "val") as shards:
        soup = GreedySoup(paths, shards, Scoring(16, "fp32", "cpu"))
        scored = soup.score_members()
        decisions = list(soup.choose(scored))
    save_checkpoint(tmp_path / "soup.pt", soup.card, soup.state, 1)
    kept = [decision.mean_ap for decision in decisions if decision.kept]
    assert kept == sorted(kept)
    assert kept[0] == max(mean_ap for mean_ap, _ in scored)
    assert measure(tmp_path / "soup.pt", packed / "val") == pytest.approx(kept[-1], abs=1e-9)
    best = decisions[0].mean_ap
    for decision in decisions[1:]:
        assert decision.kept == (decision.mean_ap >= best)
        best = max(best, decision.mean_ap)


def test_a_soup_s_batch_norm_is_measured_before_it_is_judged(
    nets: list[Path], packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["--soup", "--data", packed / "val", "--batch-norm-clips", 16, "--shards", packed, *PLAIN]
    lines = average(capsys, *nets, "--out", tmp_path / "soup.pt", *flags)
    average(capsys, *nets, "--out", tmp_path / "both.pt", *flags[3:])
    both = measure(tmp_path / "both.pt", packed / "val")
    assert f"soup mAP {both:.6f} with" in lines[3]
    if lines[3].endswith("left out"):
        assert lines[-1] == "BatchNorm's statistics are the checkpoint's own: nothing was averaged"
    else:
        assert measure(tmp_path / "soup.pt", packed / "val") == pytest.approx(both, abs=1e-9)


def test_a_soup_is_not_chosen_on_the_run_s_eval(
    run: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    members = sorted((run / "checkpoints").glob("epoch_*.pt"))
    words = [*members, "--out", tmp_path / "soup.pt", "--soup", "--data"]
    assert f"--data {packed / 'eval'} is an eval split" in refused(capsys, *words, packed / "eval")
    shutil.copytree(packed / "eval", tmp_path / "val")
    shutil.copy(packed / "classes.csv", tmp_path)
    said = refused(capsys, *words, tmp_path / "val")
    assert f"--data {tmp_path / 'val'} and {run}'s eval share 16 clips" in said
    assert not (tmp_path / "soup.pt").exists()


def test_flags_that_do_not_go_together_are_one_line(
    run: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    one, out = run / "checkpoints/epoch_01.pt", ["--out", tmp_path / "x.pt"]
    for words, message in (
        (out, "give checkpoints, or --run RUN and --epochs 31-40; one of both"),
        ([one, "--run", run, "--epochs", "1-2", *out], "one of both"),
        (["--run", run, *out], "one of both"),
        ([one, "--epochs", "1-2", *out], "one of both"),
        ([one, one, "--soup", *out], "--soup and --data SHARDS/val go together"),
        ([one, "--data", packed / "val", *out], "--soup and --data SHARDS/val go together"),
        ([one, "--batch-norm-clips", "3", *out], "--batch-norm-clips N and --shards SHARDS go together"),
        ([one, "--batch-norm-clips", "-3", *out], "--batch-norm-clips is -3"),
        ([one, "--soup", "--data", packed / "val", *out], "1 checkpoints given; a soup is of 2 or more"),
        ([one, "--batch-norm-clips", "3", "--shards", packed, *out], "tiny has no BatchNorm"),
        ([one, tmp_path / "no.pt", *out], "no.pt not found"),
        (
            [one, "--batch-norm-clips", "3", "--shards", packed, "--batch-size", "0", *out],
            "--batch-size is 0",
        ),
        (
            [one, "--batch-norm-clips", "3", "--shards", packed, "--batch-size", "-4", *out],
            "--batch-size is -4",
        ),
        ([run / "checkpoints", *out], f"{run}/checkpoints is a folder without model.safetensors"),
        ([tmp_path / "no.pt", "--out", one / "x.pt"], "x.pt can't be written (Not a directory)"),
        ([one, "--out", tmp_path], "is a folder; give a file"),
    ):
        assert message in refused(capsys, *words)
