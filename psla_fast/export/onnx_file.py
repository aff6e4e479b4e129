"""ONNX: a traced scorer -> a model of one file that says what it takes and what its scores mean."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from psla_fast.checkpoint import Checkpoint
from psla_fast.export.program import quiet

OPSET = 20  # onnxruntime 1.17 and later read it
MISSING = "needs the extra export: pip install 'psla-fast[export]'."


def build_onnx(program: ExportedProgram, names: Sequence[str], checkpoint: Checkpoint) -> Any:
    """Turn a program into an ONNX ModelProto with inputs of these names and the output `scores` (B, C).

    Its metadata_props hold `class_names` and `class_mids` in the scores' order and `card`, all JSON. Raises
    ValueError where the extra is missing, and for what ONNX has no operators for.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
        from torch.onnx.errors import OnnxExporterError
    except ImportError as error:
        raise ValueError(f"ONNX {MISSING}") from error
    try:
        with torch.no_grad(), quiet():
            exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    except OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0][:150]
        raise ValueError(f"ONNX can't hold this network ({reason}). Export torch-export instead.") from error
    assert exported is not None
    model = exported.model_proto
    _rename(model.graph, list(names), ["scores"])
    _write_out_sigmoids(model.graph)
    card = checkpoint.card
    for key, value in {
        "card": {**card.to_plain(), "epoch": checkpoint.epoch},
        "class_names": list(card.classes.names),
        "class_mids": list(card.classes.mids),
    }.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value, ensure_ascii=False)
    model.producer_name = "psla_fast"
    model.doc_string = f"{card.model.name}: {', '.join(names)} -> scores (batch, {len(card.classes)})"
    return model


def open_onnx(model: Path | bytes, num_threads: int = 0) -> Callable[..., Tensor]:
    """Open a model in onnxruntime, on the CPU: a function of its inputs in their order; 0 threads: all cores.

    Raises ValueError where the extra is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"onnxruntime {MISSING}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = num_threads, 3
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(["scores"], feed)[0])

    return run


def _rename(graph: Any, inputs: list[str], outputs: list[str]) -> None:
    """Give inputs, outputs and their open dimensions names for people, and drop the inner values' shapes."""
    del graph.value_info[:]
    names = dict(zip([entry.name for entry in (*graph.input, *graph.output)], inputs + outputs, strict=True))
    for entry in (*graph.input, *graph.output):
        entry.name = names[entry.name]
    for node in graph.node:
        for values in (node.input, node.output):
            for index, value in enumerate(values):
                values[index] = names.get(value, value)
    along = {"waveform": "samples", "fbank": "frames"}
    for entry in (*graph.input, *graph.output):
        dims = entry.type.tensor_type.shape.dim
        dims[0].dim_param = "batch"
        if entry.name in along:
            dims[1].dim_param = along[entry.name]


def _write_out_sigmoids(graph: Any) -> None:
    """Compute the heads' sigmoids as 1 / (1 + exp(-x)), in place; those of SiLU and squeezes stay.

    onnxruntime's Sigmoid is off by up to 1e-7 whatever the result, which for results of 1e-6 is much: the
    attention is divided by its sum over time, so where it is small at all times scores are off: by .002 on an
    EfficientNet-B0 with random weights, and this way by 2e-5, as torch itself is from float64.
    """
    import onnx

    scaling = {name for node in graph.node if node.op_type == "Mul" for name in node.input}
    one = onnx.numpy_helper.from_array(np.array(1, dtype=np.float32), "psla_fast_one")
    nodes: list[Any] = []
    for node in graph.node:
        out = node.output[0]
        if node.op_type != "Sigmoid" or out in scaling:
            nodes.append(node)
            continue
        names = [node.input[0], f"{out}_negative", f"{out}_power", f"{out}_inverse"]
        nodes += [
            onnx.helper.make_node("Neg", names[:1], names[1:2]),
            onnx.helper.make_node("Exp", names[1:2], names[2:3]),
            onnx.helper.make_node("Add", [names[2], one.name], names[3:]),
            onnx.helper.make_node("Reciprocal", names[3:], [out]),
        ]
    if len(nodes) > len(graph.node):
        graph.initializer.append(one)
    del graph.node[:]
    graph.node.extend(nodes)
