"""Visual prompts, shallow and deep (Jia et al., "Visual Prompt Tuning", ECCV 2022, sections 3.1-3.2).

Deep prompts are inserted before every block and their outputs are discarded, so they act only through the keys and
values of their block: K = W_k N(P) + b_k and V = W_v N(P) + b_v, with N the block's LayerNorm. They are computed once
per step for the whole batch, unless they are a function of the image. Shallow prompts are tokens that travel through
all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop

from vpt.backbones.attention.base import OpenAttention
from vpt.backbones.factory import Backbone
from vpt.backbones.strength import Place
from vpt.deltas.base import Handle, Shape, TrainingImages, chosen_blocks, named_stack, numbers_by_layer, pick, stack
from vpt.deltas.extra_key_values import (
    DropoutMode,
    Gate,
    KeyEdit,
    affine_factors,
    unstacked,
)
from vpt.deltas.prompts.adaptive import Adaptive, ImagePrompts
from vpt.deltas.prompts.checks import (
    check_koopman,
    check_mapped,
    check_numbers,
    check_pooling,
    check_shallow,
    check_start,
)
from vpt.deltas.prompts.frequencies import prompts_of_frequencies
from vpt.deltas.prompts.initialization import tokens_of_images, transformed, transformed_prompts
from vpt.deltas.prompts.koopman import Koopman, KoopmanPenalty
from vpt.deltas.prompts.pruning import Mask, probed
from vpt.deltas.prompts.relocation import Assignment, Relocate, check_relocation
from vpt.deltas.prompts.temperature import Temperature, Temperatures
from vpt.deltas.prompts.travelling import TravellingPrompts
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError


@register_delta("prompt")
class Prompt(TravellingPrompts):
    """Learned prompts for a vision transformer.

    `tokens` are (layers, n, dim), layers being 1 if shallow, shared or adaptive; a list of such for runs of equal
    layers, without those that have none; with a `mask` what is left of them; with `relocate` (prompts, dim), and
    `assigned` says in which layer each stands. `projection` leads from narrower ones to the backbone's width, one for
    all layers; or None.
    """

    modes = ("sample", "shared", "key_value", "prompt")

    def __init__(
        self,
        backbone: Backbone,
        num_tokens: int | Sequence[int],
        deep: bool = True,
        dropout: float = 0.0,
        dropout_mode: DropoutMode = "sample",
        layers: Sequence[int] | None = None,
        shared: bool = False,
        project: int | None = None,
        log_bias: bool = False,
        reference_pooling: bool = False,
        gate: Gate | None = None,
        fourier: float = 0.0,
        init: Literal["uniform", "token", "mean", "max", "frequency"] = "uniform",
        adaptive: Adaptive | None = None,
        temperature: Temperature | None = None,
        mask: Sequence[str] | None = None,
        koopman: Koopman | None = None,
        relocate: Relocate | None = None,
    ) -> None:
        """Draws prompts from U(-v, v) with v = √(6 / (3·p² + dim)), the paper's Xavier bound for patches of p pixels.

        Args:
            backbone: The backbone that the prompts are for.
            num_tokens: Prompts per layer, at least 1; with deep prompts also a list, a number for each layer, of which
                some may be 0.
            deep: Prompts before every block (VPT-deep) or only before the first (VPT-shallow).
            dropout: Probability in [0, 1).
            dropout_mode: What is dropped in training. ``"sample"``: channels of the prompts, a mask per image (the
                reference's ViT); ``"shared"``: one mask per batch (the reference's Swin); ``"key_value"``: channels
                of keys and values, a mask per image (P-Tuning v2); ``"prompt"``: whole prompts per image. The last
                two need deep prompts.
            layers: With deep prompts, only in blocks ``[first, last + 1]``, counted from 0; None for all.
            shared: With deep prompts, the same prompts in every layer.
            project: Learn prompts of this width and a linear map from it to the backbone's, one for all layers. A delta
                file holds the mapped prompts.
            log_bias: Adds −log n to the attention logits of n prompts, so that at first they take the attention of one
                token instead of n/(n + N) of it.
            reference_pooling: On Swin, the final average includes what the prompts of the last block have become behind
                it, as in the reference implementation.
            gate: With deep prompts, learns the strength of each block's (`Gate`); None for no gate.
            fourier: Share in [0, 1] of each layer's prompts, rounded down and the first ones, that act as the real part
                of their Fourier transform over tokens and channels (VFPT; Zeng et al., NeurIPS 2024, section 3.2).
            init: ``uniform``, or, with deep prompts, tokens that enter the block for training images of the frozen
                backbone (SPT; Wang et al., ICML 2024, section 3.3): ``token`` for tokens as they are, ``mean`` and
                ``max`` over n chunks of an image's tokens, n of them drawn from all images. ``frequency``, on a ViT:
                what the best windows of frequencies leave of the patches (PAE; Wang et al., ICLR 2026,
                `prompts_of_frequencies`). Training takes them at its start (`start_from_images`), unless it starts from
                a delta file; until then, and in a delta file, prompts are as if ``uniform``.
            adaptive: On a ViT, with deep prompts: those of all blocks but the first are functions of the image's tokens
                (VAPT, `ImagePrompts`); None for constant ones.
            temperature: Learns a temperature of the attention in every block that has prompts, of all its keys (Yoo et
                al., ICML 2023; `Temperature`); shallow prompts are in every block. None for that of the backbone.
            mask: Prunes prompts, and segments of others, as a `Mask` says, layer by layer; what is left starts as it
                does without (E²VPT). None for all of them.
            koopman: With deep prompts, a penalty in training that has those of a layer follow from those of the layer
                before (PAE; `KoopmanPenalty`); a delta file holds nothing of it. None for no penalty.
            relocate: With deep prompts: in training the most idle one moves to another layer in each epoch, as a
                `Relocate` says (PRO-VPT). A delta file holds the prompts where they have come to stand, as a list of
                `num_tokens`. None for prompts that stay.
        """
        layout = backbone.attention_layout if deep and init == "uniform" and not adaptive else backbone.layout
        blocks = chosen_blocks(len(layout.blocks), layers) if deep else [0]
        super().__init__(backbone, blocks, dropout, dropout_mode, log_bias, gate)
        by_layer = {"layers": layers is not None, "shared": shared, "gate": gate is not None}
        by_layer |= {"adaptive": adaptive is not None, "a list of num_tokens": not isinstance(num_tokens, int)}
        by_layer |= {"koopman": koopman is not None, "relocate": relocate is not None}
        self.fourier, self.init, self.starts_from_classes = fourier, init, init == "frequency"
        self.assigned: Assignment | None = None
        check_start(fourier, init, deep, shared or project is not None)
        if not deep:
            check_shallow(self, by_layer)
        mapped = {"shared": shared, "project": project is not None, "adaptive": adaptive is not None}
        check_mapped(mapped, init, fourier, mask is not None, self.layout.windowed)
        check_koopman(koopman is not None, mapped, mask is not None)
        last = len(self.layout.blocks) - 1
        if reference_pooling:
            check_pooling(self, deep, last)
        self.deep, self.shared = deep, shared
        self.pools = self.changes_pool = reference_pooling
        shallow = [] if deep or not self.layout.windowed else range(last + 1)
        self._blocks_beside = [last] if deep and reference_pooling else list(shallow)
        numbers = numbers_by_layer(num_tokens, len(blocks), least=0 if deep and not shared and adaptive is None else 1)
        shapes = [(number, self.layout.dims[block]) for number, block in zip(numbers, blocks, strict=True)]
        check_numbers(self, fourier, init, numbers, blocks)
        if relocate is not None:
            others = {"fourier": fourier > 0, "mask": mask is not None, "koopman": koopman is not None}
            check_relocation(shapes, mapped | others | {"reference_pooling": reference_pooling})
        if shared and len(set(shapes)) > 1:
            raise ConfigError("Shared prompts need the same number and width in every layer.")
        self.adaptive: ImagePrompts | None = None
        if adaptive is not None:
            self.adaptive = ImagePrompts(shapes[1:], backbone.layout.grid, Adaptive.of(adaptive), backbone.mean)
        self.temperature: Temperatures | None = None
        if temperature is not None:
            attentions = self.layout.attentions
            own = blocks if deep else range(len(attentions))
            options = Temperature.of(temperature)
            self.temperature = Temperatures({block: attentions[block] for block in own}, options, backbone.mean)
        self._shapes = shapes[:1] if shared or self.adaptive is not None else shapes
        self.projection = None if project is None else self._projection(project, backbone.mean)
        drawn = [(number, dim if project is None else project) for number, dim in self.shapes if number]
        height, width = self.layout.patch_size
        bound = math.sqrt(6 / (3 * height * width + drawn[0][1]))
        tokens = stack(drawn, backbone.mean, lambda tensor: tensor.uniform_(-bound, bound))
        self.mask = None if mask is None else Mask(mask, shapes, backbone.mean)
        if self.mask is not None:
            self._numbers, self._shapes = numbers, self.mask.shapes
        self.tokens = tokens if self.mask is None else self.mask.drawn(tokens, backbone.mean)
        self.koopman = None if koopman is None else KoopmanPenalty(self.shapes, Koopman.of(koopman), backbone.mean)
        if relocate is not None:
            self.tokens = nn.Parameter(torch.cat([self._stored(each).detach() for each, n in enumerate(numbers) if n]))
            self.assigned = Assignment(numbers, Relocate.of(relocate))

    def _projection(self, width: int, like: Tensor) -> nn.Linear:
        """As the reference draws it: Kaiming normal over the outputs."""
        dims = {dim for _, dim in self.shapes}
        if width < 1 or len(dims) > 1:
            raise ConfigError(
                f"project maps prompts of a positive width to one width of tokens, got {width} to {sorted(dims)}."
            )
        layer = nn.Linear(width, dims.pop(), dtype=like.dtype, device=like.device)
        nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        return layer

    def prompts(self, layer: int) -> Tensor:
        """The prompts of a layer, (n, dim), by its position among the layers that have prompts.

        Of adaptive ones (B, n, dim), while their block runs; so are all under masks (`mask_gradients`).
        """
        if self.adaptive is not None and layer > 0:
            if (entering := _ENTERING.get().get(self)) is None:
                raise ConfigError("Adaptive prompts are of an image: they can be had while their block runs alone.")
            return cast("Tensor", self.adaptive(layer - 1, entering))
        if not self.shapes[0 if self.shared else layer][0]:
            return self.backbone.mean.new_zeros(self.shapes[layer])
        own = self._stored(layer)
        own = own if self.mask is None else self.mask.filled(layer, own)
        return probed(self, layer, own if self.projection is None else cast("Tensor", self.projection(own)))

    def _stored(self, layer: int) -> Tensor:
        """What trains of a layer that has prompts, as it is stored."""
        if self.assigned is not None:
            return self.assigned.of(layer, cast("Tensor", self.tokens))
        return pick(self.tokens, 0 if self.shared else sum(number > 0 for number, _ in self.shapes[:layer]))

    @property
    def shapes(self) -> Sequence[Shape]:
        """(n, dim) of the prompts of each layer of its own: one if shallow, shared or adaptive."""
        if self.assigned is None:
            return self._shapes
        return [(number, self._shapes[0][1]) for number in self.assigned.numbers()]

    def at(self, key: Hashable = None) -> float:
        """See `DeltaPart`: 0 in a layer without prompts, where the backbone's own code runs."""
        if isinstance(key, int) and not self.shapes[min(key, len(self.shapes) - 1)][0]:
            return 0.0
        return super().at(key)

    def expected_parameters(self) -> int:
        """Σ n · dim over the layers (one if shallow or shared); projected from width d: Σ n · d + (d + 1) · dim.

        A gate and temperatures have one more for each head, or block; adaptive prompts those of `ImagePrompts`, a
        `koopman` those of `KoopmanPenalty`.
        """
        gates = 0 if self._gate is None else sum(self._gates())
        gates += 0 if self.adaptive is None else self.adaptive.expected_parameters()
        gates += 0 if self.temperature is None else self.temperature.expected_parameters()
        gates += 0 if self.koopman is None else self.koopman.expected_parameters()
        if self.projection is None:
            stored = self.shapes if self.mask is None else self.mask.stored
            return gates + sum(number * dim for number, dim in stored)
        width, dim = self.projection.in_features, self.projection.out_features
        return gates + sum(number for number, _ in self.shapes) * width + (width + 1) * dim

    @property
    def starts_from_images(self) -> bool:
        """See `DeltaPart`."""
        return self.init != "uniform" and not self.started

    @torch.no_grad()
    def start_from_images(self, training: TrainingImages, rng: np.random.Generator) -> None:
        """See `DeltaPart`; a ConfigError where all images together have fewer tokens than there are prompts."""
        if self.starts_from_images:
            numbers = [size for size, _ in self.shapes] if self.mask is None else self._numbers
            place = self.backbone, self.blocks, numbers
            drawn = (
                prompts_of_frequencies(*place, training, rng)
                if self.init == "frequency"
                else tokens_of_images(*place, self.init, training, rng)
            )
            for layer, tokens in enumerate(drawn):
                if self.assigned is not None:
                    cast("Tensor", self.tokens)[self.assigned.rows(layer)] = tokens
                elif len(tokens):
                    self._stored(layer).copy_(tokens if self.mask is None else self.mask.cut(layer, tokens))
            self.started = True

    def folded(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Prompts behind their projection, in the layers that they have moved to, whatever they were held to."""
        changes: dict[str, Any] = {"init": "uniform", "project": None, "koopman": None, "relocate": None}
        state = {name: t for name, t in self.state_dict(keep_vars=True).items() if not name.startswith("koopman.")}
        if self.projection is None and self.assigned is None:
            return changes, state
        numbers = [number for number, _ in self.shapes]
        mapped = [self.prompts(layer).detach() for layer, number in enumerate(numbers) if number]
        if self.assigned is not None:
            changes |= {"num_tokens": numbers if len({*numbers}) > 1 else numbers[0]}
        return changes, named_stack("tokens", mapped) | self.of_logits(state)

    @torch.no_grad()
    def unfolded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Prompts before the projection, and one that gives the mapped ones: they span no more than its width.

        Where they span less, the free columns of the projection stay as drawn, so that all of it trains.
        """
        if self.koopman is not None:  # which begins anew
            tensors = {**tensors, **self.koopman.state_dict(prefix="koopman.")}
        if self.assigned is not None:
            state = {name: each for name, each in self.state_dict().items() if name.startswith("assigned.")}
            return {"tokens": torch.cat(unstacked("tokens", tensors))} | state | self.of_logits(tensors)
        if self.projection is None:
            return super().unfolded(tensors)
        mapped = unstacked("tokens", tensors)
        narrow, weight, bias = affine_factors(torch.cat(mapped), self.projection.in_features, "project")
        like = self.projection.weight
        even = weight.norm(dim=1, keepdim=True).sqrt()  # the length of each direction is shared by both factors
        weight = torch.where(even > 0, weight / even, like.T).T
        tokens = cast("Any", (narrow * even.T).to(like)).split([len(matrix) for matrix in mapped])
        projection = {"projection.weight": weight.to(like), "projection.bias": bias.to(like)}
        kept = {name: tensor for name, tensor in tensors.items() if name.startswith("koopman.")}
        return named_stack("tokens", tokens) | projection | self.of_logits(tensors) | kept

    def misfit(self, tensors: Mapping[str, Tensor]) -> str:
        """See `DeltaPart`: prompts stand in layers that there are."""
        return "" if self.assigned is None else self.assigned.misfit(tensors, "assigned.")

    def keys_values(self, layer: int, attention: OpenAttention, images: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompts, projected by the block's LayerNorm and weights."""
        norm = self.layout.norms[self.blocks[layer]]
        _, keys, values = attention.project(norm(self.entering(layer, images)))
        return keys, values

    def queries(self, block: int) -> Tensor | None:
        """What the prompts of a block ask with where they stand beside its sequence, Q = W_q N(P) + b_q.

        (1 or B, heads, n, head_dim); None at strength 0, in blocks without prompts and for prompts `in_sequence`. Deep
        prompts ask only in the concatenated form (Jia et al., section 3.1), which discards the outputs: the model
        computes nothing from them. Shallow ones on Swin and adaptive ones ask only while the block runs
        (`AttentionCall.as_called`).
        """
        if self.in_sequence or (self.deep and block not in self.blocks) or self.at(layer := self._layer(block)) == 0.0:
            return None
        beside = block in self._blocks_beside
        tokens = self._tokens_beside() if beside else self._mapped(self._batched(layer))
        return self.layout.attentions[block].project(self.layout.norms[block](tokens))[0]

    @property
    def constant(self) -> bool:
        """Whether all that they do is to add keys and values: shallow ones travel, and the pool may read deep ones."""
        return self.deep and not self._blocks_beside and self.adaptive is None and self.temperature is None

    def places(self) -> Mapping[Any, Place]:
        """See `DeltaPart`: by layer, and the temperature of each block, also of shallow prompts, in that block."""
        there = {} if self.temperature is None else self.temperature.places(self.layout.attentions)
        return {**super().places(), **there}

    def penalty(self) -> Tensor | None:
        """See `DeltaPart`: that of `koopman`."""
        return (
            None if self.koopman is None else self.koopman([self.prompts(layer) for layer in range(len(self.blocks))])
        )

    def rate_scales(self) -> dict[nn.Parameter, float]:
        """See `DeltaPart`: those of the gate and of temperatures."""
        own = self.temperature
        return super().rate_scales() | ({} if own is None else {own.learned: own.options.lr_scale})

    def curves(self) -> dict[str, Tensor]:
        """See `DeltaPart`: of the gate and of temperatures, and how many prompts each block has where they move."""
        found = super().curves() | ({} if self.temperature is None else self.temperature.curves())
        moved = [] if self.assigned is None else self.assigned.numbers()
        counts = zip(self.blocks, moved, strict=False)
        return found | {f"prompts/block_{block:02d}": torch.tensor(float(number)) for block, number in counts}

    def hooks(self) -> Iterator[Handle]:
        """Keys and values in every chosen block (deep), or tokens before the first block (shallow)."""
        if self.temperature is not None:
            yield from self.temperature.edits(self, self.layout.attentions)
        for block in self._blocks_beside:
            yield self.layout.attentions[block].register_edit(
                KeyEdit(self, block, self._join_windows, self._gather, self._layer(block))
            )
        if self.deep:
            for layer, block in enumerate(self.blocks):
                if self.adaptive is not None:
                    yield self.layout.blocks[block].register_forward_pre_hook(self._hold)
                    yield self.layout.blocks[block].register_forward_hook(self._release, always_call=True)
                if block not in self._blocks_beside:
                    yield self.layout.attentions[block].register_edit(KeyEdit(self, layer, self._append))
        elif self.in_sequence:
            yield from self._token_hooks()

    def _hold(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._strength != 0.0:
            _ENTERING.set({**_ENTERING.get(), self: args[0]})

    def _release(self, block: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        _ENTERING.set({part: tokens for part, tokens in _ENTERING.get().items() if part is not self})

    def entering(self, layer: int, images: int) -> Tensor:
        """The prompts of a layer as they come to its norm: (B, n, dim) with a mask per image, else (1, n, dim)."""
        prompts = self._batched(layer)
        if self._dropping("sample"):
            prompts = drop(prompts.expand(images, -1, -1), self.dropout)
        elif self._dropping("shared"):
            prompts = drop(prompts, self.dropout)
        return self._mapped(prompts)

    def _batched(self, layer: int) -> Tensor:
        """The prompts of a layer, (1 or B, n, dim)."""
        return prompts if (prompts := self.prompts(layer)).ndim == 3 else prompts.unsqueeze(0)

    def _mapped(self, prompts: Tensor) -> Tensor:
        """Prompts (B, n, dim) of which the Fourier share is transformed."""
        return (
            transformed(prompts, share) if (share := transformed_prompts(self.fourier, prompts.shape[1])) else prompts
        )


_ENTERING: ContextVar[Mapping[Prompt, Tensor]] = ContextVar("tokens that enter a block", default=MappingProxyType({}))
"""While the block runs, by the adaptive prompts that read them."""
