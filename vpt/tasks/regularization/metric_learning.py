"""Prompts that stand for classes: metric learning of DA-VPT (Ren et al., CVPR 2025, arXiv 2505.23694).

The loss is Proxy-Anchor (Kim et al., "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020), with prompts as proxies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from vpt.backbones.attention.base import OpenAttention
from vpt.deltas.base import chosen_blocks
from vpt.deltas.prompts.prompt import Prompt
from vpt.errors import ConfigError, check_number
from vpt.models.classifier import TunedModel
from vpt.models.prediction import batch_answers
from vpt.run_record import global_seed
from vpt.screen import console
from vpt.tasks.regularization.second_loss import SecondLoss, Seen, State


@dataclass(frozen=True)
class MetricLearning(SecondLoss):
    """A second loss: rate · L(X, P) + class_rate · L(x, P), L being `proxy_anchor`, as a mean over blocks.

    P are what the prompts of a block ask with, W_q N(P) + b_q with all heads together; X what the heads of that block
    have gathered for the image's patches, each of the image's class; x what the class token asks with there. Each
    prompt is the proxy of a cluster of classes, found by k-means among the mean features of each class, as the head
    reads them: at first those of the frozen backbone, of training images that are not augmented, then, before each
    further epoch, those of the epoch before it, where k-means goes on from the centroids that it had. Where there are
    no more classes than prompts each has one of its own, and the prompts beyond stand for none. Sections 3.2 to 3.4 and
    equations 4 and 5 of the paper, whose released code is called on for x.

    Attributes:
        rate: β of the paper, of patches; not negative.
        class_rate: λ of the paper, of class tokens; not negative, and one of both positive.
        scale: 1/τ of the paper and α of Proxy-Anchor, positive.
        margin: δ, in [0, 1].
        layers: The blocks, ``[first, last + 1]``, counted from 0; None for the last that has prompts.
    """

    whole_batches: ClassVar[bool] = True

    rate: float = 0.01
    class_rate: float = 0.01
    scale: float = 32.0
    margin: float = 0.1
    layers: list[int] | None = None

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        for name, top in (("rate", 1e6), ("class_rate", 1e6), ("scale", 1e6), ("margin", 1)):
            check_number(f"{name} of metric_learning", getattr(self, name), 0, top)
        if self.scale == 0 or self.rate == self.class_rate == 0:
            raise ConfigError("metric_learning changes nothing with scale 0, or both rates 0: leave it out.")

    def check(self, options: Mapping[str, Any], model: TunedModel, data: Any) -> None:
        """Refuses, by a ConfigError, deltas, backbones and batches that it has no meaning for."""
        if others := [name for name in ("micro_batch", "mixup", "cutmix", "compile") if options[name]]:
            raise ConfigError(
                f"metric_learning looks into a whole batch of images with a class each: leave {others[0]} out."
            )
        if not hasattr(data, "split"):
            raise ConfigError("metric_learning clusters classes by training images: it needs a data module.")
        prompt, backbone = self._prompt(model), model.backbone
        if prompt.assigned is not None:
            raise ConfigError("metric_learning has each prompt stand for classes in its block: leave relocate out.")
        if not backbone.has_layout or backbone.layout.windowed:
            raise ConfigError(
                "metric_learning compares prompts with the patches of a sequence, which are not known of "
                f"{backbone.name}: leave it out."
            )
        if getattr(backbone.model, "grad_checkpointing", False):
            raise ConfigError("metric_learning looks into blocks once: leave activation checkpointing out.")
        if self.class_rate and not backbone.layout.has_class_token:
            raise ConfigError(f"{backbone.name} has no class token: set class_rate of metric_learning to 0.")
        blocks = self._blocks(prompt)
        if others := [str(block) for block in blocks if block not in _prompted(prompt)]:
            raise ConfigError(
                f"layers of metric_learning has block {others[0]}, and prompts are in {_prompted(prompt)}."
            )
        if len({_number(prompt, block) for block in blocks}) > 1:
            raise ConfigError("layers of metric_learning are of blocks with as many prompts each.")

    def _prompt(self, model: TunedModel) -> Prompt:
        """The prompts that are proxies; a ConfigError where there are none that can be."""
        prompts = [part for part in model.parts() if isinstance(part, Prompt) and part.deep]
        if len(prompts) != 1 or prompts[0].adaptive is not None:
            raise ConfigError(
                "metric_learning makes prompts stand for classes, which needs one delta `prompt` that is deep and not "
                "adaptive: add it, or leave metric_learning out."
            )
        return prompts[0]

    def _blocks(self, prompt: Prompt) -> list[int]:
        if self.layers is None:
            return _prompted(prompt)[-1:]
        return chosen_blocks(len(prompt.layout.blocks), self.layers, "layers of metric_learning")

    def start(self, model: TunedModel, data: Any) -> State:
        """The classes of each prompt by the frozen backbone."""
        training, alpha, split = model.training, model.strength, data.split("train")
        bar = partial(track, description="Classes of training images", console=console(stderr=True))
        model.eval()
        model.set_strength(0.0)
        try:
            features = torch.from_numpy(batch_answers(model, split, size=data.batch_size, bar=bar)[1])
        finally:
            model.set_strength(alpha)
            model.train(training)
        classes = model.head.out_features
        state = {"sums": torch.zeros(classes, features.shape[1]), "counts": torch.zeros(classes)}
        _count(state, features, torch.as_tensor(split.labels))
        return self.begin_epoch(model, state)

    def begin_epoch(self, model: TunedModel, state: State) -> State:
        """Clusters classes by what was counted since, if anything was, and counts anew."""
        device, counts, sums = model.head.weight.device, state["counts"].cpu(), state["sums"].cpu().double()
        if bool(counts.any()):
            before = state.get("means", torch.full_like(sums, torch.nan))
            means = torch.where(counts.unsqueeze(1) > 0, sums / counts.unsqueeze(1), before)
            prompt = self._prompt(model)
            clusters, centroids = cluster(means, _number(prompt, self._blocks(prompt)[0]), state.get("centroids"))
            state = {"means": means, "clusters": clusters, "centroids": centroids}
            state |= {"sums": torch.zeros_like(sums, dtype=torch.float32), "counts": torch.zeros_like(counts)}
        here = {name: state[name].to(device) for name in ("sums", "counts", "clusters")}
        return {"means": state["means"].cpu(), "centroids": state["centroids"].cpu(), **here}

    @contextmanager
    def around(self, model: TunedModel) -> Iterator[Seen]:
        """Sees ``features`` (B, dim); of block N ``patches/N`` (B, patches, dim) and ``class/N`` (B, dim)."""
        seen: Seen = {}
        with ExitStack() as hooked:
            hooked.callback(model.head.register_forward_pre_hook(partial(_read, seen)).remove)
            for block in self._blocks(self._prompt(model)):
                attention, patches = model.backbone.layout.attentions[block], model.backbone.layout.patches[block]
                asked: list[int | None] = []
                asks = partial(_ask, asked, seen, f"class/{block}" if self.class_rate else None)
                hooked.callback(attention.register_forward_pre_hook(asks, with_kwargs=True).remove)
                gathered = partial(_gather, seen, f"patches/{block}", patches)
                hooked.callback(attention.proj.register_forward_pre_hook(gathered).remove)
                hooked.callback(attention.register_forward_hook(partial(_answer, asked)).remove)
            yield seen

    def loss(
        self, model: TunedModel, state: State, batch: Mapping[str, Tensor], logits: Tensor, place: str, seen: Seen
    ) -> Tensor:
        """See `SecondLoss`; counts the features."""
        _count(state, seen["features"].detach(), batch["label"])
        prompt, own = self._prompt(model), state["clusters"][batch["label"].long()]
        blocks, losses = self._blocks(prompt), list[Tensor]()
        for block in blocks:
            with model.backbone.computing():
                proxies = _together(cast("Tensor", prompt.queries(block)))[0, : len(state["centroids"])]
            if self.rate:
                patches = seen[f"patches/{block}"]
                each = own.repeat_interleave(patches.shape[1])
                pulled = proxy_anchor(patches.flatten(0, 1), proxies, each, self.scale, self.margin)
                losses.append(self.rate * pulled)
            if self.class_rate:
                asking = seen[f"class/{block}"]
                losses.append(self.class_rate * proxy_anchor(asking, proxies, own, self.scale, self.margin))
        return torch.stack(losses).sum() / len(blocks)


def proxy_anchor(data: Tensor, proxies: Tensor, own: Tensor, scale: float = 32.0, margin: float = 0.1) -> Tensor:
    """Proxy-Anchor, a scalar, in single precision at least (Kim et al., CVPR 2020, equation 4).

    The mean over proxies p that have data of log(1 + Σ over their own x of exp(-α (s(x, p) - δ))), and the mean over
    all proxies of log(1 + Σ over all other x of exp(α (s(x, p) + δ))), with s the cosine of their angle.

    Args:
        data: x, (N, dim), at least one.
        proxies: p, (K, dim).
        own: The proxy of each x, int64 (N,), in [0, K).
        scale: α.
        margin: δ.
    """
    kind = torch.promote_types(data.dtype, torch.float32)
    with torch.autocast(data.device.type, enabled=False):  # α would scale the rounding of half precision
        cosines = normalize(data.to(kind), dim=1) @ normalize(proxies.to(kind), dim=1).T
    positive = own.unsqueeze(1) == torch.arange(len(proxies), device=own.device)
    one = cosines.new_zeros(1, len(proxies))
    pull = torch.cat([one, (-scale * (cosines - margin)).masked_fill(~positive, -torch.inf)]).logsumexp(dim=0)
    push = torch.cat([one, (scale * (cosines + margin)).masked_fill(positive, -torch.inf)]).logsumexp(dim=0)
    return pull.sum() / positive.any(dim=0).sum() + push.mean()  # without data of its own a proxy has a pull of 0


def cluster(means: Tensor, number: int, centroids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Clusters classes by k-means.

    Args:
        means: Of each class, float64 (C, dim); NaN where it has none.
        number: Of clusters, at least 1.
        centroids: Where k-means starts, as it gave them before; None for ten draws by the run's seed, the best of which
            counts.

    Returns:
        The cluster of each class, int64 (C,), -1 where it has no mean; and centroids (number, dim), or those of each
        class that has a mean, where these are no more.
    """
    known = ~means.isnan().any(dim=1)
    clusters, points = torch.full((len(means),), -1), means[known]
    if len(points) <= number:
        clusters[known] = torch.arange(len(points))
        return clusters, points
    from sklearn.cluster import KMeans  # late: it takes a second or more

    init: Any = "k-means++" if centroids is None else centroids.numpy()
    fit = KMeans(number, init=init, n_init=10 if centroids is None else 1, random_state=global_seed())
    labels: NDArray[np.int32] = fit.fit(points.numpy()).labels_
    clusters[known] = torch.from_numpy(labels).long()
    return clusters, torch.from_numpy(fit.cluster_centers_)


def _count(state: State, features: Tensor, labels: Tensor) -> None:
    """Adds features (B, dim) to the sums of their classes; by a product, which a card adds up in one order."""
    which = one_hot(labels.long(), len(state["counts"])).to(state["sums"])
    with torch.autocast(features.device.type, enabled=False):
        state["sums"] += which.T @ features.to(which)
    state["counts"] += which.sum(dim=0)


def _prompted(prompt: Prompt) -> list[int]:
    """The blocks that have prompts."""
    return [block for block in prompt.blocks if _number(prompt, block)]


def _number(prompt: Prompt, block: int) -> int:
    """How many prompts a block has."""
    return prompt.shapes[0 if prompt.shared else prompt.blocks.index(block)][0]


def _together(heads: Tensor) -> Tensor:
    """(B, heads, n, head_dim) to (B, n, heads · head_dim)."""
    return heads.transpose(1, 2).flatten(2)


def _read(seen: Seen, head: nn.Module, args: tuple[Tensor, ...]) -> None:
    seen["features"] = args[0]


def _ask(
    asked: list[int | None], seen: Seen, key: str | None, attention: OpenAttention, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Lets all tokens ask, also where only those go on that are pooled."""
    if key is not None:
        seen[key] = _together(attention.project(args[0][:, :1])[0])[:, 0]
    asked.append(kwargs.get("keep"))
    return args, {name: value for name, value in kwargs.items() if name != "keep"}


def _gather(seen: Seen, key: str, patches: int, projection: nn.Module, args: tuple[Tensor, ...]) -> None:
    seen[key] = args[0][:, -patches:]


def _answer(asked: list[int | None], attention: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out[:, : asked.pop()]
