"""DA-VPT's metric learning against prompts as tokens and k-means written out, and what it leaves as it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, linear

from tests.deltas.families import SEQUENCES, make
from tests.tasks.test_losses import _Stop
from tests.tasks.test_tasks import BASE, data, trainer
from vpt.data import DigitsDataModule
from vpt.errors import ConfigError, UnknownNameError
from vpt.models.classifier import TunedModel
from vpt.run_record import training_protocol
from vpt.tasks import DeltaTuning, FineTuning, LinearProbe, PromptTuning
from vpt.tasks.regularization import MetricLearning
from vpt.tasks.regularization.metric_learning import cluster, proxy_anchor
from vpt.tasks.run_protocol import protocol

PROMPT: dict[str, Any] = {"name": "prompt", "num_tokens": 4}


def few() -> DigitsDataModule:
    return data(shots=6)


def published(data: Tensor, proxies: Tensor, own: Tensor, scale: float, margin: float) -> Tensor:
    """Equation 4 of Proxy-Anchor, one proxy after the other."""
    pull, push = [], []
    for k, proxy in enumerate(proxies):
        positive, negative = data.new_zeros(()), data.new_zeros(())
        for x, of in zip(data, own.tolist(), strict=True):
            s = cosine_similarity(x, proxy, dim=0)
            if of == k:
                positive = positive + torch.exp(-scale * (s - margin))
            else:
                negative = negative + torch.exp(scale * (s + margin))
        if k in own.tolist():
            pull.append(torch.log(1 + positive))
        push.append(torch.log(1 + negative))
    return torch.stack(pull).mean() + torch.stack(push).mean()


@pytest.mark.parametrize(("scale", "margin"), [(32.0, 0.1), (5.0, 0.0), (1.5, 1.0)])
def test_proxy_anchor_and_its_gradient_are_those_of_the_paper(scale: float, margin: float) -> None:
    torch.manual_seed(0)
    points, proxies = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (9, 5))
    own = torch.tensor([0, 0, 3, 1, 3, 3, 0, 1, 0])  # none of proxies 2 and 4
    found = proxy_anchor(points, proxies, own, scale, margin)
    expected = published(points, proxies, own, scale, margin)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, other in zip(*(torch.autograd.grad(each, [points, proxies]) for each in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_proxy_anchor_of_one_point_is_what_one_computes_by_hand_and_large_ones_do_not_overflow() -> None:
    x, p = torch.tensor([[3.0, 0.0]]).double(), torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double()
    near, far = math.log1p(math.exp(-32 * (1 - 0.1))), math.log1p(math.exp(32 * (0 + 0.1))) / 2
    assert float(proxy_anchor(x, p, torch.tensor([0]))) == pytest.approx(near + far, rel=1e-14)
    steep = x.float().requires_grad_()
    loss = proxy_anchor(steep, p.float(), torch.tensor([1]), scale=1e4)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(1e4 * 0.1 + 1e4 * 1.1 / 2)
    assert bool(steep.grad is not None and steep.grad.isfinite().all())


class Concatenated:
    """A ViT whose deep prompts are tokens of each block: what is compared, from a pass as the paper draws it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prompts = [model.parts()[0].prompts(layer) for layer in range(len(model.backbone.layout.blocks))]
        self.compared: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, images: Tensor) -> Tensor:
        """Class tokens, (B, dim).

        Then `compared` has of each block what prompts ask with, (n, dim), what the heads gather for patches, (B, N,
        dim), and what class tokens ask with, (B, dim).
        """
        timm, n = self.model.backbone.model, len(self.prompts[0])
        x = timm.norm_pre(timm._pos_embed(timm.patch_embed(self.model.backbone.normalize(images))))
        for prompts, block in zip(self.prompts, timm.blocks, strict=True):
            tokens = torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], dim=1)
            attn, normed = block.attn, block.norm1(tokens)
            q, k, v = linear(normed, attn.qkv.weight, attn.qkv.bias).chunk(3, dim=-1)
            heads = [
                ((a @ b.mT) * a.shape[-1] ** -0.5).softmax(dim=-1) @ c
                for a, b, c in zip(*(part.chunk(attn.num_heads, dim=-1) for part in (q, k, v)), strict=True)
            ]
            gathered = torch.cat(heads, dim=-1)
            self.compared.append((q[0, 1 : 1 + n], gathered[:, 1 + n :], q[:, 0]))
            tokens = tokens + linear(gathered, attn.proj.weight, attn.proj.bias)
            tokens = tokens + block.mlp(block.norm2(tokens))
            x = torch.cat([tokens[:, :1], tokens[:, 1 + n :]], dim=1)
        pooled: Tensor = timm.forward_head(timm.norm(x), pre_logits=True)
        return pooled


def fitted(options: dict[str, Any], deltas: Any = (PROMPT,), **task: Any) -> DeltaTuning:
    L.seed_everything(4)
    made = DeltaTuning(list(deltas), **BASE | task, metric_learning=options)
    trainer(epochs=1, batches=3).fit(made, datamodule=few())
    return made


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0.7, "class_rate": 0.3},
        {"rate": 0.0, "class_rate": 2.0, "scale": 5.0},
        {"rate": 1.5, "class_rate": 0.0, "layers": [1, 2], "margin": 0.4},
        {"rate": 0.5, "class_rate": 0.6, "layers": [3, 6]},
    ],
)
def test_loss_and_gradient_are_those_of_prompts_as_tokens(options: dict[str, Any], pool: str) -> None:
    task = fitted(options, pool=pool).double()
    batch = few().split("train").batch(range(5))
    own = task._remembered["metric_learning"]["clusters"][batch["label"]]
    trained = [p for p in task.model.parameters() if p.requires_grad]
    found = torch.stack([mean for mean, _ in task.training_losses(batch)]).sum()
    gradients = torch.autograd.grad(found, trained)
    task.model.delta.detach()  # type: ignore[union-attr]
    written, given = Concatenated(task.model), MetricLearning(**options)
    labels = cross_entropy(task.model.head(written(batch["image"])), batch["label"])
    blocks, pulls = range(*options.get("layers", (5, 6))), []
    for asking, patches, classes in (written.compared[block] for block in blocks):
        flat, each = patches.flatten(0, 1), own.repeat_interleave(patches.shape[1])
        assert patches.shape == (5, 64, task.model.backbone.num_features)
        pulls.append(given.rate * proxy_anchor(flat, asking, each, given.scale, given.margin))
        pulls[-1] = pulls[-1] + given.class_rate * proxy_anchor(classes, asking, own, given.scale, given.margin)
    pull = sum(pulls, start=torch.zeros(())) / len(blocks)
    assert pull.item() > 1e-2
    torch.testing.assert_close(found, labels + pull, rtol=1e-10, atol=1e-12)
    for one, other in zip(gradients, torch.autograd.grad(labels + pull, trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("family", SEQUENCES)
def test_every_family_has_patches_and_queries_and_its_features_stay(family: str) -> None:
    backbone, _ = make(family)
    model = TunedModel(
        backbone, 3, [{"name": "prompt", "num_tokens": 2}, {"name": "prompt", "num_tokens": 3, "deep": False}]
    )
    images = backbone.random_images(2)
    given = MetricLearning(class_rate=float(backbone.layout.has_class_token), layers=[1, 3])
    given.check(dict.fromkeys(("micro_batch", "mixup", "cutmix", "compile")), model, few())
    before = model(images)
    with given.around(model) as seen:
        logits = model(images)
    torch.testing.assert_close(logits, before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.head(seen["features"]), logits)
    assert seen["patches/1"].shape == seen["patches/2"].shape == (2, 16, 24)
    means = torch.eye(3, 24, dtype=torch.float64)
    state = {"means": means, "centroids": means[:2], "clusters": torch.tensor([0, 1, 1])}
    state |= {"sums": torch.zeros(3, 24), "counts": torch.zeros(3)}
    batch = {"image": images, "label": torch.tensor([2, 0])}
    loss = given.loss(model, state, batch, logits, "", seen)
    tokens: Any = model.parts()[0].tokens
    assert all(float(each.norm()) > 0 for each in torch.autograd.grad(loss, tokens)[0])
    assert state["counts"].tolist() == [1, 0, 1]


def lloyd(points: NDArray[np.float64], centroids: NDArray[np.float64]) -> NDArray[np.int64]:
    """k-means from given centroids, until nothing changes."""
    while True:
        own: NDArray[np.int64] = ((points[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)
        moved = np.stack([points[own == k].mean(axis=0) for k in range(len(centroids))])
        if np.allclose(moved, centroids, rtol=1e-9):
            return own
        centroids = moved


def test_prompts_stand_for_clusters_of_class_means_of_the_frozen_backbone() -> None:
    task, module = PromptTuning(num_tokens=4, **BASE, metric_learning={}), few()
    L.seed_everything(4)
    trainer(epochs=1, batches=1).fit(task, datamodule=module)
    state, model, split = task._remembered["metric_learning"], task.model, module.split("train")
    model.eval().set_strength(0.0)
    with torch.no_grad():
        features = model.encode(split.batch(range(60))["image"])
    labels = np.asarray(split.labels)
    means = np.stack([features[labels == k].double().numpy().mean(axis=0) for k in range(10)])
    np.testing.assert_allclose(state["means"].numpy(), means, atol=1e-5)
    clusters = state["clusters"].numpy()
    assert sorted(set(clusters)) == [0, 1, 2, 3]
    centroids = np.stack([means[clusters == k].mean(axis=0) for k in range(4)])
    np.testing.assert_allclose(state["centroids"].numpy(), centroids, atol=1e-5)
    np.testing.assert_array_equal(lloyd(means, centroids), clusters)
    assert int(state["counts"].sum()) == 8  # of the one step


def test_classes_are_clustered_anew_by_the_class_tokens_of_an_epoch_from_the_centroids_before() -> None:
    task, module = fitted({}), few()
    given = task._seconds["metric_learning"]
    before = task._remembered["metric_learning"] = given.begin_epoch(task.model, task._remembered["metric_learning"])
    batches = [module.split("train").batch(rows) for rows in (range(30), range(30, 55))]
    batches = [{key: column[batch["label"] != 7] for key, column in batch.items()} for batch in batches]
    for batch in batches:
        task.training_losses(batch)
    with torch.no_grad():
        features = torch.cat([task.features(batch, "train") for batch in batches]).double().numpy()
    labels = np.concatenate([batch["label"].numpy() for batch in batches])
    counted = {key: tensor.clone() for key, tensor in before.items()}
    after = given.begin_epoch(task.model, before)
    means = np.stack([features[labels == k].mean(axis=0) if k != 7 else counted["means"][7].numpy() for k in range(10)])
    np.testing.assert_allclose(after["means"].numpy(), means, atol=1e-5)
    np.testing.assert_array_equal(after["clusters"].numpy(), lloyd(means, counted["centroids"].numpy()))
    assert not np.allclose(after["centroids"], counted["centroids"])
    assert float(after["sums"].abs().sum()) == float(after["counts"].sum()) == 0
    again = given.begin_epoch(task.model, after)  # nothing was seen since
    assert all(torch.equal(again[key], after[key]) for key in after)


def test_each_of_few_classes_has_a_prompt_of_its_own_and_the_others_are_free() -> None:
    means = torch.randn(6, 3, dtype=torch.float64)
    means[2] = torch.nan  # without images
    for number in (5, 9):
        clusters, centroids = cluster(means, number)
        assert clusters.tolist() == [0, 1, -1, 2, 3, 4]
        assert torch.equal(centroids, means[clusters >= 0])
    clusters, centroids = cluster(means, 2)
    assert clusters[2] == -1
    assert centroids.shape == (2, 3)
    task = fitted({}, [PROMPT | {"num_tokens": 12}])
    batch = few().split("train").batch(range(5))
    given, state = task._seconds["metric_learning"], task._remembered["metric_learning"]
    assert state["clusters"].tolist() == list(range(10))
    with given.around(task.model) as seen:
        logits = task.model(batch["image"])
    fixed = {name: tensor.detach() for name, tensor in seen.items()}  # through which all prompts act
    second = given.loss(task.model, state, batch, logits, "", fixed)
    tokens: Any = task.model.parts()[0].tokens
    last = torch.autograd.grad(second, tokens)[0][-1]
    assert [bool(row.any()) for row in last] == [True] * 10 + [False] * 2


@pytest.mark.parametrize("behind_validation", [False, True])
def test_a_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path, behind_validation: bool) -> None:
    def leg(stop: int, checkpoint: Path | None = None) -> PromptTuning:
        L.seed_everything(0)
        task = PromptTuning(num_tokens=4, **BASE, metric_learning={"rate": 0.5, "class_rate": 0.5})
        keep = ModelCheckpoint(
            dirpath=tmp_path / str(stop), save_last=True, save_on_train_epoch_end=not behind_validation
        )
        run = trainer(epochs=3, batches=7, callbacks=[keep, _Stop(stop)])
        run.fit(task, datamodule=few(), ckpt_path=checkpoint, weights_only=True)
        return task

    whole, stopped = leg(3), leg(1)
    resumed = leg(3, tmp_path / "1" / "last.ckpt")
    states = [task._remembered["metric_learning"] for task in (whole, resumed, stopped)]
    for key, tensor in states[0].items():
        assert torch.equal(states[1][key], tensor), key
    assert not torch.equal(states[2]["centroids"], states[0]["centroids"])  # clustered anew since
    for key, tensor in whole.model.owned().items():
        assert torch.equal(resumed.model.owned()[key], tensor), key


def test_nothing_of_it_is_left_on_the_model() -> None:
    task, batch = fitted({}), few().split("train").batch(range(4))
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in task.model.modules()]
    before = task.model(batch["image"])
    task.training_losses(batch)
    with pytest.raises(ConfigError):
        task.training_losses(batch | {"image": batch["image"][:, :1]})
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in task.model.modules()] == hooks
    assert torch.equal(task.model(batch["image"]), before)
    assert torch.equal(task.logits(batch, "val"), before)


@pytest.mark.parametrize(
    ("deltas", "options"),
    [
        ([PROMPT | {"shared": True, "dropout": 0.1}], {}),
        ([PROMPT | {"project": 8}, {"name": "bias"}], {}),
        ([PROMPT | {"fourier": 0.5, "gate": {"init": -5}}, {"name": "lora", "rank": 2}], {}),
        ([PROMPT | {"mask": ["x . x x"] * 6, "temperature": {}}, {"name": "adapter", "rank": 2}], {}),
        ([PROMPT | {"layers": [1, 3], "num_tokens": [2, 3]}, {"name": "convpass"}], {}),
        ([PROMPT, {"name": "norm"}], {"init_head": "probe", "probe_l2": 0.01, "keep_answers": {}, "ema_decay": 0.9}),
        ([PROMPT], {"frozen_dtype": "bfloat16", "pool": "avg"}),
    ],
)
def test_it_trains_with_options_of_prompts_and_beside_other_deltas(deltas: Any, options: dict[str, Any]) -> None:
    task = fitted({}, deltas, **options)
    assert task.model.training
    assert task.model.strength == 1.0
    losses = task.training_losses(few().split("train").batch(range(3)))
    assert all(bool(loss.isfinite()) for loss, _ in losses)
    number = {(1, 3): 3}.get(tuple(deltas[0].get("layers", ())), 3 if "mask" in deltas[0] else 4)
    assert len(task._remembered["metric_learning"]["centroids"]) == number


def test_cosines_are_not_rounded_under_autocast() -> None:
    points, own = torch.randn(8, 16), torch.arange(8) % 3
    with torch.autocast("cpu", torch.bfloat16):
        found = proxy_anchor(points, points[:3], own)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, proxy_anchor(points, points[:3], own), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (LinearProbe, {}, "needs one delta `prompt` that is deep"),
        (FineTuning, {}, "needs one delta `prompt` that is deep"),
        (PromptTuning, {"deep": False}, "needs one delta `prompt` that is deep"),
        (DeltaTuning, {"deltas": [PROMPT, PROMPT]}, "needs one delta `prompt`"),
        (DeltaTuning, {"deltas": [PROMPT | {"adaptive": {}}]}, "and not adaptive"),
        (PromptTuning, {"micro_batch": 2}, "leave micro_batch out"),
        (PromptTuning, {"mixup": 0.2}, "leave mixup out"),
        (PromptTuning, {"cutmix": 0.2}, "leave cutmix out"),
        (PromptTuning, {"compile": True}, "leave compile out"),
        (PromptTuning, {"backbone": "swin_nano_patch4_window8_64"}, "not known of swin_nano_patch4_window8_64"),
        (
            PromptTuning,
            {"metric_learning": {"layers": [5, 7]}},
            r"layers of metric_learning is \[first, last \+ 1\] of 6 blocks",
        ),
        (
            DeltaTuning,
            {"deltas": [PROMPT | {"layers": [1, 3]}], "metric_learning": {"layers": [2, 4]}},
            r"has block 3, and prompts are in \[1, 2\]",
        ),
        (
            DeltaTuning,
            {"deltas": [PROMPT | {"num_tokens": [2, 2, 2, 0, 2, 0]}], "metric_learning": {"layers": [2, 4]}},
            r"has block 3, and prompts are in \[0, 1, 2, 4\]",
        ),
        (DeltaTuning, {"deltas": [PROMPT | {"relocate": {}}]}, "leave relocate out"),
        (
            DeltaTuning,
            {"deltas": [PROMPT | {"layers": [1, 3], "num_tokens": [2, 3]}], "metric_learning": {"layers": [1, 3]}},
            "of blocks with as many prompts each",
        ),
    ],
)
def test_where_prompts_cannot_stand_for_classes_training_does_not_begin(
    kind: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        trainer().fit(kind(**BASE | {"metric_learning": {}} | options), datamodule=few())


def test_without_class_tokens_there_are_patches_alone() -> None:
    backbone, _ = make("avg-pool")
    model, options = TunedModel(backbone, 3, [PROMPT]), dict.fromkeys(("micro_batch", "mixup", "cutmix", "compile"))
    with pytest.raises(ConfigError, match="has no class token: set class_rate of metric_learning to 0"):
        MetricLearning().check(options, model, few())
    MetricLearning(class_rate=0.0).check(options, model, few())


def test_activation_checkpointing_is_refused() -> None:
    task = PromptTuning(**BASE, metric_learning={})
    backbone: Any = task.model.backbone.model
    backbone.set_grad_checkpointing(True)
    with pytest.raises(ConfigError, match="leave activation checkpointing out"):
        trainer().fit(task, datamodule=few())


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    with pytest.raises(
        ConfigError, match="metric_learning is of all images of a step together: train with one process"
    ):
        trainer().fit(PromptTuning(**BASE, metric_learning={}), datamodule=few())


def test_numbers_are_checked_and_part_of_the_protocol() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"rate": 0, "class_rate": 0}, "both rates 0"),
        ({"scale": 0}, "changes nothing with scale 0"),
        ({"class_rate": -1}, "class_rate of metric_learning"),
        ({"margin": 32}, "margin of metric_learning"),
        ({"layers": 3}, "layers"),
        ({"beta": 1}, "beta"),
    ]
    for given, said in wrong:
        with pytest.raises((ConfigError, UnknownNameError), match=said):
            PromptTuning(**BASE, metric_learning=given)
    with pytest.raises(ConfigError, match="metric_learning has no effect with solver lbfgs"):
        LinearProbe(solver="lbfgs", **BASE, metric_learning={})
    left_out: dict[str, Any] | None = None
    tasks = [PromptTuning(**BASE, metric_learning=given) for given in (left_out, dict[str, Any]())]
    plain, guided = (training_protocol(protocol(trainer(), task)) for task in tasks)
    assert plain != guided
    record = protocol(trainer(), tasks[0])
    old = {name: value for name, value in record["hyperparameters"].items() if name != "metric_learning"}
    assert training_protocol({**record, "hyperparameters": old}) == plain
