"""ONNX graphs as PyTorch modules, against onnxruntime: a small graph of every operator, and the published networks."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from e4s_models.onnx_network import OnnxNetwork, in_batches_of_one_on_cpu
from e4s_models.weights import WeightsError, weight_path

ort = pytest.importorskip("onnxruntime")
ort.set_default_logger_severity(3)


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    head = b""
    while value > 127:
        head, value = head + bytes([value & 127 | 128]), value >> 7
    return head + bytes([value])


def field(number: int, value: int | float | bytes | str) -> bytes:
    """One protobuf field."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def tensor(array: np.ndarray, name: str = "", packed: bool = False) -> bytes:
    kind = {np.dtype(np.float32): 1, np.dtype(np.int64): 7, np.dtype(np.float64): 11}[array.dtype]
    return b"".join(field(1, size) for size in array.shape) + field(2, kind) + field(4 if packed else 9, array.tobytes()) + field(8, name)


def attribute(name: str, value: int | float | bytes | Sequence[int]) -> bytes:
    if isinstance(value, (int, float)):
        content, kind = field(3 if isinstance(value, int) else 2, value), 2 if isinstance(value, int) else 1
    elif isinstance(value, bytes):
        content, kind = field(5, value), 4
    else:
        content, kind = b"".join(field(8, item) for item in value), 7
    return field(1, name) + content + field(20, kind)


def node(operator: str, inputs: str, output: str, **attributes: int | float | bytes | Sequence[int]) -> bytes:
    parts = [field(1, name) for name in inputs.split()] + [field(2, output), field(4, operator)]
    return b"".join(parts + [field(5, attribute(name, value)) for name, value in attributes.items()])


def value_info(name: str, shape: Sequence[int]) -> bytes:
    dimensions = b"".join(field(1, field(1, size)) for size in shape)
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, dimensions)))


def model(nodes: Sequence[bytes], constants: dict[str, np.ndarray], shape: Sequence[int], output: str, *inputs: str) -> bytes:
    """Constants whose name starts with `packed` are stored as float_data and listed among the inputs, as old exporters do."""
    graph = b"".join(field(1, item) for item in nodes) + field(2, "graph")
    graph += b"".join(field(5, tensor(array, name, name.startswith("packed"))) for name, array in constants.items())
    listed = [(name, array.shape) for name, array in constants.items() if name.startswith("packed")]
    graph += b"".join(field(11, value_info(name, size)) for name, size in [("x", shape), *((extra, shape) for extra in inputs), *listed])
    graph += field(12, field(1, output) + field(2, field(1, field(1, 1))))
    return field(1, 7) + field(7, graph) + field(8, field(1, "") + field(2, 11))


RANDOM = np.random.Generator(np.random.PCG64(0))
CONV = {"dilations": (1, 1), "kernel_shape": (3, 3), "pads": (1, 1, 1, 1)}


def weights(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


EVERY_OPERATOR = model(
    [
        node("Sub", "x packed_shift", "a"),
        node("Mul", "a packed_scale", "b"),
        node("Conv", "b w1 b1", "c", strides=(2, 2), group=1, **CONV),
        node("BatchNormalization", "c gain bias mean variance", "d", epsilon=0.01),
        node("PRelu", "d slope", "e"),
        node("Conv", "e w2", "f", strides=(1, 1), group=4, **CONV),
        node("Add", "f e", "g"),
        node("Relu", "g", "h"),
        node("MaxPool", "h", "i", kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1)),
        node("AveragePool", "i", "j", kernel_shape=(2, 2), strides=(2, 2)),
        node("Dropout", "j", "k"),
        node("Constant", "", "shape", value=tensor(np.array([1, -1], np.int64))),
        node("Reshape", "k shape", "l"),
        node("Gemm", "l w3 b3", "m", alpha=1.0, beta=1.0, transB=1),
        node("Flatten", "m", "y", axis=1),
    ],
    {
        "packed_shift": np.full((1,), 0.5, np.float32),
        "packed_scale": np.full((1,), 2.0, np.float32),
        "w1": weights(4, 3, 3, 3),
        "b1": weights(4),
        "gain": weights(4),
        "bias": weights(4),
        "mean": weights(4),
        "variance": weights(4) ** 2,
        "slope": weights(4, 1, 1),
        "w2": weights(4, 1, 3, 3),
        "w3": weights(5, 16),
        "b3": weights(5),
    },
    (1, 3, 16, 16),
    "y",
)


def run_onnx(source: bytes | str, x: torch.Tensor) -> np.ndarray:
    session = ort.InferenceSession(source)
    output: np.ndarray = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    return output


def test_every_operator_equals_onnxruntime() -> None:
    network = OnnxNetwork(EVERY_OPERATOR).eval()
    x = torch.from_numpy(weights(3, 3, 16, 16))
    expected = np.concatenate([run_onnx(EVERY_OPERATOR, x[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(network(x).numpy(), expected, rtol=0, atol=1e-4 * np.abs(expected).max())  # all at once: any batch size
    assert expected.std() > 0.1
    x.requires_grad_()
    network(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


def test_a_tensor_on_the_way_can_be_asked_for() -> None:
    network = OnnxNetwork(EVERY_OPERATOR, "c")
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 4, 8, 8)
    assert len(network.state_dict()) == 4  # nothing that leads elsewhere is kept
    with pytest.raises(ValueError, match="no tensor 'nowhere'"):
        OnnxNetwork(EVERY_OPERATOR, "nowhere")


@pytest.mark.parametrize(
    ("nodes", "inputs", "message"),
    [
        ([node("Tanh", "x", "a"), node("LSTM", "a", "y")], (), "operators that are not read here: LSTM, Tanh"),
        ([node("Add", "x z", "y")], ("z",), "one input, got 2: x, z"),
    ],
)
def test_other_networks_are_refused(nodes: list[bytes], inputs: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnnxNetwork(model(nodes, {}, (1, 3), "y", *inputs))


def test_what_an_operator_does_not_do_here_is_refused() -> None:
    shape = {"shape": np.array([1, 3, -1], np.int64)}
    with pytest.raises(ValueError, match=r"only flattening is read as Reshape here, got \[1, 3, -1\]"):
        OnnxNetwork(model([node("Reshape", "x shape", "y")], shape, (1, 3, 2, 2), "y"))(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="same padding on opposite sides"):
        pool = node("MaxPool", "x", "y", kernel_shape=(2, 2), strides=(2, 2), pads=(0, 0, 1, 1))
        OnnxNetwork(model([pool], {}, (1, 3, 2, 2), "y"))(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="only float32 and int64"):
        OnnxNetwork(model([node("Add", "x z", "y")], {"z": np.zeros(1)}, (1, 3), "y"))


PUBLISHED = [("arcface_mbf", 112, "", 1.0), ("sface", 112, "", 255.0), ("head_pose_6drepnet", 224, "/linear_reg/Gemm_output_0", 1.0)]


@pytest.mark.parametrize(("name", "side", "output", "scale"), PUBLISHED, ids=[case[0] for case in PUBLISHED])
def test_published_networks_equal_onnxruntime(name: str, side: int, output: str, scale: float) -> None:
    try:
        path = weight_path(name)
    except WeightsError as error:
        pytest.skip(str(error))
    x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * scale
    with torch.inference_mode():
        ours = OnnxNetwork.load(name, output)(x).numpy()
    expected = run_onnx(str(path), x)
    if output:  # the published graph makes a rotation of the six numbers: its first column is their first half, normalised
        ours, expected = ours[:, :3] / np.linalg.norm(ours[:, :3]), expected[:, :, 0]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_faces_go_one_by_one_on_the_cpu() -> None:
    sizes = []

    def network(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return batch.sum(1, keepdim=True)

    assert in_batches_of_one_on_cpu(network, torch.ones(3, 2)).tolist() == [[2], [2], [2]]
    assert sizes == [1, 1, 1]
    assert in_batches_of_one_on_cpu(network, torch.ones(0, 2)).shape == (0, 1)
