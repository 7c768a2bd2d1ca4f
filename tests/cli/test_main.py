from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

import vpt as package
from vpt.cli import COMMANDS
from vpt.cli.warning_filters import hush
from vpt.errors import DataError, VPTWarning

from .conftest import Vpt


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)


def test_help_names_every_command_without_importing_torch() -> None:
    done = python("-X", "importtime", "-m", "vpt", "--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "vpt.errors" in imported
    assert not imported & {"torch", "lightning", "jsonargparse", "numpy"}


def test_version() -> None:
    done = python("-m", "vpt", "--version")
    assert (done.returncode, done.stdout) == (0, f"vpt {package.__version__}\n")


def test_an_error_is_the_exit_status_of_the_process() -> None:
    done = python("-m", "vpt", "ftt")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("vpt: error: Unknown command 'ftt': did you mean 'fit'? Known are fit, validate, ")
    assert done.stderr.count("\n") == 1


def test_without_a_command_the_help_is_shown(vpt: Vpt) -> None:
    answer = vpt()
    assert answer.status == 0
    assert answer.out.startswith("usage: vpt COMMAND")


@pytest.mark.parametrize("command", ["robustness run", "attention", "runs"])
def test_help_of_a_command(vpt: Vpt, command: str) -> None:
    answer = vpt(*command.split(), "--help")
    assert answer.status == 0
    assert answer.out.startswith(f"usage: vpt {command}")


def test_help_of_fit_shows_the_config_flag(vpt: Vpt) -> None:
    answer = vpt("fit", "--help")
    assert answer.status == 0
    assert "--config" in answer.out
    assert "--weights_only" not in answer.out


def _raise(error: BaseException) -> object:
    def run(args: list[str]) -> None:
        raise error

    return type("Command", (), {"run": staticmethod(run)})


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(1)])
def test_interrupting_ends_in_130(vpt: Vpt, monkeypatch: pytest.MonkeyPatch, stop: BaseException) -> None:
    stop.__context__ = KeyboardInterrupt()  # as Lightning leaves after its shutdown
    monkeypatch.setattr("vpt.cli.import_module", lambda name: _raise(stop))
    answer = vpt("fit")
    assert (answer.status, answer.err) == (130, "vpt: error: interrupted\n")


def test_being_terminated_is_no_success(vpt: Vpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpt.cli.import_module", lambda name: _raise(SIGTERMException()))
    answer = vpt("fit")
    assert (answer.status, answer.err) == (143, "vpt: error: terminated\n")


def test_an_error_from_a_loader_process_loses_its_traceback(vpt: Vpt, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n"
    error = DataError(text + "vpt.errors.DataError: a.jpg is truncated: replace it.\n")
    monkeypatch.setattr("vpt.cli.import_module", lambda name: _raise(error))
    assert vpt("fit").sentence == "a.jpg is truncated: replace it."


def test_an_error_of_several_lines_is_shown_as_it_is(vpt: Vpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpt.cli.import_module", lambda name: _raise(DataError("missing; expected\na/\n  b.txt")))
    assert vpt("fit").err == "vpt: error: missing; expected\na/\n  b.txt\n"


@pytest.mark.parametrize("command", ["--help", "runs --help", "data list"])
def test_a_reader_that_has_gone_ends_it_quietly(command: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        args = [sys.executable, "-m", "vpt", *command.split()]
        done = subprocess.run(args, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == (0 if command == "runs --help" else 141)  # argparse lets it pass


def test_a_warning_of_this_package_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        hush()
        warnings.warn("Images are decoded anew.", VPTWarning, stacklevel=1)
    assert capsys.readouterr().err == "vpt: warning: Images are decoded anew.\n"


def test_a_warning_of_another_stays_as_it_is() -> None:
    hush()
    with pytest.warns(UserWarning, match="of another"):
        warnings.warn("of another", stacklevel=1)
