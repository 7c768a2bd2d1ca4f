"""The version of this package, and those of the packages that numbers depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"

_MODEL = ("torch", "lightning", "timm", "torchvision", "torchmetrics")
_OPTIONAL = ("simplejpeg", "tifffile", "imagecodecs")
_PIXELS = ("pillow", "numpy", "albumentations", "opencv-python-headless")


def pixel_versions() -> dict[str, str]:
    """Returns the versions of what decodes, resizes and augments images, by package; of optional ones if here."""
    found = {name: _version(name) for name in (*_PIXELS, *_OPTIONAL)}
    return {name: number for name, number in found.items() if name not in _OPTIONAL or number != "unknown"}


def versions() -> dict[str, str]:
    """Returns the versions of all that a number may depend on, by package, Python's and this one's among them."""
    found = {name: _version(name) for name in _MODEL} | pixel_versions()
    return found | {"vpt": __version__, "python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # another distribution of the same module, such as opencv-python
        return "unknown"
