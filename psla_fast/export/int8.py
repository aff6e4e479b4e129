"""int8: an ONNX model of float32 -> one whose products are of 8-bit integers, for CPUs.

Weights are rounded once, activations by each run's own range (dynamic quantisation). What is quantised is
what gains by it: 1×1 convolutions and the heads, as products, where they have many weights. Early ones have
few weights and large maps, and putting their channels last and back costs more than integers gain. Other
convolutions stay float32: onnxruntime's own way for them, ConvInteger, is 5 to 10 times slower, and cost .05
to .27 of mAP on an EfficientNet-Lite0.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PREPROCESSED = ("onnx.quant.pre_process", "onnxruntime.quant")  # else quantize_dynamic logs an advice
SMALLEST = 10_000  # weights; on an EfficientNet-Lite0, 2,000 to 30,000 are about equal
EXACT = ("fourier", "banks")  # weights of the front end: log-mels span more than 8 bits


def quantise(model: Any) -> Any:
    """Return an int8 ModelProto of a float32 one, with its inputs, outputs and metadata.

    Activations are quantised by the range of a whole batch: a clip's scores depend a little on its batch.
    Raises ValueError for a network without large products.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    metadata = {entry.key: entry.value for entry in model.metadata_props}
    with tempfile.TemporaryDirectory() as folder:
        plain, quantised = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        _fold_constants(model, plain)
        folded = onnx.load(plain)
        names = _turn_into_products(folded.graph)
        if not names:
            raise ValueError(
                f"this network has no product of {SMALLEST:,} weights, for int8 to gain by. Export onnx."
            )
        onnx.helper.set_model_props(folded, dict([PREPROCESSED]))
        quantize_dynamic(
            folded,
            quantised,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_quantize=names,
            per_channel=True,
            reduce_range=True,  # 7 bits of weights: without VNNI, sums of 8 × 8 bits saturate
            weight_type=QuantType.QInt8,
        )
        made = onnx.load(quantised)
    onnx.helper.set_model_props(made, metadata)
    made.producer_name, made.doc_string = model.producer_name, model.doc_string
    return made


def _fold_constants(model: Any, path: Path) -> None:
    """Write a model with all that depends on weights alone computed: the heads' weights joined to one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath, options.log_severity_level = str(path), 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _turn_into_products(graph: Any) -> list[str]:
    """Rewrite large 1×1 convolutions and products with a constant on the left; name what to quantise."""
    from onnx import numpy_helper

    weights = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    large = {name: weight for name, weight in weights.items() if weight.size >= SMALLEST}
    nodes: list[Any] = []
    names: list[str] = []
    for node in graph.node:
        made = [node]
        if node.op_type == "Conv" and node.input[1] in large and _is_pointwise(node, large[node.input[1]]):
            made = _replace_convolution(graph, node, large[node.input[1]][:, :, 0, 0])
        elif node.op_type == "MatMul" and node.input[0] in large and large[node.input[0]].ndim == 2:
            made = _replace_left_product(graph, node, large[node.input[0]])
        for new in made:
            is_large = made != [node] or (len(node.input) > 1 and node.input[1] in large)
            if new.op_type in ("MatMul", "Gemm") and is_large and not new.input[1].endswith(EXACT):
                new.name = f"product_{len(names)}"
                names.append(new.name)
        nodes += made
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input} | {entry.name for entry in graph.output}
    kept = [entry for entry in graph.initializer if entry.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return names


def _is_pointwise(node: Any, weight: npt.NDArray[np.float32]) -> bool:
    from onnx import helper

    settings = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    plain = settings.get("group", 1) == 1 and set(settings.get("strides", [1])) == {1}
    return plain and weight.shape[2:] == (1, 1) and not any(settings.get("pads", []))


def _replace_convolution(graph: Any, node: Any, weight: npt.NDArray[np.float32]) -> list[Any]:
    """A 1×1 convolution (D', D) of (B, D, H, W) as a product with channels last, between two transposes."""
    from onnx import helper

    name, out = _add_weight(graph, node, weight), node.output[0]
    last = f"{out}_product"
    made = [
        helper.make_node("Transpose", [node.input[0]], [f"{out}_last"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", [f"{out}_last", name], [last]),
    ]
    if len(node.input) > 2:
        made.append(helper.make_node("Add", [last, node.input[2]], [f"{out}_sum"]))
        last = f"{out}_sum"
    return [*made, helper.make_node("Transpose", [last], [out], perm=[0, 3, 1, 2])]


def _replace_left_product(graph: Any, node: Any, weight: npt.NDArray[np.float32]) -> list[Any]:
    """Turn (C, D) @ (B, D, T) into the transpose of (B, T, D) @ (D, C): 8-bit weights stand on the right."""
    from onnx import helper

    name, out = _add_weight(graph, node, weight), node.output[0]
    return [
        helper.make_node("Transpose", [node.input[1]], [f"{out}_last"], perm=[0, 2, 1]),
        helper.make_node("MatMul", [f"{out}_last", name], [f"{out}_product"]),
        helper.make_node("Transpose", [f"{out}_product"], [out], perm=[0, 2, 1]),
    ]


def _add_weight(graph: Any, node: Any, weight: npt.NDArray[np.float32]) -> str:
    """Add a product's weight (D, C), the transpose of what was given, and return its name."""
    from onnx import numpy_helper

    name = f"{node.output[0]}_weight"
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), name))
    return name
