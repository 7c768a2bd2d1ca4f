"""Tasks that train together in one process: what all of them compute of a batch each is one forward and backward pass.

Each task has a trainer and a thread of its own, of which one runs at a time: it stops where it needs logits and where
it needs gradients, until all others have come there or ended. Then those of equal models are computed at once, with a
dimension more for what belongs to each (`torch.func.vmap`), on the weights of one backbone. All else, the order of
images, losses, optimiser, metrics and files, is that of a task that trains alone, and so are the random numbers.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from vpt.errors import VPTWarning
from vpt.models.classifier import AdaptedModel
from vpt.models.delta_format import identity
from vpt.run_record import identity as hashed

T = TypeVar("T")
_SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


@dataclass(frozen=True)
class Encoded:
    """The features of a batch, not computed yet: `function` of what is `given`, behind a `cut` of the model."""

    function: Callable[[Tensor], Tensor]
    given: Tensor
    cut: Hashable = None

    def __call__(self) -> Tensor:
        """Computes them."""
        return self.function(self.given)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, of a device or of the machine."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Member:
    """One of those that train together, as its task sees it."""

    def __init__(self, pack: Pack[Any]) -> None:
        """Belongs to a pack, in which it has not begun."""
        self.baton = threading.Semaphore(0)
        self.asks: _Logits | _Gradients | None = None
        self.found: tuple[_Pass, int] | None = None
        self.ended = False
        self.spent = 0.0
        self._pack, self._since, self._globals = pack, time.monotonic(), _Globals()
        self._last: tuple[_Pass, int, Tensor] | None = None
        self._same: str | None = None

    def seconds(self) -> float:
        """Time that it has taken so far: its own, and its share of what was computed for several."""
        return self.spent + time.monotonic() - self._since

    def logits(self, model: AdaptedModel, encoded: Encoded) -> Tensor:
        """Logits, (B, num_classes, ...); what is trained gets gradients of a loss of them by `backward`."""
        if self._same is None:
            specs = [] if model.delta is None else model.delta.specs
            self._same = hashed([type(model).__name__, identity(model), specs, len(model.class_names)])
        self._pack.tie(self._same, model)
        self._last = None
        found = self._wait(_Logits(_place(self._same, model, encoded), model, encoded))
        if found is None:  # no other computes the same, or it has to be computed by itself
            return model.classify(encoded())
        passed, row = found
        answer = passed.out[row].detach()
        if passed.out.requires_grad:
            self._last = passed, row, answer.requires_grad_()
        return answer

    def backward(self) -> None:
        """Passes the gradient of the last logits, which a loss has by now, on to what is trained."""
        if self._last is None:
            return
        (passed, row, answer), self._last = self._last, None
        asks = _Gradients(passed, row, answer.grad)
        self._wait(asks)
        if asks.error is not None:
            raise asks.error

    def begin(self) -> None:
        """Waits for its first turn."""
        self.baton.acquire()
        self._go_on()

    def end(self) -> None:
        """Lets the others go on."""
        self.ended = True
        if (following := self._pack.following()) is not None:
            following.baton.release()

    def _wait(self, asks: _Logits | _Gradients) -> tuple[_Pass, int] | None:
        """Lets the others run until it is known what it asks for; gives the pass that logits are in, and their row."""
        self.asks, asks.turn = asks, self._pack.next_turn()
        self.spent, self._globals = self.seconds(), _Globals()
        following = self._pack.following()
        if following is not None and following is not self:
            following.baton.release()
            self.baton.acquire()
        self._go_on()
        if self.asks is not None:  # all the others wait, too
            self._pack.answer(self)
        found, self.found = self.found, None
        return found

    def _go_on(self) -> None:
        self._since = time.monotonic()
        self._globals.restore()
        if self._pack.stopped:
            raise SystemExit


class Pack(Generic[T]):
    """Runs functions, each of a `Member`, whose tasks compute together.

    Attributes:
        width: How many are computed at once: all, or as many as memory suffices for.
        stopped: Whether they are to end where they stand.
    """

    def __init__(self) -> None:
        """Runs nothing yet."""
        self.width, self.stopped = 0, False
        self._members: list[Member] = []
        self._weights: dict[Hashable, list[Tensor]] = {}
        self._apart: set[Hashable] = set()
        self.next_turn = count().__next__

    def run(self, functions: Sequence[Callable[[Member], T]]) -> list[T]:
        """Calls them all, and gives their results; what one of them raises is raised when all have ended."""
        self._members = [Member(self) for _ in functions]
        self.width, before = len(functions), _Globals()
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def call(place: int) -> None:
            member = self._members[place]
            try:
                member.begin()
                results[place] = functions[place](member)
            except BaseException as error:
                errors.append(error)
            finally:
                member.end()

        threads = [threading.Thread(target=call, args=(place,), daemon=True) for place in range(len(functions))]
        for thread in threads:
            thread.start()
        if (first := self.following()) is not None:
            first.baton.release()
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl+C and SIGTERM, which reach this thread alone
            self.stopped = True
            for thread in threads:
                thread.join()
            raise
        finally:
            before.restore()
        if errors:
            raise errors[0]
        return [results[place] for place in range(len(functions))]

    def following(self) -> Member | None:
        """Who runs next: who waits for nothing; else for gradients, which frees memory; else the first in line."""

        def order(member: Member) -> tuple[int, int]:
            asks = member.asks
            return (0, 0) if asks is None else (2 if isinstance(asks, _Logits) else 1, asks.turn)

        return min((each for each in self._members if not each.ended), key=order, default=None)

    def tie(self, same: str, model: AdaptedModel) -> None:
        """Has a model compute with the weights of the first backbone that is the same, unless its own are trained."""
        backbone = model.backbone.model
        if model.backbone.tuned or (leading := next(backbone.parameters(), None)) is None:
            return
        place = (same, leading.device, leading.dtype)
        if place in self._weights and leading.data_ptr() == self._weights[place][0].data_ptr():
            return
        own = [*backbone.parameters(), *backbone.buffers()]
        with torch.inference_mode(False):
            for tensor, first in zip(own, self._weights.setdefault(place, [t.data for t in own]), strict=True):
                tensor.data = first

    def answer(self, member: Member) -> None:
        """Computes what a member waits for, with those that wait for the same; each has its share of the time."""
        start, asks = time.monotonic(), member.asks
        group: Sequence[Member] = [each for each in self._members if _alike(each.asks, asks)]
        if isinstance(asks, _Logits):
            group = self._logits(sorted(group, key=lambda each: cast("_Logits", each.asks).turn))
        else:
            self._gradients([cast("_Gradients", each.asks) for each in group])
        share = (time.monotonic() - start) / len(group)
        for each in group:
            each.asks = None
            each.spent += share
        member.spent -= share * len(group)

    def _logits(self, members: Sequence[Member]) -> Sequence[Member]:
        """Answers as many as are computed at once; without an answer they compute by themselves."""
        while True:
            group = members[: self.width]
            asked = [cast("_Logits", each.asks) for each in group]
            if len(group) == 1 or asked[0].key in self._apart:
                return group
            try:
                passed = _Pass(asked)
            except Exception as error:  # it comes again where it is not one of computing together
                full = self._full(asked[0], error)
            else:
                for row, each in enumerate(group):
                    each.found = passed, row
                return group
            if full:
                self._narrow(len(group))

    def _gradients(self, asked: Sequence[_Gradients]) -> None:
        passed = asked[0].passed
        try:
            passed.backward({each.row: each.grad for each in asked if each.grad is not None})
            return
        except Exception as error:
            full = self._full(passed.asked[0], error)
        passed.forget()
        if full:
            self._narrow(len(passed.asked))
        for each in asked:
            try:
                passed.backward_alone(each.row, each.grad)
            except Exception as error:
                each.error = error

    def _full(self, asked: _Logits, error: Exception) -> bool:
        """Whether memory does not suffice; what else cannot be computed together is computed apart from now on."""
        if out_of_memory(error):
            return True
        self._apart.add(asked.key)
        draws = "randomness error mode" in str(error)
        reason = "they draw random numbers, as dropout does" if draws else " ".join(str(error).split())
        warnings.warn(f"Trials compute their steps one after another: {reason:.200}.", VPTWarning, stacklevel=2)
        return False

    def _narrow(self, group: int) -> None:
        self.width = (group + 1) // 2
        gc.collect()
        torch.cuda.empty_cache()


class _Globals:
    """What a process has one of, and each that trains its own: random numbers, the seed, and the default precision."""

    def __init__(self) -> None:
        """As it is now."""
        self._seeds = {name: os.environ.get(name) for name in _SEEDS}
        # libraries draw from numpy's global generator
        self._states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        self._precision = torch.get_default_dtype()
        self._devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        """Makes it so again."""
        for name, value in self._seeds.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        torch.set_default_dtype(self._precision)
        own, of_numpy, of_torch = self._states
        random.setstate(own)
        np.random.set_state(of_numpy)  # noqa: NPY002
        torch.set_rng_state(of_torch)
        if self._devices:
            torch.cuda.set_rng_state_all(self._devices)


@dataclass
class _Logits:
    """What a member waits for: the logits of a batch, at once with those of the same key."""

    key: Hashable
    model: AdaptedModel
    encoded: Encoded
    turn: int = 0


@dataclass
class _Gradients:
    """What a member waits for: the gradients of what it trains, from that of the logits in a row of a pass."""

    passed: _Pass
    row: int
    grad: Tensor | None
    error: Exception | None = None
    turn: int = 0


def _alike(one: _Logits | _Gradients | None, other: _Logits | _Gradients | None) -> bool:
    if isinstance(one, _Logits) and isinstance(other, _Logits):
        return one.key == other.key
    return isinstance(one, _Gradients) and isinstance(other, _Gradients) and one.passed is other.passed


def _place(same: str, model: AdaptedModel, encoded: Encoded) -> Hashable:
    """All that must be equal for batches to be computed at once."""
    given, kind = encoded.given, encoded.given.device.type
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), model.training, str(model.strength)
    precision = str(model.backbone.mean.dtype), torch.is_autocast_enabled(kind), str(torch.get_autocast_dtype(kind))
    return same, encoded.cut, tuple(given.shape), str(given.dtype), str(given.device), modes, precision


class _Call(nn.Module):
    """A model as a module that computes logits of what is given."""

    def __init__(self, model: AdaptedModel, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, given: Tensor) -> Tensor:
        return self.model.classify(self.function(given))


def _own(model: AdaptedModel) -> dict[str, Tensor]:
    """The tensors of a delta and a head, by their names in a `_Call`."""
    rooms: dict[str, nn.Module] = {"head": model.head} | ({} if model.delta is None else {"delta": model.delta})
    return {
        f"model.{room}.{name}": tensor
        for room, module in rooms.items()
        for found in (module.named_parameters, module.named_buffers)
        for name, tensor in found(remove_duplicate=False)
    }


class _Pass:
    """The forward pass of several batches through models that differ in the tensors of delta and head alone."""

    def __init__(self, asked: Sequence[_Logits]) -> None:
        """Computes `out`, (members, B, ...), on the backbone of the first."""
        self.asked, kind = asked, asked[0].encoded.given.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._precision = partial(torch.autocast, kind, dtype, enabled)
        self._tensors = [_own(each.model) for each in asked]
        if any(own.keys() != self._tensors[0].keys() for own in self._tensors):
            raise RuntimeError("they train parts of other names")
        stacked = {name: torch.stack([own[name].detach() for own in self._tensors]) for name in self._tensors[0]}
        training = torch.is_grad_enabled()
        trained = [name for name, each in self._tensors[0].items() if training and each.requires_grad]
        self._trained = {name: stacked[name].requires_grad_() for name in trained}
        call = _Call(asked[0].model, asked[0].encoded.function)

        def compute(tensors: dict[str, Tensor], given: Tensor) -> Tensor:
            return cast("Tensor", functional_call(call, tensors, (given,), tie_weights=False))

        with warnings.catch_warnings():  # of operations that loop over the models, as one after another would
            warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
            self.out: Tensor = torch.vmap(compute)(stacked, torch.stack([each.encoded.given for each in asked]))
        if training and any(each._version for each in stacked.values()):
            raise RuntimeError("the forward pass changes what the model keeps")

    def backward(self, grads: Mapping[int, Tensor]) -> None:
        """Adds to the gradients of the parameters, from those of the logits by row; others have ended meanwhile."""
        zero = torch.zeros_like(self.out[0])
        outputs = torch.stack([grads.get(row, zero) for row in range(len(self.asked))])
        found = torch.autograd.grad(self.out, list(self._trained.values()), outputs, allow_unused=True)
        for name, each in zip(self._trained, found, strict=True):
            for row in () if each is None else grads:
                parameter, own = self._tensors[row][name], each[row]
                parameter.grad = own if parameter.grad is None else parameter.grad + own

    def forget(self) -> None:
        """Frees the memory."""
        self.out, self._trained = torch.empty(0), {}

    def backward_alone(self, row: int, grad: Tensor | None) -> None:
        """As `backward` of a row, by a forward pass of its own."""
        model, encoded = self.asked[row].model, self.asked[row].encoded
        with self._precision():
            out = model.classify(encoded())
        torch.autograd.backward([out], [grad])
