"""What reads the images: small CNNs trained on the drawings, one to reward and another, which never sees a pair, to judge.

    python benchmarks/emoji/instruments.py      # trains the four and writes instruments.safetensors

Artists: reward and judge are trained on two disjoint quarters of the subjects, both among those of the pairs, so
both read subjects in tuning and test that they never saw. Names: every subject is a class, so both see every drawing; they
differ in width, augmentation and seed.
"""

import time

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import affine_grid, avg_pool2d, cross_entropy, grid_sample, interpolate

from drawings import ARTISTS, HERE, Emoji, load_emoji


WEIGHTS = HERE / "instruments.safetensors"
BATCH = 64


class Classifier(nn.Module):
    """Strided convolutions, their mean over the image as features, and a linear layer to the classes."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width, 8 * width)
        self.convolutions = nn.Sequential(
            *[
                layer
                for i, o in zip(widths, widths[1:])
                for layer in (nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU())
            ]
        )
        self.head = nn.Linear(2 * 8 * width, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, 16 * width), mean and maximum over the image, of uint8 or float images (N, 3, 64, 64), 0 to 255."""
        maps = self.convolutions(images / 127.5 - 1)
        return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))

    @torch.no_grad()
    def log_probs(self, images: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (N, classes) of uint8 images (N, 3, 64, 64)."""
        return torch.cat([self(batch).log_softmax(dim=1) for batch in images.split(256)])


def augment(images: torch.Tensor, blur: float, generator: torch.Generator) -> torch.Tensor:
    """Moves, scales, rotates and recolours float images (N, 3, 64, 64), 0 to 255; blurs that share of them."""

    def between(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=generator)

    angle, zoom = between(-0.15, 0.15), between(0.9, 1.15)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = torch.stack([cos, -sin, between(-0.1, 0.1), sin, cos, between(-0.1, 0.1)], dim=1)
    grid = affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    moved = 255 - grid_sample(255 - images, grid, align_corners=False)  # what comes in from outside is white
    smooth = interpolate(avg_pool2d(moved, 2), scale_factor=2, mode="bilinear")
    moved = torch.where(between(0, 1, 1, 1, 1) < blur, smooth, moved)
    coloured = moved * between(0.85, 1.0, 3, 1, 1) + between(0, 25, 1, 1, 1)
    return coloured + 8 * torch.randn(coloured.shape, generator=generator)


def train(
    images: torch.Tensor, classes: torch.Tensor, num_classes: int, width: int, steps: int, blur: float, seed: int
) -> Classifier:
    """Trains on uint8 images (N, 3, 64, 64)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = Classifier(num_classes, width).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        loss = cross_entropy(classifier(augment(images[rows].float(), blur, generator)), classes[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 200 == 0:
            print(time.strftime("%H:%M:%S"), step, f"{loss.item():.3f}", flush=True)
    return classifier.eval().requires_grad_(False)


SETTINGS = {  # width, steps, share blurred, seed
    "reward_artist": (16, 400, 0.5, 1),
    "judge_artist": (24, 400, 0.3, 2),
    "judge_names": (24, 2500, 0.5, 3),
    "reward_names": (20, 2500, 0.3, 4),
}


def task_of(emoji: Emoji, name: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """An instrument's drawings, uint8 (N, 3, 64, 64), their classes (N,), and how many classes there are."""
    of_names = name.endswith("names")
    quarter = emoji.split["pairs"][(0 if name == "reward_artist" else 1) :: 2]
    subjects = np.arange(len(emoji.names)) if of_names else quarter
    classes = subjects.repeat(len(ARTISTS)) if of_names else np.tile(np.arange(len(ARTISTS)), len(subjects))
    return emoji.images[subjects].flatten(0, 1), torch.from_numpy(classes), len(subjects if of_names else ARTISTS)


def load_instruments(emoji: Emoji) -> dict[str, Classifier]:
    """The four, as shipped in half precision."""
    weights, instruments = load_file(WEIGHTS), {}
    for name, (width, *_) in SETTINGS.items():
        classifier = Classifier(task_of(emoji, name)[2], width)
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        classifier.load_state_dict(own)
        instruments[name] = classifier.eval().requires_grad_(False)
    return instruments


def main() -> None:
    torch.set_num_threads(1)
    emoji = load_emoji()
    made = {name: train(*task_of(emoji, name), *setting) for name, setting in SETTINGS.items()}
    weights = {f"{name}.{key}": value for name, each in made.items() for key, value in each.state_dict().items()}
    save_file({key: value.half() if value.is_floating_point() else value for key, value in weights.items()}, WEIGHTS)


if __name__ == "__main__":
    main()
