"""What `log_bias` does to a prompt before training: the attention that n prompts take, and how far features move.

Usage: ``VPT_DATA=FOLDER python -m benchmarks.log_bias`` with ViT-Ti/16 and photographs of caltech101 from that folder.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from vpt.backbones import create_backbone
from vpt.data import VTABDataModule
from vpt.models import TunedModel
from vpt.visualize.prompt_attention import measure_attention

NAME = "vit_tiny_patch16_224"
WEIGHTS = f"weights/{NAME}.augreg_in21k_ft_in1k.safetensors"


@torch.inference_mode()
def main() -> None:
    root = Path(os.environ["VPT_DATA"])
    images = torch.from_numpy(VTABDataModule("caltech101", root=root, preset="timm").split("test").images[:16].copy())
    bare = create_backbone(NAME, str(root / WEIGHTS))(images)
    print(f"{NAME}, 16 photographs, prompts as drawn (mean of 3 draws)")
    print("| tokens | n/(n + N) | share of attention | with log_bias | change of features | with log_bias |")
    print("|--:|--:|--:|--:|--:|--:|")
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
        columns = [f"{number / (number + 197):.1%}", *(f"{value:.1%}" for value in (*shares, *moved))]
        print(f"| {number} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
