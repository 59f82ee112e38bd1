"""The few transforms that the earlier script takes from torchvision, for machines that have none. They act on tensors (C, H, W)."""

import importlib.util
import sys
from enum import Enum
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F


class InterpolationMode(Enum):
    BILINEAR = "bilinear"


class ToTensor:
    """A PIL image as float32 (C, H, W) in [0, 1]."""

    def __call__(self, image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


class Resize:
    """The shorter side becomes `size`; nothing is done where it is."""

    def __init__(self, size: int, interpolation: InterpolationMode) -> None:
        self.size, self.mode = size, interpolation.value

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        shorter = min(image.shape[1:])
        if shorter == self.size:
            return image
        size = [int(self.size * side / shorter) for side in image.shape[1:]]
        return F.interpolate(image[None], size, mode=self.mode, antialias=True, align_corners=False)[0]


def crop(image: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    return image[:, top : top + height, left : left + width]


class CenterCrop:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        top, left = (round((side - self.size) / 2) for side in image.shape[1:])
        return crop(image, top, left, self.size, self.size)


class RandomHorizontalFlip:
    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.flip(-1) if torch.rand(1) < self.p else image


class Normalize:
    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.sub(self.mean).div(self.std)


def install() -> None:
    """Makes `torchvision.transforms` importable where torchvision is not installed, and wandb likewise."""
    if importlib.util.find_spec("wandb") is None:
        sys.modules["wandb"] = ModuleType("wandb")
    if importlib.util.find_spec("torchvision") is not None:
        return
    torchvision, transforms, functional = (
        ModuleType(name) for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    )
    for part in (InterpolationMode, ToTensor, Resize, CenterCrop, RandomHorizontalFlip, Normalize):
        setattr(transforms, part.__name__, part)
    functional.crop, torchvision.transforms, transforms.functional = crop, transforms, functional
    for module in (torchvision, transforms, functional):
        sys.modules[module.__name__] = module
