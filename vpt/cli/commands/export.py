"""``vpt export`` and ``vpt push``: a trained model as one file for other programs, or on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from vpt.cli.arguments import WEIGHTS_HELP, Parser, check_effect

_FORMATS = (
    "onnx, torch: one file, model.onnx or model.pt2, from uint8 images to logits; peft: a LoRA, DoRA, VeRA or MLAE"
)
_PLACES = {"onnx": "model.onnx", "torch": "model.pt2", "peft": "peft"}


def run(args: list[str]) -> None:
    """Runs one of the two commands."""
    {"export": _export, "push": _push}[args[0]](args)


def _push(args: list[str]) -> None:
    """Parses the command line and uploads."""
    parser = Parser(prog="vpt push")
    parser.add_argument("--delta", type=Path, required=True, help="delta.safetensors of a run")
    parser.add_argument("--repo", required=True, help="user/name; made if it is not there")
    parser.add_argument("--private", action="store_true", help="nobody else sees it; refused where it is public")
    parser.add_argument("--endpoint", help="URL of the hub (default: HF_ENDPOINT, or the public one)")
    options = parser.parse_args(args[1:])

    from vpt.hub.client import push

    print(f"pushed to {push(options.delta, options.repo, options.private, options.endpoint)}")
    print(f'load it with vpt.load("hf://{options.repo}")')


def _export(args: list[str]) -> None:
    """Parses the command line and writes the files."""
    parser = Parser(prog="vpt export")
    parser.add_argument("--delta", type=Path, required=True, help="delta.safetensors of a run")
    parser.add_argument("--format", choices=list(_PLACES), required=True, help=_FORMATS)
    parser.add_argument("--weights", help=WEIGHTS_HELP)
    strengths = "α, those of the first and the last layer, of all, or a file of `vpt robustness strengths` (default: 1)"
    parser.add_argument("--strengths", nargs="+", help=strengths)
    anchor = "with --strengths: delta file of a linear probe, whose head belongs to strength 0"
    parser.add_argument("--anchor", type=Path, help=anchor)
    parser.add_argument("--out", type=Path, help="file, or folder for peft (default: beside the delta)")
    options = parser.parse_args(args[1:])
    if options.strengths is None:
        check_effect(options, "without --strengths", "anchor")

    from vpt.atomic_write import check_unused, check_writable
    from vpt.export import export_onnx, export_peft, export_torch
    from vpt.export.peft import PEFT_FILES
    from vpt.models.delta_file import load_classifier
    from vpt.robustness.layer_strengths import strengths_of
    from vpt.robustness.wise_ft import weakened

    out = options.out or options.delta.parent / _PLACES[options.format]
    check_writable(out, folder=options.format == "peft")
    if options.out is not None:
        for path in [out / name for name in PEFT_FILES] if options.format == "peft" else [out]:
            check_unused(path)
    if options.strengths is None:
        model = load_classifier(options.delta, options.weights)
    else:
        model = weakened(
            options.delta,
            strengths_of(options.strengths, options.delta, options.anchor),
            options.anchor,
            options.weights,
        )
    model = model.float()  # other runtimes know it best
    if options.format == "peft":
        export_peft(model, out)
    else:
        print({"onnx": export_onnx, "torch": export_torch}[options.format](model, out))
    print(f"written to {out}")
