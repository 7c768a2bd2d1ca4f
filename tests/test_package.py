from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vpt
from vpt.backbones.bundled import default_cfgs, weights_file

ROOT = Path(__file__).parents[1]


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys, vpt; print([name for name in ('torch', 'lightning', 'timm', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_loading_and_pushing_a_model_wait_for_no_training_framework() -> None:
    rooms = "vpt.models.delta_file, vpt.models.prompt_bank, vpt.export, vpt.hub.client"
    code = f"import sys, vpt, {rooms}; vpt.load; print('torch' in sys.modules, 'lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


@pytest.mark.parametrize("name", vpt.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(vpt, name) is not None
    assert name in dir(vpt)


def test_type_checkers_know_every_public_name_from_where_it_is() -> None:
    (known,) = [node for node in ast.parse(Path(vpt.__file__).read_text()).body if isinstance(node, ast.If)]
    imports = [node for node in known.body if isinstance(node, ast.ImportFrom)]
    homes = {name.asname: node.module for node in imports for name in node.names if name.name == name.asname}
    assert homes == vpt._HOMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'vpt' has no attribute 'atach'"):
        _ = vpt.atach


@pytest.mark.parametrize("name", default_cfgs)
def test_the_wheel_takes_the_shipped_weights(name: str) -> None:
    """It takes what lies under `vpt`, unless git ignores it."""
    file = weights_file(name)
    assert file.is_relative_to(Path(vpt.__file__).parent)
    assert file.is_file()
    if (ROOT / ".git").exists():
        assert subprocess.run(["git", "check-ignore", "--quiet", str(file)], cwd=ROOT, check=False).returncode == 1
