"""Reader of OpenVINO IR networks (version 10 and 11): an XML graph beside a BIN file of constants, into numpy.

Reads what a port to plain PyTorch needs (layers, edges, constants) and runs nothing. Open only files whose digest was checked.
Source: OpenVINO's "Operation sets" and "IR format" pages.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_DTYPES = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "i32": np.int32, "i64": np.int64, "u8": np.uint8, "boolean": np.bool_}


@dataclass(frozen=True)
class Layer:
    """One node of the graph."""

    id: int
    name: str
    kind: str  # operation type: "Const", "Convolution", "Add", ...
    attributes: Mapping[str, str]
    shape: tuple[int, ...] = ()  # of its first output
    inputs: tuple[int, ...] = ()  # ids of the layers that feed it, in port order


@dataclass(frozen=True)
class Graph:
    """A network: its layers by id, in the file's (topological) order, and the bytes of its constants."""

    layers: Mapping[int, Layer]
    payload: bytes
    _consumers: dict[int, list[int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for layer in self.layers.values():
            for source in layer.inputs:
                self._consumers.setdefault(source, []).append(layer.id)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers.values())

    def source(self, layer: Layer, port: int) -> Layer:
        """The layer that feeds input `port` (0, 1, ...) of `layer`."""
        return self.layers[layer.inputs[port]]

    def sources(self, layer: Layer) -> list[Layer]:
        return [self.layers[i] for i in layer.inputs]

    def consumers(self, layer: Layer) -> list[Layer]:
        """The layers that read an output of `layer`."""
        return [self.layers[i] for i in self._consumers.get(layer.id, [])]

    def following(self, layer: Layer, kind: str) -> Layer:
        """The only consumer of `layer` that is of this kind. Raises ValueError when there is none or more than one."""
        found = [consumer for consumer in self.consumers(layer) if consumer.kind == kind]
        if len(found) != 1:
            raise ValueError(f"expected one {kind} after layer {layer.name}, got {len(found)}")
        return found[0]

    def constant_of(self, layer: Layer) -> Array:
        """Value of the only Const among the inputs of `layer`. Raises ValueError when there is none or more than one."""
        found = [source for source in self.sources(layer) if source.kind == "Const"]
        if len(found) != 1:
            raise ValueError(f"expected one constant input of layer {layer.name} ({layer.kind}), got {len(found)}")
        return self.constant(found[0])

    def constant(self, layer: Layer) -> Array:
        """Value of a Const layer: a read-only view of the BIN file's bytes. Raises ValueError when the two files do not fit."""
        if layer.kind != "Const":
            raise ValueError(f"layer {layer.name} is a {layer.kind}, not a Const")
        element_type = layer.attributes["element_type"]
        if element_type not in _DTYPES:
            raise ValueError(f"constant {layer.name} has element type {element_type}; known are {', '.join(_DTYPES)}")
        dtype = np.dtype(_DTYPES[element_type])
        shape = tuple(int(size) for size in layer.attributes["shape"].split(",") if size.strip())
        offset, size = int(layer.attributes["offset"]), int(layer.attributes["size"])
        if size != math.prod(shape) * dtype.itemsize or offset + size > len(self.payload):
            raise ValueError(
                f"constant {layer.name} {shape} {element_type} lies at bytes {offset} to {offset + size}: "
                f"it does not fit its shape or the BIN file of {len(self.payload)} bytes; download both files again"
            )
        return np.frombuffer(self.payload, dtype, math.prod(shape), offset).reshape(shape)


def read_ir(xml: Path, payload: Path) -> Graph:
    """Read a network from its XML and BIN files. Raises ValueError when the XML is not an IR graph."""
    try:
        root = ElementTree.parse(xml).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{xml} is not an OpenVINO IR file: {error}") from error
    layers, edges = root.find("layers"), root.find("edges")
    if layers is None or edges is None:
        raise ValueError(f"{xml} is not an OpenVINO IR file: it lists no layers or no edges")
    inputs: dict[int, dict[int, int]] = {}
    for edge in edges:
        inputs.setdefault(int(edge.attrib["to-layer"]), {})[int(edge.attrib["to-port"])] = int(edge.attrib["from-layer"])
    found: dict[int, Layer] = {}
    for element in layers:
        data, port, number = element.find("data"), element.find("output/port"), int(element.attrib["id"])
        found[number] = Layer(
            id=number,
            name=element.attrib["name"],
            kind=element.attrib["type"],
            attributes={} if data is None else dict(data.attrib),
            shape=() if port is None else tuple(int(size.text or "") for size in port.findall("dim")),
            inputs=tuple(source for _, source in sorted(inputs.get(number, {}).items())),
        )
    return Graph(found, payload.read_bytes())
