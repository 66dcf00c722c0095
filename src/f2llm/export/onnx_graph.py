"""An ONNX graph under construction: nodes and weights, and the three ways in which a weight matrix is multiplied.

Only operators of the standard are used, none of one runtime's own: opset 23, the first with attention. A value is known
by its name. Asking twice for the same operator on the same values gives the same name, so that nothing is computed
twice, whoever asks.

Shape suffixes: T rows of a batch, I inputs and O outputs of a matrix, V rows of the embedding table, E hidden width.
"""

from collections.abc import Callable
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from f2llm.export.runtimes import require

OPSET, IR_VERSION = 23, 11
ALIGNMENT = 4096  # of tensors in the data file, so that a runtime can map them
TINY = float(np.finfo(np.float32).tiny)  # instead of zero, where it is divided by
SMALL = 64  # bytes of a constant that is looked up by content

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


class Graph:
    """Nodes and weights; `graph(op, *inputs, **attributes)` adds a node and gives the name of its output."""

    def __init__(self, data: IO[bytes] | None = None, data_name: str = "") -> None:
        """With `data`, weights go to that file, one after another, and the model refers to it as `data_name`."""
        self._onnx = require("onnx")
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._known: dict[Any, str] = {}
        self._data, self._data_name = data, data_name

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        key = (op, inputs, str(sorted(attributes.items())))
        if key not in self._known:
            name = f"{op.lower()}_{len(self._nodes)}"
            self._nodes.append(self._onnx.helper.make_node(op, list(inputs), [name], name=name, **attributes))
            self._known[key] = name
        return self._known[key]

    def tensor(self, array: Array, name: str | None = None) -> str:
        """A weight or constant."""
        key = (array.dtype.str, array.shape, array.tobytes() if array.nbytes <= SMALL else name)
        if key not in self._known:
            name = name or f"constant_{len(self._weights)}"
            self._weights.append(self._stored(np.ascontiguousarray(array), name))
            self._known[key] = name
        return self._known[key]

    def ints(self, *values: int) -> str:
        """An int64 constant [len(values)]."""
        return self.tensor(np.array(values, np.int64))

    def whole(self, value: int) -> str:
        """An int64 scalar."""
        return self.tensor(np.array(value, np.int64))

    def real(self, value: float) -> str:
        """A float32 scalar."""
        return self.tensor(np.array(value, np.float32))

    def cast(self, x: str, dtype: str) -> str:
        """`dtype` is an ONNX name, such as FLOAT."""
        return self("Cast", x, to=self._onnx.TensorProto.DataType.Value(dtype))

    def model(self, inputs: dict[str, list[str]], result: str, output: str, shape: list[str | int]) -> bytes:
        """The model file.

        Args:
            inputs: names of the int64 inputs and of their dimensions.
            result: the value that is given out, float32, under the name `output`.
        """
        helper, types = self._onnx.helper, self._onnx.TensorProto
        graph = helper.make_graph(
            [*self._nodes, helper.make_node("Identity", [result], [output], name=output)],
            "f2llm",
            [helper.make_tensor_value_info(name, types.INT64, dims) for name, dims in inputs.items()],
            [helper.make_tensor_value_info(output, types.FLOAT, shape)],
            self._weights,
        )
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="f2llm")
        written: bytes = model.SerializeToString()
        return written

    def _stored(self, array: Array, name: str) -> Any:
        if self._data is None or array.nbytes <= SMALL:
            return self._onnx.numpy_helper.from_array(array, name)
        offset = self._data.tell() + -self._data.tell() % ALIGNMENT
        self._data.write(b"\0" * (offset - self._data.tell()) + array.tobytes())
        kind = self._onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = self._onnx.TensorProto(name=name, data_type=kind, dims=array.shape)
        tensor.data_location = self._onnx.TensorProto.EXTERNAL
        for key, value in (("location", self._data_name), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


# x [T, I] times the transposed weight [O, I] that has this name -> [T, O]
Linear = Callable[[Graph, str, str, Floats], str]


def float_linear(graph: Graph, x: str, name: str, weight_OI: Floats) -> str:
    """float32 throughout."""
    return graph("MatMul", x, graph.tensor(weight_OI.T, name))


def int8_linear(graph: Graph, x: str, name: str, weight_OI: Floats) -> str:
    """Weights and inputs in 8 bits, products in whole numbers; each row of x has a scale of its own.

    With one scale for the whole of x, which is what a runtime's own dynamic quantisation takes, a text's vector would
    depend on the texts beside it. Weights keep to 7 bits: two products of 8 bits overflow the 16 in which processors
    with AVX2 alone add them.

    QuantizeLinear is meant for scales that are known beforehand, by channel; here the channels are the rows of x. So x
    is read twice and written once in 8 bits; what the scale would take in single operators (Abs, Div, Round, Add, Cast)
    costs more than the product itself, where processors multiply 8 bits (VNNI, AMX). The product, its Cast and its Mul
    by the weights' scales are one kernel in ONNX Runtime, if the Mul is by a product of two scales that are not both
    constants: hence the one that is computed.
    """
    most_T = graph("Max", _extreme(graph, "ReduceMax", x), graph("Neg", _extreme(graph, "ReduceMin", x)))
    scale_T = graph("Max", graph("Mul", most_T, graph.real(1 / 127)), graph.real(TINY))
    zero = graph.tensor(np.array(128, np.uint8))
    zero_T = graph("Expand", zero, graph("Shape", scale_T))
    weight_IO, scale_O = quantised(weight_OI, 63)
    product = graph(
        "MatMulInteger",
        graph("QuantizeLinear", x, scale_T, zero_T, axis=0),
        graph.tensor(weight_IO.T, name),
        zero,
    )
    scale = graph("Mul", _computed_one(graph, scale_T), graph.tensor(scale_O[:, 0], name + "_scale"))
    by_weights = graph("Mul", graph.cast(product, "FLOAT"), scale)
    return graph("Mul", by_weights, graph("Unsqueeze", scale_T, graph.ints(1)))


def _computed_one(graph: Graph, x_T: str) -> str:
    """A scalar 1 that no runtime can know before it sees the input."""
    return graph("Squeeze", graph.cast(graph("Min", graph("Shape", x_T), graph.ints(1)), "FLOAT"))


def _extreme(graph: Graph, op: str, x: str) -> str:
    """Largest or smallest number of each row."""
    return graph(op, x, graph.ints(-1), keepdims=0)


def int8_weight_linear(graph: Graph, x: str, name: str, weight_OI: Floats) -> str:
    """Weights alone in 8 bits; how to multiply them is left to the runtime (OpenVINO knows this pattern)."""
    weight_IO, scale_O = quantised(weight_OI, 127)
    stored, scale = graph.tensor(weight_IO.T, name), graph.tensor(scale_O[:, 0], name + "_scale")
    return graph("MatMul", x, graph("DequantizeLinear", stored, scale, axis=1))


def rows_of(graph: Graph, ids: str, name: str, table_VE: Floats, int8: bool) -> str:
    """Rows of the embedding table, float32 [T, E]; with `int8` it is stored in 8 bits, with a scale for each row."""
    if not int8:
        return graph("Gather", graph.tensor(table_VE, name), ids, axis=0)
    stored_VE, scale_V1 = quantised(table_VE, 127)
    rows = graph.cast(graph("Gather", graph.tensor(stored_VE, name), ids, axis=0), "FLOAT")
    return graph("Mul", rows, graph("Gather", graph.tensor(scale_V1, name + "_scale"), ids, axis=0))


def quantised(weight_OI: Floats, most: int) -> tuple[npt.NDArray[np.int8], Floats]:
    """Whole numbers of at most `most`, and the scale [O, 1] of each row: w = number * scale, rounded."""
    scale_O1 = np.abs(weight_OI).max(1, keepdims=True) / np.float32(most)
    scale_O1[scale_O1 == 0] = 1
    return np.rint(weight_OI / scale_O1).astype(np.int8), scale_O1
