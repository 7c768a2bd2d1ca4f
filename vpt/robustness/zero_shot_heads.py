"""Heads that know the classes before anything is trained: the other end of WiSE-FT, written as delta files.

A linear probe is one too (`vpt.models.delta_file.read_head` reads either). Text heads
are CLIP's zero-shot classifier (Radford et al., ICML 2021, section 3.1.4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpt.backbones import Backbone, pretrained_head
from vpt.backbones.checkpoints import one_try
from vpt.data import ImageDataset
from vpt.errors import ConfigError, WeightsError
from vpt.models.classifier import TunedModel
from vpt.models.delta_file import save_delta


def sub_head(head: nn.Linear, classes: Sequence[int]) -> nn.Linear:
    """The rows of a pretrained classifier (C, features) that are the classes of a task, in the task's order; frozen.

    A missing bias becomes zero. Raises a ConfigError if a position is not in 0..C-1, occurs twice, or there is none.
    """
    known = head.out_features
    if not classes:
        raise ConfigError("A head needs at least one class: give a position in the pretrained head for each.")
    for place, position in enumerate(classes):
        if not 0 <= position < known:
            raise ConfigError(f"Class {place} is matched to {position}, but the pretrained head has 0 to {known - 1}.")
        if (first := classes.index(position)) != place:
            raise ConfigError(f"Classes {first} and {place} are both matched to {position}: only one could ever win.")
    rows = torch.tensor(list(classes), device=head.weight.device)
    bias = head.weight.new_zeros(known) if head.bias is None else head.bias
    return frozen(head.weight[rows], bias[rows])


def own_head(backbone: Backbone, classes: Sequence[int] | None = None) -> nn.Linear:
    """The frozen classifier that a backbone's weights were published with, or the classes of it that a task needs.

    Raises a WeightsError if there is no linear one, a ConfigError if the match of classes is impossible (`sub_head`) or
    the backbone has another pool than its weights.
    """
    if backbone.pool is not None:
        raise ConfigError(f"The classifier of {backbone.weights_id} reads the weights' own pool: leave pool out.")
    head = pretrained_head(backbone.name, backbone.weights)
    return head if classes is None else sub_head(head, classes)


def write_head(
    path: Path,
    backbone: Backbone,
    head: nn.Linear,
    class_names: Sequence[str],
    preset: dict[str, Any],
    info: Mapping[str, Any],
) -> Path:
    """Writes a head (classes, features) as a linear probe's delta file, which ``--anchor`` and ``init_head`` take.

    `preset` is the preprocessing (`Preset.to_dict`), `info` says where the head comes from, in plain JSON values.
    Raises a ConfigError if the head does not fit backbone or classes.
    """
    if head.weight.shape != (len(class_names), backbone.num_features):
        raise ConfigError(
            f"The head is {tuple(head.weight.shape)}, but {backbone.name} has {backbone.num_features} features and the "
            f"task {len(class_names)} classes."
        )
    model = TunedModel(backbone, len(class_names), (), class_names, preset)
    model.head.load_state_dict(head.state_dict())
    model.info = dict(info)
    return save_delta(path, model)


def frozen(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A head of weights (classes, features) and bias (classes,) that does not train."""
    made = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made.requires_grad_(False)


Encoder = Callable[[list[str]], Tensor]
"""Texts to embeddings (texts, embedding), of any length."""

TEMPLATES = Path(__file__).with_name("templates.txt")


def read_templates(path: Path = TEMPLATES) -> list[str]:
    """Reads templates, a line each; one line is a single hard prompt, several are an ensemble.

    Raises a ConfigError if there is no such file, no line, or a line in which ``{}`` does not stand exactly once.
    """
    if not path.is_file():
        raise ConfigError(f"No templates {path}: give a text file with lines such as `a photo of a {{}}.`.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{path} has no template: write lines such as `a photo of a {{}}.`.")
    for line in lines:
        if line.count("{}") != 1:
            raise ConfigError(f"The template {line!r} in {path} must have {{}} once, where the class name goes.")
    return lines


@torch.no_grad()
def text_head(class_names: Sequence[str], templates: Sequence[str], encode: Encoder, scale: float) -> nn.Linear:
    """Embeds every class in every template: each normalised, averaged, normalised again, times the scale.

    The scale is exp(logit_scale), 100 in OpenAI's CLIP; ``_`` in a name is read as a space. Returns a frozen head
    (classes, embedding) with zero bias, for normalised image embeddings. Raises a ConfigError if two classes have the
    same name, so that one of them could never win.
    """
    names = [name.replace("_", " ").strip() for name in class_names]
    if twice := sorted({name for name in names if [other.casefold() for other in names].count(name.casefold()) > 1}):
        raise ConfigError(f"Several classes are called {', '.join(map(repr, twice))}: tell them apart by their names.")
    rows = []
    for name in names:
        each = nn.functional.normalize(encode([template.replace("{}", name) for template in templates]), dim=-1)
        rows.append(nn.functional.normalize(each.mean(dim=0), dim=-1))
    weight = torch.stack(rows) * scale
    return frozen(weight, weight.new_zeros(len(names)))


def image_head(texts: nn.Linear, projection: nn.Linear, features: Tensor) -> nn.Linear:
    """Puts a text head (classes, embedding) behind the image tower's projection, as one linear head on pooled features.

    CLIP divides each projected image by its own length, which no linear head can. Here all are divided by their mean
    length over some training images' features (N, features): the answers (argmax) are exactly CLIP's, the logits differ
    by each image's length over the mean. The projection (embedding, features) is the classifier of timm's CLIP weights.
    Raises a ConfigError if the widths do not fit.
    """
    if texts.in_features != projection.out_features or projection.in_features != features.shape[-1]:
        raise ConfigError(
            f"Texts of width {texts.in_features}, a projection from {projection.in_features} to "
            f"{projection.out_features} and features of width {features.shape[-1]} do not fit: take one CLIP model."
        )
    with torch.no_grad():
        length = projection(features.to(projection.weight)).norm(dim=-1).mean()
        offset = texts.bias if projection.bias is None else texts.bias + texts.weight @ projection.bias / length
        return frozen(texts.weight @ projection.weight / length, offset)


def clip_text(name: str, pretrained: str) -> tuple[Encoder, float]:
    """Loads the text tower of an open_clip model such as ``ViT-B-16`` with ``openai``, and exp(logit_scale).

    Raises a ConfigError if open_clip is not installed, a WeightsError if it has no such model or cannot fetch the
    weights.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError("Text heads need open_clip: pip install 'vpt[clip]'.") from error
    try:
        with one_try():
            model = open_clip.create_model(name, pretrained=pretrained).eval().requires_grad_(False)
            tokenize = open_clip.get_tokenizer(name)
    except Exception as error:  # unknown names, files and every error of the hub's client
        raise WeightsError(f"open_clip cannot load {name} with {pretrained!r} ({type(error).__name__}).") from error
    return lambda texts: model.encode_text(tokenize(texts)), float(model.logit_scale.exp())


@torch.inference_mode()
def zero_shot(backbone: Backbone, texts: nn.Linear, images: ImageDataset, number: int = 256) -> nn.Linear:
    """A text head on the pooled features of timm's CLIP image tower; errors as of `image_head` and `own_head`.

    Some `number` of training images, evenly spread over the list, tell how long projected features are.
    """
    projection = own_head(backbone)
    rows = range(0, len(images), max(1, len(images) // number))
    features = [backbone(images[row]["image"][None]) for row in rows]
    return image_head(texts, projection, torch.cat(features))
