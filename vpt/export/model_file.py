"""One file that runs without this package: ONNX, or PyTorch's exported program."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import vpt
from vpt.errors import ExportError
from vpt.export.check import Check, Run, check
from vpt.export.fold import fold
from vpt.tuning.model import TunedModel
from vpt.tuning.public import about

FORMAT = "vpt-model/1"
OPSET = 20  # the first with Gelu
_NEEDED = ("onnx", "onnxruntime", "onnxscript")


def export_onnx(model: TunedModel, path: str | Path) -> Check:
    """Writes a model as an ONNX file: uint8 ``images`` (batch, 3, H, W) to float32 ``logits`` (batch, classes).

    Normalisation is inside; deep prompts are constant keys and values. What `about` tells, as JSON, and the format are
    the file's metadata, each under its own key.

    Args:
        model: In eval mode, on the CPU.
        path: Ends in ``.onnx``; parent folders are made. Written beside and renamed when it was checked.

    Returns:
        What the check of the written file measured.

    Raises:
        ExportError: A library is missing, the composition cannot be exported, or the file is another function.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ExportError(
            f"ONNX export needs {', '.join(missing)}: pip install 'vpt[onnx]', or use --format torch, which needs "
            "nothing more."
        )
    return _export(model, Path(path), ".onnx", _write_onnx, _run_onnx)


def export_torch(model: TunedModel, path: str | Path) -> Check:
    """Writes a model as an exported program of PyTorch; input and output as those of `export_onnx`.

    ``torch.export.load(path, extra_files={"vpt.json": ""})`` gives it back, and what `about` tells in the dict.

    Args:
        model: In eval mode, on the CPU.
        path: Ends in ``.pt2``; parent folders are made. Written beside and renamed when it was checked.

    Returns:
        What the check of the written file measured.

    Raises:
        ExportError: The composition cannot be exported, or the file is another function.
    """
    return _export(model, Path(path), ".pt2", _write_torch, _run_torch)


def _export(
    model: TunedModel,
    path: Path,
    suffix: str,
    write: Callable[[torch.export.ExportedProgram, dict[str, Any], Path], None],
    load: Callable[[Path], Run],
) -> Check:
    if path.suffix != suffix:
        raise ExportError(f"The file to write ends in {suffix}, got {path}.")
    told = {"format": FORMAT, "vpt": vpt.__version__} | about(model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=".export-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exporters warn about their own insides
            partial = Path(folder, path.name)
            write(_traced(model), told, partial)
            measured = check(model, load(partial))
            partial.replace(path)
    except ExportError:
        raise
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}.") from error
    except Exception as error:  # of whatever class: an operation, a shape or a control flow that has no translation
        raise ExportError(
            f"This composition on {model.backbone.name} cannot be written as {suffix[1:]}: {_first_line(error)}"
        ) from error
    return measured


@torch.no_grad()
def _traced(model: TunedModel) -> torch.export.ExportedProgram:
    """The folded model as a graph of any batch size, without the places of the source that it came from."""
    size = model.backbone.image_size
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)  # 1 would be taken for a constant
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(fold(model), (images,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _write_torch(program: torch.export.ExportedProgram, told: dict[str, Any], path: Path) -> None:
    program.example_inputs = None  # the only part that would be pickled
    torch.export.save(program, path, extra_files={"vpt.json": json.dumps(told)})


def _run_torch(path: Path) -> Run:
    return torch.export.load(path).module()


def _write_onnx(program: torch.export.ExportedProgram, told: dict[str, Any], path: Path) -> None:
    written: Any = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: "batch"}},
    )
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()  # traces of the export, longer than the graph
    for key, value in told.items():
        written.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    written.save(path, external_data=False)


def _run_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as the eager model has
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return run


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no reason given'}"
