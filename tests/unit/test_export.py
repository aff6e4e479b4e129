import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import psla_fast.export.engine as engine
import psla_fast.export.scorer as scorer
from psla_fast.augment import pad_and_normalise
from psla_fast.checkpoint import Checkpoint, load_checkpoint
from psla_fast.export import HubTagger, export_checkpoint
from psla_fast.export.check import (
    BATCHES,
    Difference,
    Run,
    compare,
    compute_exactly,
    find_length,
    make_waveforms,
)
from psla_fast.export.int8 import quantise
from psla_fast.export.onnx_file import _write_out_sigmoids, build_onnx, open_onnx
from psla_fast.export.program import input_names, load_program, quiet, save_program, trace
from psla_fast.export.scorer import build_scorer
from psla_fast.fbank import LOG_FLOOR_POWER, compute_fbank
from psla_fast.models import ModelConfig
from tests.small_net import SPEC, make_checkpoint, with_buckets, write_checkpoint

SIZES = [(1, 1), (3, 40), (2, 64), (1, 150)]  # clips, frames
# a config's heads and its input, with log-mels or waveforms: every graph that the tests share
GRAPHS = {
    "4 heads": (ModelConfig(name="small", num_heads=4), SPEC, False),
    "1 head, masked, buckets": (
        ModelConfig(name="small", num_heads=1, mask_padding=True),
        with_buckets(20, 50, 100),
        False,
    ),
    "waveforms, 4 heads": (ModelConfig(name="small", num_heads=4), SPEC, True),
    "waveforms, mean, masked, buckets": (
        ModelConfig(name="small", num_heads=0, mask_padding=True),
        with_buckets(20, 100),
        True,
    ),
}


class Graph(NamedTuple):
    """A checkpoint, its ONNX model, and that as a function of its inputs; besides the saved program."""

    checkpoint: Checkpoint
    onnx: Any
    runs: list[Callable[..., Tensor]]


@pytest.fixture(scope="module")
def graph_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Graph]:
    """Export one of GRAPHS; each once."""
    made: dict[str, Graph] = {}

    def get(name: str) -> Graph:
        if name not in made:
            config, spec, with_fbank = GRAPHS[name]
            checkpoint = make_checkpoint(config, spec)
            if config.num_heads == 4:  # attention of 1e-6 and less at all times, which is divided by its sum
                for head in (0, 1):
                    checkpoint.state[f"attention.att.{head}.bias"] -= 14
            scorer = build_scorer(checkpoint, with_fbank)
            program = trace(scorer)
            path = tmp_path_factory.mktemp("programs") / "program.pt2"
            save_program(program, path)
            model = build_onnx(program, input_names(scorer), checkpoint)
            runs = [open_onnx(model.SerializeToString(), 1), load_program(path)]
            made[name] = Graph(checkpoint, model, runs)
        return made[name]

    return get


def reference(checkpoint: Checkpoint, fbank: Tensor, num_frames: Tensor, length: int) -> Tensor:
    """Scores as evaluation makes them of log-mels padded to a length."""
    model = checkpoint.build()
    padded = functional.pad(fbank, (0, 0, 0, max(0, length - fbank.shape[1])))
    lengths = (num_frames,) if checkpoint.card.model.mask_padding else ()
    with torch.no_grad():
        return model(pad_and_normalise(padded, num_frames, checkpoint.card.input), *lengths)


def test_exported_graphs_score_log_mels_as_evaluation_does(graph_of: Callable[[str], Graph]):
    checkpoint, _, runs = graph_of("1 head, masked, buckets")
    generator = torch.Generator().manual_seed(0)
    for num_clips, frames in SIZES:
        fbank = torch.randn(num_clips, frames, 128, generator=generator) * 4 - 8
        num_frames = frames - torch.arange(num_clips) * 9
        lengths = [length for length in checkpoint.card.input.buckets if length >= frames]
        wanted = reference(checkpoint, fbank, num_frames, min(lengths, default=frames))
        for run in runs:
            torch.testing.assert_close(run(fbank, num_frames), wanted, rtol=0, atol=1e-5)
        assert wanted.std() > 0.01


@pytest.mark.parametrize("name", ["waveforms, 4 heads", "waveforms, mean, masked, buckets"])
def test_with_the_fbank_exported_graphs_score_waveforms_of_any_length(
    name: str, graph_of: Callable[[str], Graph]
):
    checkpoint, _, runs = graph_of(name)
    generator = torch.Generator().manual_seed(1)
    for num_clips, num_samples in ((1, 1), (2, 399), (1, 559), (3, 6000), (2, 30000)):
        waveform = 0.1 * torch.randn(num_clips, num_samples, generator=generator) + 0.2
        fbank = compute_exactly(waveform, checkpoint.card.fbank)
        num_frames = torch.full((num_clips,), fbank.shape[1])
        wanted = reference(checkpoint, fbank, num_frames, find_length(fbank.shape[1], checkpoint.card.input))
        for run in runs:
            torch.testing.assert_close(run(waveform), wanted, rtol=0, atol=1e-5)


def test_the_graph_s_log_mels_are_those_of_compute_fbank_and_silence_is_the_floor():
    scorer = build_scorer(make_checkpoint(), True)
    waveform = torch.cat([torch.zeros(1, 4000), torch.randn(1, 12000)], dim=1)
    num_frames = scorer.config.num_frames(16000)
    found = scorer._compute_fbank(waveform, num_frames)
    centred = waveform - waveform.mean()
    torch.testing.assert_close(found, compute_fbank(centred, scorer.config), rtol=0, atol=0.01)
    torch.testing.assert_close(found, compute_exactly(waveform, scorer.config), rtol=0, atol=1e-5)
    assert found[0, 0].exp().allclose(torch.tensor(LOG_FLOOR_POWER))


def test_an_onnx_model_names_its_inputs_its_classes_and_its_card(graph_of: Callable[[str], Graph]):
    checkpoint, model, _ = graph_of("1 head, masked, buckets")
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        entry.name: [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim]
        for entry in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"fbank": ["batch", "frames", 128], "num_frames": ["batch"], "scores": ["batch", 4]}
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata["class_names"] == list(checkpoint.card.classes.names)
    assert metadata["class_mids"] == list(checkpoint.card.classes.mids)
    assert metadata["card"] == json.loads(json.dumps({**checkpoint.card.to_plain(), "epoch": 5}))


def test_an_efficientnet_b0_is_exported_to_onnx_and_int8():
    checkpoint = make_checkpoint(ModelConfig(name="efficientnet_b0", num_heads=4))
    model = build_onnx(trace(build_scorer(checkpoint, False)), ["fbank"], checkpoint)
    run, small = open_onnx(model.SerializeToString(), 1), quantise(model)
    assert compare(run, checkpoint, False).largest < 1e-4
    operators = [node.op_type for node in small.graph.node]
    assert operators.count("MatMulInteger") > 20
    assert "ConvInteger" not in operators
    assert len(small.SerializeToString()) < 0.4 * len(model.SerializeToString())
    assert [entry.key for entry in small.metadata_props] == ["card", "class_names", "class_mids"]


def test_the_number_one_is_in_a_model_where_a_sigmoid_is_written_out(graph_of: Callable[[str], Graph]):
    _, attention, _ = graph_of("4 heads")
    names = [entry.name for entry in attention.graph.initializer]
    assert names.count("psla_fast_one") == 1
    nodes = [onnx.helper.make_node("Relu", ["one"], ["scores"])]
    graph = onnx.helper.make_graph(nodes, "plain", [], [])
    _write_out_sigmoids(graph)
    assert (len(graph.node), len(graph.initializer)) == (1, 0)


def test_int8_changes_scores_little_and_leaves_the_front_end_exact(graph_of: Callable[[str], Graph]):
    checkpoint, model, (before, _) = graph_of("waveforms, 4 heads")
    small = quantise(model)
    exact = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
    kept = {entry.name for entry in small.graph.initializer if entry.data_type in exact}
    assert {"fourier", "banks"} <= kept
    assert sum(node.op_type == "MatMulInteger" for node in small.graph.node) == 2  # pointwise, heads
    after = open_onnx(small.SerializeToString(), 1)
    for waveform in make_waveforms(checkpoint.card):
        difference = (before(waveform) - after(waveform)).abs()
        assert 0 < difference.mean() < 0.02


def test_int8_of_a_network_without_large_products_is_refused():
    class Tiny(torch.nn.Module):
        def forward(self, fbank: Tensor) -> Tensor:
            return torch.sigmoid(fbank.mean(dim=1)[:, :4])

    with quiet():
        made = torch.onnx.export(Tiny().eval(), (torch.zeros(1, 5, 128),), dynamo=True, verbose=False)
    assert made is not None
    with pytest.raises(ValueError, match=r"no product of 10,000 weights, .* Export onnx"):
        quantise(made.model_proto)


def test_a_network_that_depends_on_values_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    scorer = build_scorer(make_checkpoint(), False)

    def forward(fbank: Tensor) -> Tensor:
        return fbank.mean(dim=1) if fbank.sum() > 0 else fbank.sum(dim=1)

    monkeypatch.setattr(scorer.model, "forward", forward)
    with pytest.raises(ValueError, match="can't be exported as a graph") as caught:
        trace(scorer)
    assert "\n" not in str(caught.value)


def test_the_check_s_sounds_are_of_several_lengths_and_vary():
    waveforms = list(make_waveforms(make_checkpoint().card))
    assert [len(waveform) for waveform in waveforms] == [clips for clips, _ in BATCHES]
    assert waveforms[0].shape[1] < 400 < waveforms[1].shape[1]
    for waveform in waveforms:
        assert waveform.isfinite().all()
        assert waveform.std(dim=1).min() > 0.01
    again = list(make_waveforms(make_checkpoint().card))
    assert all(torch.equal(a, b) for a, b in zip(waveforms, again, strict=True))


@pytest.mark.parametrize("kind", ["onnx", "safetensors", "hub"])
def test_scores_too_far_from_the_checkpoint_s_are_one_line_and_leave_nothing_to_load(
    kind: engine.Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, out = write_checkpoint(tmp_path / "c.pt"), tmp_path / f"out{engine.SUFFIXES.get(kind, '')}"

    def compare_worse(run: Run, checkpoint: Checkpoint, with_fbank: bool) -> Difference:
        return compare(lambda *inputs: run(*inputs) + 2e-4, checkpoint, with_fbank)

    monkeypatch.setattr(engine, "compare", compare_worse)
    written = {
        "onnx": r"out\.onnx was not written",
        "safetensors": r"out\.safetensors was written, but not out\.json, so that nothing loads it",
        "hub": r"out/model\.safetensors was written, but not config\.json, so that nothing loads it",
    }
    message = rf"{written[kind]}: the largest difference .* is 0\.0002, above 0\.0001"
    with pytest.raises(ValueError, match=message):
        export_checkpoint(path, kind, out)
    assert [name for name in ("out.onnx", "out.safetensors", "out") if (tmp_path / name).exists()] == (
        [] if kind == "onnx" else [out.name]
    )
    with pytest.raises(ValueError, match="not found"):
        load_checkpoint(out)


def hub_tagger(folder: Path) -> HubTagger:
    return HubTagger.from_pretrained(folder)


def test_a_hub_folder_loads_offline_saves_again_and_is_a_checkpoint(tmp_path: Path):
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "c.pt"))
    export_checkpoint(tmp_path / "c.pt", "hub", tmp_path / "hub")
    script = (
        "import sys, torch, tests.small_net\nfrom psla_fast.export import HubTagger\n"
        "tagger = HubTagger.from_pretrained(sys.argv[1])\ntagger.save_pretrained(sys.argv[2])\n"
        "torch.save(tagger(torch.ones(2, 64, 128)).detach(), sys.argv[3])\n"
    )
    again, scores = tmp_path / "again", tmp_path / "scores.pt"
    words: list[str | Path] = [sys.executable, "-c", script, tmp_path / "hub", again, scores]
    root = Path(__file__).resolve().parents[2]
    subprocess.run(words, check=True, cwd=root, env={"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)})
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (again / name).read_bytes() == (tmp_path / "hub" / name).read_bytes(), name
    loaded = load_checkpoint(again)
    assert (loaded.card, loaded.epoch) == (checkpoint.card, 5)
    with torch.no_grad():
        wanted = checkpoint.build()(torch.ones(2, 64, 128))
    torch.testing.assert_close(torch.load(scores, weights_only=True), wanted, rtol=0, atol=1e-6)


def test_the_readme_s_code_runs_and_names_the_classes(tmp_path: Path):
    write_checkpoint(tmp_path / "c.pt")
    export_checkpoint(tmp_path / "c.pt", "hub", tmp_path / "hub")
    readme = (tmp_path / "hub/README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert code is not None
    names: dict[str, object] = {}
    exec(code[1].replace("this/folder", str(tmp_path / "hub")), names)
    assert isinstance(names["scores"], Tensor)
    assert names["scores"].shape == (1, 4)
    assert names["names"] == ("Speech", "Male speech, man speaking", "Music", "Dog; bark")
    assert "| 3 | /t/dd1 | Dog; bark |" in readme
    (tmp_path / "hub/README.md").write_text("mine")
    export_checkpoint(tmp_path / "c.pt", "hub", tmp_path / "hub")
    assert (tmp_path / "hub/README.md").read_text() == "mine"


def test_a_hub_tagger_scores_waveforms_and_refuses_other_weights(tmp_path: Path):
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "c.pt"))
    export_checkpoint(tmp_path / "c.pt", "hub", tmp_path / "hub")
    tagger = hub_tagger(tmp_path / "hub")
    waveform = 0.1 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    fbank = compute_exactly(waveform, checkpoint.card.fbank)
    wanted = reference(checkpoint, fbank, torch.full((2,), fbank.shape[1]), 64)
    torch.testing.assert_close(tagger.score_waveforms(waveform), wanted, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "hub/config.json").read_text())
    config["classes"] = {"mids": ["a"], "names": ["A"]}
    (tmp_path / "hub/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has shape .* Is it for another class list"):
        hub_tagger(tmp_path / "hub")
    (tmp_path / "hub/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is not a psla_fast checkpoint"):
        hub_tagger(tmp_path / "hub")


def test_a_hub_tagger_scores_where_its_model_is_and_builds_the_front_end_once(
    monkeypatch: pytest.MonkeyPatch,
):
    class Mean(torch.nn.Linear):
        mask_padding = True

        def forward(self, fbank: Tensor, num_frames: Tensor) -> Tensor:  # type: ignore[override]
            assert num_frames.device == fbank.device == self.weight.device
            return super().forward(fbank.sum(dim=1) / num_frames[:, None])

    tagger = HubTagger(**make_checkpoint(spec=with_buckets(20, 100)).card.to_plain()).eval()
    tagger.model = Mean(128, 4)  # networks of this package have autocast, which isn't for "meta"
    names, front_end, built = list(tagger.state_dict()), scorer._front_end, []
    monkeypatch.setattr(scorer, "_front_end", lambda of: built.append(of) or front_end(of))
    waveform = 0.1 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tagger.score_waveforms(waveform), tagger.score_waveforms(waveform))
    assert built == [tagger.card.fbank]
    assert list(tagger.state_dict()) == names
    elsewhere = tagger.to("meta")  # a device on which what was left on the CPU is refused
    for where in ("cpu", "meta"):
        scores = elsewhere.score_waveforms(waveform.to(where))
        assert (scores.device.type, scores.shape) == ("meta", (2, 4))
        assert {value.device.type for value in elsewhere.parameters()} == {"meta"}
    assert len(built) == 1


def test_without_huggingface_hub_the_tagger_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    import psla_fast.export

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "psla_fast.export.hub", raising=False)
    with pytest.raises(ValueError, match=r"needs the extra export: pip install 'psla-fast\[export\]'"):
        psla_fast.export.HubTagger  # noqa: B018


def test_without_onnx_s_packages_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    checkpoint = make_checkpoint()
    for package in ("onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match="ONNX needs the extra export"):
        build_onnx(None, ["fbank"], checkpoint)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="onnxruntime needs the extra export"):
        open_onnx(b"")
