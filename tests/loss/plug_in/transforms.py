"""In place of torchvision.transforms, for a script that needs it on machines without it: what the script uses, no more."""

from enum import Enum

import numpy as np
import torch
from PIL import Image


class InterpolationMode(Enum):
    BILINEAR = Image.Resampling.BILINEAR
    LANCZOS = Image.Resampling.LANCZOS


class Compose:
    def __init__(self, steps):
        self.steps = steps

    def __call__(self, value):
        for step in self.steps:
            value = step(value)
        return value


class Resize:
    def __init__(self, size, interpolation):
        self.size, self.interpolation = size, interpolation.value

    def __call__(self, image):
        scale = self.size / min(image.size)
        return image.resize([round(side * scale) for side in image.size], self.interpolation)


class CenterCrop:
    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        left, top = ((side - self.size) // 2 for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class Lambda:
    def __init__(self, function):
        self.function = function

    def __call__(self, value):
        return self.function(value)


class ToTensor:
    def __call__(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


class Normalize:
    def __init__(self, mean, std):
        (self.mean,), (self.std,) = mean, std

    def __call__(self, pixels):
        return (pixels - self.mean) / self.std
