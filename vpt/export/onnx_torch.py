"""A tuned model as inference needs it, and as one file that runs without this package: ONNX or PyTorch's program."""

from __future__ import annotations

import copy
import io
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vpt.argument_types import checked
from vpt.atomic_write import atomic_write, check_writable
from vpt.deltas.base import DeltaPart, MergeablePart
from vpt.deltas.composition import Delta
from vpt.deltas.extra_key_values import ExtraKeys, FixedKeys
from vpt.deltas.partial_tuning import Subset
from vpt.errors import ExportError
from vpt.models.classifier import TunedModel, ValueHead
from vpt.models.delta_format import about
from vpt.version import __version__

FORMAT = "vpt-model/1"
OPSET = 20  # the first with Gelu
TOLERANCE = 1e-4
_BATCHES = (1, 3)  # one image is the size at which exporters specialise, three is none that they have seen
_REPEATS = 9

Run = Callable[[Tensor], Tensor]


@checked
@torch.no_grad()
def fold(model: TunedModel) -> TunedModel:
    """Copies a model into a form of the same function that computes nothing but what depends on the image.

    Deep prompts and prefixes become constant keys and values, trained copies of parameters take
    the place of the originals, and a LoRA or SSF that then remains alone is merged into the weights; weights that are
    kept in bfloat16 are brought to fp32, in which the copy computes, but for its rounding the same. The copy is
    frozen, in eval mode and for inference only: its deltas cannot be taken off again, and it has no delta file.
    """
    own = copy.deepcopy(model).eval().requires_grad_(False)
    if own.backbone.folded:
        return own
    own.backbone.widen()
    own.backbone.folded = True
    own._strength = own.strength  # which the model still tells when its delta is gone
    own.settle_head()  # before what gives the strength is taken out
    parts = [cast("DeltaPart", part) for part in own.backbone.attached]
    constant = [part for part in parts if isinstance(part, ExtraKeys) and part.constant]
    # With everything attached: other deltas may change the projections.
    fixed = [part.constants() for part in constant if part.strength != 0.0]
    for part in parts:
        if isinstance(part, Subset):
            part.keep()
        elif part in constant or part.strength == 0.0:
            part.detach()
    left = [cast("DeltaPart", part) for part in own.backbone.attached]
    if len(left) == 1 and isinstance(left[0], MergeablePart):
        left[0].merge_for_good()
        if left[0].merges_wholly:
            left[0].detach()
            left = []
    for block, keys in (item for blocks in fixed for item in blocks.items()):
        FixedKeys(*keys).install(own.backbone.attention_layout.attentions[block])
    own.delta = None
    if left:  # a handle on what still acts, so that its tensors belong to the model
        own.delta = Delta(own.backbone, [])
        own.delta.parts = nn.ModuleList(left)
    return own


@dataclass(frozen=True)
class Check:
    """What was measured on a written file.

    `difference` is max |Δ logit| / max |logit| over random images; `milliseconds` are, by batch size, medians of the
    eager model and of the file.
    """

    difference: float
    milliseconds: dict[int, tuple[float, float]]

    def __str__(self) -> str:
        """One line for the terminal."""
        times = [
            f"batch {n}: {eager:.1f} ms eager, {own:.1f} ms exported" for n, (eager, own) in self.milliseconds.items()
        ]
        return f"largest difference {self.difference:.1e} of the largest logit; {'; '.join(times)}"


@torch.inference_mode()
def check(model: TunedModel, run: Run) -> Check:
    """Compares a written file with the model in eval mode that it was written from, on random images.

    Raises:
        ExportError: The logits differ by more than `TOLERANCE` of the largest.
    """
    worst, milliseconds = 0.0, {}
    for batch in _BATCHES:
        images = model.backbone.random_images(batch, seed=batch)
        expected, found = model(images), run(images)
        if isinstance(model.head, ValueHead):  # without their units, which may be far larger than what differs
            expected, found = ((each - model.head.offset) / model.head.scale for each in (expected, found))
        gap = (found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
        if not float(gap) <= TOLERANCE:  # so that NaN fails too
            raise ExportError(
                f"On {batch} random images the exported file's logits differ by {float(gap):.1e} of the largest logit, "
                f"more than {TOLERANCE:.0e}: nothing was written; please report this composition."
            )
        worst = max(worst, float(gap))
        milliseconds[batch] = _interleaved(model, run, images)
    return Check(worst, milliseconds)


def _interleaved(model: Run, run: Run, images: Tensor) -> tuple[float, float]:
    """Medians in ms, one call of each in turn, so that both see the same load of the machine."""
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(_REPEATS):
        for call, own in zip((model, run), spent, strict=True):
            start = time.perf_counter()
            call(images)
            own.append(1e3 * (time.perf_counter() - start))
    return statistics.median(spent[0]), statistics.median(spent[1])


@checked
def export_onnx(model: TunedModel, path: str | Path) -> Check:
    """Writes a model as an ONNX file: uint8 ``images`` (batch, 3, H, W) to float32 ``logits`` (batch, classes).

    Images of channels are float32 (batch, C, H, W), in their own unit. Normalisation is inside; deep prompts are
    constant keys and values. What `about` tells, as JSON, and the format are the file's metadata, each under its own
    key. The model is in eval mode on the CPU. The path ends in ``.onnx``;
    parent folders are made, and the file is written once it was checked. Returns what that measured.

    Raises:
        ExportError: A library is missing, the composition cannot be exported, or the file is another function.
        OutputError: The file cannot be written there.
    """
    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
        raise ExportError(
            f"ONNX export needs {', '.join(missing)}: pip install 'vpt[onnx]', or use --format torch, which needs "
            "nothing more."
        )
    return _export(model, Path(path), ".onnx", _write_onnx, _run_onnx)


@checked
def export_torch(model: TunedModel, path: str | Path) -> Check:
    """Writes a model as an exported program of PyTorch; input and output as those of `export_onnx`.

    ``torch.export.load(path, extra_files={"vpt.json": ""})`` gives it back, and what `about` tells in the dict. The
    path ends in ``.pt2``.

    Raises:
        ExportError: The composition cannot be exported, or the file is another function.
        OutputError: The file cannot be written there.
    """
    return _export(model, Path(path), ".pt2", _write_torch, _run_torch)


def _export(
    model: TunedModel,
    path: Path,
    suffix: str,
    write: Callable[[torch.export.ExportedProgram, dict[str, Any]], bytes],
    read: Callable[[bytes], Run],
) -> Check:
    if path.suffix != suffix:
        raise ExportError(f"The file to write ends in {suffix}, got {path}.")
    check_writable(path)
    told = {"format": FORMAT, "vpt": __version__} | about(model)
    if model.backbone.narrow:  # a file computes in fp32, of the same weights
        model = copy.deepcopy(model)
        model.backbone.widen()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exporters warn about their own insides
            content = write(_traced(model), told)
            measured = check(model, read(content))
    except ExportError:
        raise
    except Exception as error:  # of whatever class: an operation, a shape or a control flow that has no translation
        raise ExportError(
            f"This composition on {model.backbone.name} cannot be written as {suffix[1:]}: {_first_line(error)}"
        ) from error
    with atomic_write(path) as partial:
        partial.write_bytes(content)
    return measured


@torch.no_grad()
def _traced(model: TunedModel) -> torch.export.ExportedProgram:
    """The folded model as a graph of any batch size, without the places of the source that it came from."""
    images = model.backbone.random_images(2)  # 1 would be taken for a constant
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(fold(model), (images,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _write_torch(program: torch.export.ExportedProgram, told: dict[str, Any]) -> bytes:
    program.example_inputs = None  # the only part that would be pickled
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"vpt.json": json.dumps(told)})
    return file.getvalue()


def _run_torch(content: bytes) -> Run:
    return torch.export.load(io.BytesIO(content)).module()


def _write_onnx(program: torch.export.ExportedProgram, told: dict[str, Any]) -> bytes:
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
    content: bytes = written.model_proto.SerializeToString()
    return content


def _run_onnx(content: bytes) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as the eager model has
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return run


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no reason given'}"
