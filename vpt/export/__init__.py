"""A trained model is exported: as an adapter of peft, or as one file that runs without this package."""

from vpt.export.onnx_torch import export_onnx, export_torch, fold
from vpt.export.peft import export_peft

__all__ = ["export_onnx", "export_peft", "export_torch", "fold"]
