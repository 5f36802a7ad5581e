from pathlib import Path

import numpy as np
import pytest

from e4s_models.openvino_ir import Graph, read_ir

XML = """<?xml version="1.0"?>
<net name="tiny" version="10">
  <layers>
    <layer id="0" name="x" type="Parameter"><data shape="1,2" element_type="f32"/>
      <output><port id="0"><dim>1</dim><dim>2</dim></port></output></layer>
    <layer id="1" name="two" type="Const"><data element_type="f32" shape="1, 2" offset="8" size="8"/></layer>
    <layer id="2" name="axis" type="Const"><data element_type="i64" shape="" offset="0" size="8"/></layer>
    <layer id="3" name="sum" type="Add"><data auto_broadcast="numpy"/></layer>
    <layer id="4" name="out" type="Result"/>
  </layers>
  <edges>
    <edge from-layer="1" from-port="0" to-layer="3" to-port="1"/>
    <edge from-layer="0" from-port="0" to-layer="3" to-port="0"/>
    <edge from-layer="3" from-port="2" to-layer="4" to-port="0"/>
  </edges>
</net>"""


def graph(folder: Path, xml: str = XML, payload: bytes = np.int64(7).tobytes() + np.float32([1.5, -2]).tobytes()) -> Graph:
    (folder / "net.xml").write_text(xml)
    (folder / "net.bin").write_bytes(payload)
    return read_ir(folder / "net.xml", folder / "net.bin")


def test_layers_edges_and_constants(tmp_path: Path) -> None:
    net = graph(tmp_path)
    assert [layer.name for layer in net] == ["x", "two", "axis", "sum", "out"]
    add = net.layers[3]
    assert add.inputs == (0, 1)  # by port, not by the order of the edges
    assert net.source(add, 1).name == "two"
    assert net.layers[0].shape == (1, 2)
    assert net.following(net.layers[0], "Add") is add
    np.testing.assert_array_equal(net.constant_of(add), np.float32([[1.5, -2]]))
    assert net.constant(net.layers[2]) == 7
    assert net.constant(net.layers[2]).shape == ()


def test_constants_cannot_be_changed(tmp_path: Path) -> None:
    value = graph(tmp_path).constant_of(graph(tmp_path).layers[3])
    with pytest.raises(ValueError, match="read-only"):
        value[0, 0] = 1


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    cut = graph(tmp_path, payload=b"\0" * 12)
    with pytest.raises(ValueError, match=r"bytes 8 to 16.*BIN file of 12 bytes"):
        cut.constant_of(cut.layers[3])
    misshapen = graph(tmp_path, XML.replace('shape="1, 2"', 'shape="1, 3"'))
    with pytest.raises(ValueError, match="does not fit its shape"):
        misshapen.constant_of(misshapen.layers[3])
    unknown = graph(tmp_path, XML.replace('element_type="i64"', 'element_type="u4"'))
    with pytest.raises(ValueError, match="element type u4"):
        unknown.constant(unknown.layers[2])


@pytest.mark.parametrize("xml", ["", "<net/>", "<net><layers/>"])
def test_not_an_ir_file(tmp_path: Path, xml: str) -> None:
    with pytest.raises(ValueError, match="is not an OpenVINO IR file"):
        graph(tmp_path, xml)


def test_walking_a_graph_of_another_shape(tmp_path: Path) -> None:
    net = graph(tmp_path)
    with pytest.raises(ValueError, match="expected one MatMul after layer x, got 0"):
        net.following(net.layers[0], "MatMul")
    with pytest.raises(ValueError, match="expected one constant input of layer out"):
        net.constant_of(net.layers[4])
    with pytest.raises(ValueError, match="is a Add, not a Const"):
        net.constant(net.layers[3])
