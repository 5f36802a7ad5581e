"""Feed-forward ONNX networks as PyTorch modules: any batch size, any device, differentiable.

Reads what convolutional networks of classification shape need; any other operator is an error. Open only files whose digest was checked.
Source: the ONNX operator pages (opset 11 and 12) and `onnx.proto3`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e4s_models.face_mesh import message_fields as fields
from e4s_models.weights import WeightsError, weight_path

if TYPE_CHECKING:
    from typing import Self

Attributes = Mapping[str, Any]  # int, float, list of int, or bytes of a message that is not read

_FLOAT, _INT64 = 1, 7  # TensorProto.DataType
_DTYPES: Mapping[int, np.dtype[Any]] = {_FLOAT: np.dtype("<f4"), _INT64: np.dtype("<i8")}


@dataclass(frozen=True)
class _Node:
    operator: str
    inputs: tuple[str, ...]
    output: str
    attributes: Attributes


class OnnxNetwork(nn.Module):
    """An ONNX graph from its one free input to one of its tensors. Parameters are frozen; gradients flow to the input."""

    def __init__(self, model: bytes, output: str = "") -> None:
        """Read the graph; `output` names the tensor wanted, the graph's first output if empty.

        Raises ValueError when the graph has an operator that is not known here, or several free inputs.
        """
        super().__init__()
        graph = next(value for number, value in fields(model) if number == 7)
        nodes: list[_Node] = []
        constants: dict[str, Tensor] = {}
        inputs: list[str] = []
        outputs: list[str] = []
        for number, value in fields(graph):
            if number == 1:
                nodes.append(_read_node(value))
            elif number == 5:
                name, tensor = _read_tensor(value)
                constants[name] = tensor
            elif number in (11, 12):
                (inputs if number == 11 else outputs).append(dict(fields(value))[1].decode())
        free = [name for name in inputs if name not in constants]
        if len(free) != 1:
            raise ValueError(f"expected a network with one input, got {len(free)}: {', '.join(free)}")
        self._input, self._output = free[0], output or outputs[0]
        self._nodes = _needed(nodes, self._output)
        unknown = sorted({node.operator for node in self._nodes} - set(_OPERATORS) - {"Constant"})
        if unknown:
            raise ValueError(f"the network uses operators that are not read here: {', '.join(unknown)}")
        for node in self._nodes:
            if node.operator == "Constant":
                constants[node.output] = _read_tensor(node.attributes["value"])[1]
        self._nodes = [node for node in self._nodes if node.operator != "Constant"]
        self._names: dict[str, str] = {}  # of the graph -> of the buffer
        for name in sorted({name for node in self._nodes for name in node.inputs} & set(constants)):
            self._names[name] = f"constant{len(self._names)}"
            self.register_buffer(self._names[name], constants[name])

    @classmethod
    def load(cls, name: str, output: str = "") -> Self:
        """Open the verified weights of that registry name. Raises WeightsError when the file does not fit."""
        path: Path = weight_path(name)
        try:
            return cls(path.read_bytes(), output).eval()
        except (ValueError, KeyError, StopIteration, struct.error) as error:
            raise WeightsError(f"{path} ({name}) cannot be read as a network: {error}") from error

    def forward(self, batch: Tensor) -> Tensor:
        """Run the graph: the input's shape with any batch size -> the wanted tensor, batch first."""
        return self.tensors(batch, (self._output,))[0]

    def tensors(self, batch: Tensor, names: Sequence[str]) -> list[Tensor]:
        """As `forward`, for several tensors on the way to the wanted one, by their names in the graph. Raises KeyError for others."""
        values = {name: self.get_buffer(buffer) for name, buffer in self._names.items()} | {self._input: batch}
        for node in self._nodes:
            values[node.output] = _OPERATORS[node.operator](node.attributes, *(values[name] for name in node.inputs))
        return [values[name] for name in names]


def in_batches_of_one_on_cpu(network: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """Apply a network to (B, ...): at once on an accelerator, one by one on the CPU.

    CPU kernels choose their summation order by the batch size; one by one, a face's feature does not depend on its neighbours. On few
    cores nothing is lost.
    """
    if batch.device.type != "cpu" or len(batch) < 2:
        return network(batch)
    return torch.cat([network(batch[index : index + 1]) for index in range(len(batch))])


def _needed(nodes: list[_Node], output: str) -> list[_Node]:
    """The nodes that lead to a tensor, in their order."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if node.output in wanted:
            kept.append(node)
            wanted.update(node.inputs)
    if not kept:
        raise ValueError(f"the network has no tensor {output!r}")
    return kept[::-1]


def _read_node(message: bytes) -> _Node:
    inputs, outputs, operator, attributes = [], [], "", {}
    for number, value in fields(message):
        if number == 1:
            inputs.append(value.decode())
        elif number == 2:
            outputs.append(value.decode())
        elif number == 4:
            operator = value.decode()
        elif number == 5:
            name, content = _read_attribute(value)
            attributes[name] = content
    return _Node(operator, tuple(inputs), outputs[0], attributes)


def _read_attribute(message: bytes) -> tuple[str, Any]:
    name, content = "", None
    integers: list[int] = []
    for number, value in fields(message):
        if number == 1:
            name = value.decode()
        elif number == 2:
            content = struct.unpack("<f", value)[0]
        elif number in (3, 5):  # an int, or a tensor's message
            content = value
        elif number == 8:
            integers.append(value)
    return name, integers or content


def _read_tensor(message: bytes) -> tuple[str, Tensor]:
    name, raw, kind = "", b"", 0
    shape: list[int] = []
    for number, value in fields(message):
        if number == 1:
            shape.append(value)
        elif number == 2:
            kind = value
        elif number in (4, 9):  # float_data (packed) or raw_data: the same bytes for float32
            raw = raw + value
        elif number == 8:
            name = value.decode()
    if kind not in _DTYPES:
        raise ValueError(f"tensor {name!r} has the ONNX type {kind}, only float32 and int64 are read here")
    array = np.frombuffer(raw, _DTYPES[kind]).reshape(shape)
    return name, torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=True))


def _conv(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(
        x, weight, bias, attributes["strides"], _padding(attributes), attributes.get("dilations", [1, 1]), attributes.get("group", 1)
    )


def _padding(attributes: Attributes) -> list[int]:
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    if (top, left) != (bottom, right):
        raise ValueError(f"only the same padding on opposite sides is read here, got {attributes['pads']}")
    return [top, left]


def _batch_norm(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=attributes["epsilon"])


def _prelu(attributes: Attributes, x: Tensor, slope: Tensor) -> Tensor:
    return F.prelu(x, slope.flatten())


def _gemm(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1 or attributes.get("beta", 1.0) != 1:
        raise ValueError("only a plain linear layer is read as Gemm here")
    return F.linear(x, weight if attributes.get("transB", 0) else weight.T, bias)


def _max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    return F.max_pool2d(x, attributes["kernel_shape"], attributes["strides"], _padding(attributes))


def _average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, attributes["kernel_shape"], attributes["strides"], _padding(attributes))


def _reshape(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    if shape.tolist() != [1, -1]:  # the exporter's batch of one, everything else flattened
        raise ValueError(f"only flattening is read as Reshape here, got {shape.tolist()}")
    return x.flatten(1)


_OPERATORS: Mapping[str, Callable[..., Tensor]] = {
    "Add": lambda attributes, a, b: a + b,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "Dropout": lambda attributes, x: x,
    "Flatten": lambda attributes, x: x.flatten(1),
    "Gemm": _gemm,
    "MaxPool": _max_pool,
    "Mul": lambda attributes, a, b: a * b,
    "PRelu": _prelu,
    "Relu": lambda attributes, x: x.relu(),
    "Reshape": _reshape,
    "Sub": lambda attributes, a, b: a - b,
}
