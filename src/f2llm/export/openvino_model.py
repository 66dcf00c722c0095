"""The same graph as OpenVINO's own files, which OpenVINO makes from the ONNX ones."""

from pathlib import Path

from f2llm.export.onnx_graph import float_linear, int8_weight_linear
from f2llm.export.onnx_model import DATA, MODEL, write_onnx
from f2llm.export.runtimes import require
from f2llm.model.decoder import DecoderConfig

IR = "openvino_model.xml"  # weights stand beside it, in openvino_model.bin


def write_openvino(source: Path, folder: Path, config: DecoderConfig, *, dim: int, precision: str) -> None:
    """Write openvino_model.xml and .bin of a model folder; `precision` is "f32", "f16" or "int8", of the weights.

    In which numbers products are computed, OpenVINO decides when it loads the model.
    """
    openvino = require("openvino")
    linear = int8_weight_linear if precision == "int8" else float_linear
    # One block: OpenVINO is slower with more, as it copies the parts.
    write_onnx(source, folder, config, dim=dim, linear=linear, blocks=1)
    # Not convert_model, which is the same with a report to its makers.
    model = openvino.Core().read_model(folder / MODEL)
    openvino.save_model(model, folder / IR, compress_to_fp16=precision == "f16")
    del model  # it maps the file
    for name in (MODEL, DATA):
        (folder / name).unlink(missing_ok=True)
