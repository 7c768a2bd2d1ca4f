"""What `log_bias` does to a prompt before training: the attention that n prompts take, and how far features move.

VPT_DATA=FOLDER python -m benchmarks.log_bias    # ViT-Ti/16 and photographs of caltech101 from that folder
python -m benchmarks.log_bias --print
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.records import RESULTS, Records, Row, markdown
from vpt.backbones import create_backbone
from vpt.data import VTABDataModule
from vpt.models import TunedModel
from vpt.visualize.attention_maps import measure_attention

NAME = "vit_tiny_patch16_224"
WEIGHTS = f"weights/{NAME}.augreg_in21k_ft_in1k.safetensors"


@torch.inference_mode()
def measure(root: Path) -> Iterator[Row]:
    """Shares of attention and changes of the features, without and with `log_bias`: means of three draws."""
    images = torch.from_numpy(VTABDataModule("caltech101", root=root, preset="timm").split("test").images[:16].copy())
    bare = create_backbone(NAME, str(root / WEIGHTS))(images)
    for number in (1, 10, 50, 100, 200):
        shares, moved = [], []
        for log_bias in (False, True):
            share = change = 0.0
            for seed in range(3):
                torch.manual_seed(seed)
                spec = {"name": "prompt", "num_tokens": number, "log_bias": log_bias}
                model = TunedModel(create_backbone(NAME, str(root / WEIGHTS)), 2, [spec]).eval()
                share += float(measure_attention(model, images).share.mean()) / 3
                change += float((model.backbone(images) - bare).norm() / bare.norm()) / 3
            shares.append(share)
            moved.append(change)
        yield {"tokens": number, "shares": shares, "changes": moved}


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    head = ["tokens", "uniform attention, n / (n + N)"]
    head += [name for each in ("attention on prompts", "change of features") for name in (each, f"{each}, `log_bias`")]
    rows = [
        [row["tokens"], *(f"{share:.1%}" for share in (_equal(row["tokens"]), *row["shares"], *row["changes"]))]
        for row in _kept(out).rows()
    ]
    return {"log bias": markdown(head, rows, 0)}


def _equal(tokens: int) -> float:
    return tokens / (tokens + 197)


def _kept(out: Path) -> Records:
    return Records(out / "log_bias.jsonl", "tokens")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, keeps and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--print", action="store_true", help="measure nothing, print what is there")
    args = parser.parse_args(argv)
    if not args.print:
        for row in measure(Path(os.environ["VPT_DATA"])):
            _kept(args.out).put(row)
    print(*blocks(args.out).values(), sep="\n\n")


if __name__ == "__main__":
    main()
