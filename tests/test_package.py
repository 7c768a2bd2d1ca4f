from __future__ import annotations

import subprocess
import sys

import pytest

import vpt


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys, vpt; print([name for name in ('torch', 'lightning', 'timm', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", vpt.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(vpt, name) is not None
    assert name in dir(vpt)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'vpt' has no attribute 'atach'"):
        _ = vpt.atach
