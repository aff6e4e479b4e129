import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from psla_fast.augment import InputSpec
from psla_fast.checkpoint import Card, load_checkpoint, save_checkpoint
from psla_fast.classes import Classes
from psla_fast.fbank import FbankConfig
from psla_fast.models import ModelConfig
from psla_fast.train.averaging import AverageConfig, Ema, RunningMean, average_checkpoints

CARD = Card(ModelConfig(), Classes(("/m/a",), ("A",)), InputSpec(10, 128, 0.0, 0.0, 1.0), FbankConfig())


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(3, 4, generator=generator),
        "half": torch.randn(5, generator=generator).half(),
        "count": torch.randint(0, 2**40, (), generator=generator),
    }


@given(seed=st.integers(0, 100), copies=st.integers(1, 9))
def test_averaging_copies_is_the_identity_and_keeps_types(seed: int, copies: int):
    mean = RunningMean()
    for _ in range(copies):
        mean.add(tensors(seed))
    for name, value in tensors(seed).items():
        assert mean.mean()[name].dtype == value.dtype
        assert torch.equal(mean.mean()[name], value)


@given(seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=8))
def test_the_running_mean_is_the_mean_and_integers_are_the_last(seeds: list[int]):
    mean = RunningMean()
    for seed in seeds:
        mean.add(tensors(seed))
    expected = torch.stack([tensors(seed)["w"].double() for seed in seeds]).mean(0)
    assert torch.allclose(mean.mean()["w"].double(), expected, atol=1e-6)
    assert torch.equal(mean.mean()["count"], tensors(seeds[-1])["count"])


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_ema_is_that_of_its_definition_in_float64(decay: float):
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    ema = Ema(model, decay)
    wanted = {name: value.double() for name, value in model.state_dict().items()}
    for number in range(1, 30):
        model.load_state_dict({name: value + torch.randn(()) for name, value in model.state_dict().items()})
        ema.update(number)
        kept = min(decay, (1 + number) / (10 + number))
        for name, value in model.state_dict().items():
            wanted[name] = kept * wanted[name] + (1 - kept) * value
    wanted["1.num_batches_tracked"] = model.state_dict()["1.num_batches_tracked"]
    assert ema.state_dict().keys() == wanted.keys()
    for name, value in ema.state_dict().items():
        assert value.dtype == model.state_dict()[name].dtype
        assert torch.allclose(value.double(), wanted[name].double(), atol=1e-5), name


def test_an_ema_restored_from_its_state_goes_on_to_the_bit():
    models = [nn.Linear(4, 3), nn.Linear(4, 3)]
    emas = [Ema(model, 0.9) for model in models]
    for number in range(1, 6):
        models[0].weight.data.normal_()
        if number == 3:
            emas[1].load_state_dict({name: value.clone() for name, value in emas[0].state_dict().items()})
        models[1].load_state_dict(models[0].state_dict())
        for ema in emas if number >= 3 else emas[:1]:
            ema.update(number)
    whole, restored = (ema.state_dict() for ema in emas)
    assert all(torch.equal(whole[name], restored[name]) for name in whole)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"ema_decay": 1.0}, "wa.ema_decay is 1.0"), ({"batch_norm_clips": -1}, "wa.batch_norm_clips is -1")],
)
def test_an_average_out_of_range_is_refused(values: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        AverageConfig(**values)  # type: ignore[arg-type]


def test_a_saved_and_restored_mean_goes_on_exactly():
    whole, first, second = RunningMean(), RunningMean(), RunningMean()
    for seed in range(4):
        whole.add(tensors(seed))
    for seed in (0, 1):
        first.add(tensors(seed))
    second.load_state_dict(first.state_dict())
    for seed in (2, 3):
        second.add(tensors(seed))
    assert all(torch.equal(whole.mean()[name], second.mean()[name]) for name in whole.mean())


def test_a_copied_mean_goes_on_apart_from_the_first():
    first = RunningMean()
    first.add(tensors(1))
    other = first.copy()
    other.add(tensors(2))
    assert (first.count, other.count) == (1, 2)
    assert all(torch.equal(first.mean()[name], value) for name, value in tensors(1).items())
    both = RunningMean()
    for seed in (1, 2):
        both.add(tensors(seed))
    assert all(torch.equal(other.mean()[name], value) for name, value in both.mean().items())


def test_adding_to_a_mean_leaves_what_was_added_untouched():
    given_tensors, mean = tensors(1), RunningMean()
    mean.add(given_tensors)
    mean.add(tensors(2))
    assert all(torch.equal(value, tensors(1)[name]) for name, value in given_tensors.items())


def test_other_names_and_shapes_are_refused():
    mean = RunningMean()
    mean.add({"a": torch.zeros(2)})
    with pytest.raises(ValueError, match="2 names differ"):
        mean.add({"b": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"a has shape \(3,\) in one set and \(2,\)"):
        mean.add({"a": torch.zeros(3)})
    with pytest.raises(ValueError, match="nothing was averaged"):
        RunningMean().mean()


def test_checkpoint_files_are_averaged_and_others_refused(tmp_path: Path):
    for seed in (1, 2):
        save_checkpoint(tmp_path / f"{seed}.pt", CARD, tensors(seed), epoch=seed)
    card, state, epoch = average_checkpoints([tmp_path / "1.pt", tmp_path / "2.pt"])
    assert (card, epoch) == (CARD, 2)
    assert torch.allclose(state["w"], (tensors(1)["w"] + tensors(2)["w"]) / 2)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"w": torch.zeros(1)}, tmp_path / "bare.pt")
    for name, message in (("junk.pt", "not a whole torch file"), ("bare.pt", "not a psla_fast checkpoint")):
        with pytest.raises(ValueError, match=message):
            average_checkpoints([tmp_path / "1.pt", tmp_path / name])
    for changed in ({"same_padding": "asymmetric"}, {"pooling": "max"}, {"mask_padding": True}):
        other = replace(CARD, model=replace(CARD.model, **changed))
        save_checkpoint(tmp_path / "other.pt", other, tensors(3), epoch=3)
        with pytest.raises(ValueError, match=r"other\.pt has other classes, input or layers"):
            average_checkpoints([tmp_path / "1.pt", tmp_path / "other.pt"])
    with pytest.raises(ValueError, match="config.json not found"):  # a folder is taken for one of the Hub
        average_checkpoints([tmp_path])
    with pytest.raises(ValueError, match="missing.pt not found"):
        average_checkpoints([tmp_path / "missing.pt"])


def test_a_full_disk_is_one_clear_error_and_leaves_the_old_checkpoint(tmp_path: Path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, CARD, tensors(0), epoch=1)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"a\.pt"):
            save_checkpoint(path, CARD, tensors(1), epoch=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_a_checkpoint_keeps_its_card_and_a_cut_one_is_refused(tmp_path: Path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, CARD, tensors(0), epoch=3, extra={"note": [1.5, "x"]})
    loaded = load_checkpoint(path)
    assert (loaded.card, loaded.epoch, loaded.extra) == (CARD, 3, {"note": [1.5, "x"]})
    assert not list(tmp_path.glob("*.tmp"))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="not a whole torch file"):
        load_checkpoint(path)
