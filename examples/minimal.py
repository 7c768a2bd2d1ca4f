"""From images to accuracy: a prompt trained in a plain torch loop, with nothing but the public names of vpt.

    python examples/minimal.py

Runs offline in half a minute, on a small ViT and scikit-learn's digits, which both come with the package.
"""

import torch

import vpt


def main(epochs: int = 3, batches: int | None = None) -> float:
    """Trains ten deep prompts and a head, and returns the accuracy on the test images.

    Args:
        epochs: Passes over the training images.
        batches: Stop each pass after so many; None reads all.
    """
    torch.manual_seed(0)
    data = vpt.DigitsDataModule(batch_size=32)  # or vpt.FolderDataModule(root="photos", batch_size=32)
    data.setup("fit")
    data.setup("test")

    backbone = vpt.create_backbone("vit_nano_patch8_64")  # any timm ViT, Swin, ...: frozen, normalises inside
    prompt = vpt.attach(backbone, [{"name": "prompt", "num_tokens": 10, "deep": True}])
    head = torch.nn.Linear(backbone.num_features, data.num_classes)
    optimizer = torch.optim.AdamW([*prompt.parameters(), *head.parameters()], lr=5e-3)

    for epoch in range(epochs):
        prompt.train()
        for number, batch in enumerate(data.train_dataloader()):
            if number == batches:
                break
            logits = head(backbone(batch["image"]))  # uint8 (B, 3, H, W) -> (B, features) -> (B, classes)
            loss = torch.nn.functional.cross_entropy(logits, batch["label"])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")

    prompt.eval()
    right = images = 0
    with torch.no_grad():
        for batch in data.test_dataloader():
            right += int((head(backbone(batch["image"])).argmax(dim=1) == batch["label"]).sum())
            images += len(batch["label"])
    print(f"test top-1 {100 * right / images:.1f} % of {images} images")
    return right / images


if __name__ == "__main__":
    main()
