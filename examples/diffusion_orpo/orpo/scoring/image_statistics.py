"""Signs of an over-optimised LoRA: colours that are too strong, detail that is too crisp or gone.

The functions take images as a scorer does. They say what an image is like, not how good it is: no value is best.
"""

import numpy as np
from PIL import Image


MOVED = 0.25  # a change of the mean by this share is worth a look


def saturation(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """Mean chroma of each image, from 0 (grey) to 1.

    A pixel's chroma is its largest less its smallest of R, G and B. Unlike the S of HSV, which divides by the largest,
    it's small where a pixel is nearly black.
    """
    return [float(np.ptp(_pixels(image, "RGB"), axis=-1).mean()) for image in images]


def high_frequency(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """Share of each image's spectral energy above half the Nyquist frequency, from 0 to 1.

    The energy is that of the luma, the mean left out, under a Hann window, which keeps opposite borders that do not
    meet from looking like detail. Frequencies count by distance from the origin: those above 1/4 cycle per pixel.
    """
    return [_high_frequency(_pixels(image, "L")) for image in images]


def _high_frequency(luma: np.ndarray) -> float:
    height, width = luma.shape
    window = np.outer(np.hanning(height), np.hanning(width))
    luma = (luma - (luma * window).sum() / window.sum()) * window
    energy = np.abs(np.fft.fft2(luma)) ** 2
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    total = energy.sum()
    return float(energy[frequency > 0.25].sum() / total) if total > 1e-12 else 0.0


def _pixels(image: Image.Image, mode: str) -> np.ndarray:
    return np.asarray(image.convert(mode), dtype=np.float64) / 255


# Of each statistic: the function, and the sentences for a LoRA that has more of it and less.
STATISTICS = {
    "saturation": (saturation, "Colours are much stronger than the base's", "Colours are much paler than the base's"),
    "high_frequency": (
        high_frequency,
        "There is much more fine detail or noise than in the base's images",
        "The images are much smoother than the base's: fine detail is gone",
    ),
}


def warning(name: str, mean_base: float, mean_lora: float) -> str | None:
    """A sentence where a statistic's mean moved by more than `MOVED`, else None."""
    if abs(mean_lora - mean_base) <= MOVED * mean_base:
        return None
    _, more, less = STATISTICS[name]
    change = f"{mean_base:.3g} to {mean_lora:.3g}"
    return f"{more if mean_lora > mean_base else less} ({change}): look for over-optimisation."
