"""Trials one after another, or many at once on Ray; which of them runs where changes no result."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Group
from rich.live import Live
from rich.text import Text

from vpt.backbones.checkpoints import PATIENCE
from vpt.errors import ConfigError, RecordError, VPTError
from vpt.experiments.packs import Together, packs
from vpt.experiments.trial import Failure, Record, Trial, finished, run_trial, val_score
from vpt.models.feature_cache import share
from vpt.models.together import Member, Pack
from vpt.run_record import score
from vpt.screen import Table, console

SHOWN = 8


class _Board:
    """A live table on a terminal, a line for each trial elsewhere; both on stderr."""

    def __init__(self, total: int, found: Mapping[str, Record | Failure]) -> None:
        self._console = console(stderr=True)
        self._total, self._before, self._done, self._failed = total, len(found), 0, 0
        self._last: list[tuple[str, Record | Failure]] = []
        self._best = max(((val_score(record), name) for name, record in found.items()), default=(-math.inf, ""))
        self._start = time.monotonic()
        self._live = Live(self._render(), console=self._console, refresh_per_second=1, transient=False)

    def __enter__(self) -> _Board:
        if self._console.is_terminal and self._total > self._before:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.update(self._render(), refresh=True)
            self._live.stop()
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self._console.print("To go on: the same command with --resume", highlight=False)

    def add(self, trial: Trial, result: Record | Failure) -> None:
        """Shows the end of a trial."""
        self._done += 1
        self._failed += not isinstance(result, dict)
        self._last = [*self._last, (trial.name, result)][-SHOWN:]
        self._best = max(self._best, (val_score(result), trial.name))
        if self._live.is_started:
            self._live.update(self._render())
        else:
            self._console.print(self._line(trial.name, result), soft_wrap=True)

    def _render(self) -> Group:
        table = Table("trial", "val", "test", "s", title="trials that ended last")
        for name, result in self._last:
            table.add_row(*_cells(name, result))
        return Group(table, Text(self._status()))

    def _status(self) -> str:
        finished = self._before + self._done
        left = self._total - finished
        pace = (time.monotonic() - self._start) / self._done if self._done else 0.0
        text = f"{finished} of {self._total} trials, {self._failed} failed"
        if left and pace:
            text += f", about {left * pace / 60:.0f} min to go"
        return f"{text}; best val {100 * self._best[0]:.1f} ({self._best[1]})" if self._best[0] > -math.inf else text

    def _line(self, name: str, result: Record | Failure) -> str:
        return f"{self._before + self._done}/{self._total} " + "  ".join(cell for cell in _cells(name, result) if cell)


def _cells(name: str, result: Record | Failure) -> tuple[str, str, str, str]:
    if not isinstance(result, dict):
        return name, "failed", result.reason, ""
    found = (score(result, split) for split in ("val", "test"))
    val, test = ("" if each is None else f"{100 * each:.1f}" for each in found)
    return name, val and f"val {val}", test and f"test {test}", f"{result.get('seconds', 0):.0f} s"


RETRIES = 2
"""How often a trial is taken up again whose process died."""

Engine = Callable[[Sequence[Trial], Path], dict[str, Record | Failure]]
"""Runs trials below a folder; gives for each name its record, or why there is none."""


def serially(trials: Sequence[Trial], root: Path, together: Together = 1) -> dict[str, Record | Failure]:
    """Runs trials in this process, in order; those that are finished below `root` are read.

    So many train `together` (`vpt.experiments.packs`).
    """

    def run(left: list[Trial]) -> Iterator[tuple[Trial, Record | Failure]]:
        for pack in packs(left, together, torch.cuda.is_available()):
            yield from zip(pack, _run(pack, root), strict=True)

    return _collect(trials, root, run)


@dataclass(frozen=True)
class RayEngine:
    """Trials as tasks of a Ray cluster: this machine's, or one that runs already.

    A worker that dies, by the kernel or by hand, is replaced, and its trial continues at its last epoch; a trial that
    fails of itself is reported and does not abort the others. The experiment's folder must be the same on all machines.

    Attributes:
        address: Of a running cluster, ``auto`` or ``host:port``; None starts one on this machine, which ends with this
            process.
        cpus: Of each trial; its torch threads. None shares this machine's evenly among its trials.
        gpus: Of each trial, e.g. 0.25 for four on one; None for one if there are any.
        workers: Trials at once; None for what the machine or cluster holds.
        together: How many train together as one task of Ray (`vpt.experiments.packs`), which counts as one trial above.
    """

    address: str | None = None
    cpus: int | None = None
    gpus: float | None = None
    workers: int | None = None
    together: Together = 1

    def __post_init__(self) -> None:
        """A ConfigError where no cluster answers at the address, for which Ray itself would look for minutes."""
        if self.address not in (None, "auto", "local"):
            _check_cluster(self.address)

    def __call__(self, trials: Sequence[Trial], root: Path) -> dict[str, Record | Failure]:
        """Runs trials as `Engine` says; a ConfigError where Ray is not installed, or finds no cluster."""
        return _collect(trials, root, lambda left: self._results(left, root.resolve()))

    def _results(self, trials: Sequence[Trial], root: Path) -> Iterator[tuple[Trial, Record | Failure]]:
        if not trials:
            return
        try:
            import ray
        except ImportError as error:
            raise ConfigError("Trials run on Ray: pip install 'vpt[sweep]', or give --serial.") from error
        started = not ray.is_initialized()
        if started:
            # A cluster of this machine needs little of Ray's shared memory: results are a page of JSON.
            own = {"num_cpus": os.cpu_count(), "object_store_memory": 100 << 20} if self.address is None else {}
            place = self.address or "local"  # None would be a cluster that happens to run here
            stop = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(place, log_to_driver=False, logging_level="ERROR", include_dashboard=False, **own)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(f"Ray finds no cluster at {place}: {' '.join(str(error).split()):.200}") from error
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, stop)  # Ray's would end its processes while they are still waited for
        cpus, gpus = self.shares()
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(_worker)
        waiting = packs(trials, self.together, self.shares()[1] > 0, self.at_once())
        running: dict[Any, list[Trial]] = {}
        limit = self.workers or len(trials)
        try:
            while waiting or running:
                while waiting and len(running) < limit:
                    pack = waiting.pop(0)
                    running[remote.remote(pack, str(root), cpus)] = pack
                done, _ = ray.wait(list(running))
                for reference in done:
                    pack = running.pop(reference)
                    yield from zip(pack, _received(ray, reference, len(pack)), strict=True)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            if started:
                ray.shutdown()

    def at_once(self) -> int | None:
        """How many trials this machine runs at a time; of a cluster `workers`."""
        if self.address is not None:
            return self.workers
        cpus, gpus = self.shares()
        room = (os.cpu_count() or 1) // cpus
        room = min(room, int(torch.cuda.device_count() / gpus)) if gpus else room
        return max(1, min(room, self.workers or room))

    def shares(self) -> tuple[int, float]:
        """Cores, which are a trial's threads, and GPUs of each trial."""
        gpus = self.gpus if self.gpus is not None else float(torch.cuda.is_available())
        if self.cpus is not None:
            return self.cpus, gpus
        machine = os.cpu_count() or 1
        return max(1, machine // self.workers) if self.workers else 1, gpus


_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""With which a client of HTTP/2, as gRPC speaks it, begins; the server's answer is of the same kind, 4 (RFC 9113)."""


def _check_cluster(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"The address of a Ray cluster is `auto` or HOST:PORT, got {address!r:.80}.")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE) as connection:
            connection.sendall(_GREETING)
            found = connection.recv(9)[3:4] == b"\4"
    except (OSError, ValueError):  # a host that is none
        found = False
    if not found:
        raise ConfigError(
            f"No Ray cluster answers at {address:.80}: `ray start --head` starts one and says its address."
        )


def _worker(pack: list[Trial], root: str, threads: int) -> list[Record | Failure]:
    """What runs in a process of Ray's."""
    torch.set_num_threads(threads)
    return _run(pack, Path(root))


def _run(pack: Sequence[Trial], root: Path) -> list[Record | Failure]:
    """Runs trials, together where there are several."""
    share()
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)  # what it says of every single trial has no place on the board
    try:
        if len(pack) == 1:
            return [_guarded(pack[0], root)]
        return Pack[Record | Failure]().run([partial(_guarded, trial, root) for trial in pack])
    finally:
        logger.setLevel(level)


def _guarded(trial: Trial, root: Path, member: Member | None = None) -> Record | Failure:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        return run_trial(trial, root, member)
    except Exception as error:
        kind = "" if isinstance(error, VPTError | MisconfigurationException) else f"{type(error).__name__}: "
        return Failure(kind + " ".join(str(error).split()))


def _received(ray: Any, reference: Any, number: int) -> list[Record | Failure]:
    try:
        results: list[Record | Failure] = ray.get(reference)
    except ray.exceptions.RayError as error:
        return [Failure(f"its process died {RETRIES + 1} times ({type(error).__name__})")] * number
    return results


def _finished(trial: Trial, root: Path) -> Record | None:
    try:
        return finished(trial, root)
    except RecordError:  # which the trial then fails of, alone
        return None


def _collect(
    trials: Sequence[Trial], root: Path, run: Callable[[list[Trial]], Iterator[tuple[Trial, Record | Failure]]]
) -> dict[str, Record | Failure]:
    """Reads what is finished, and takes the rest as it comes, on a live table; a damaged record fails its own trial."""
    kept = {trial.name: _finished(trial, root) for trial in trials}
    found: dict[str, Record | Failure] = {name: record for name, record in kept.items() if record is not None}
    with _Board(len(trials), found) as board:
        for trial, result in run([trial for trial in trials if trial.name not in found]):
            found[trial.name] = result
            board.add(trial, result)
    return {trial.name: found[trial.name] for trial in trials}
