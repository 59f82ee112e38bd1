"""A small classifier, trained separately on real images: it rewards prompt-following, and its features measure quality."""

import numpy as np
import torch
from scipy.linalg import sqrtm
from torch import nn
from torch.nn.functional import cross_entropy


NUM_COMPONENTS = 16  # of the features that the Frechet distance is taken in


class Classifier(nn.Module):
    """Convolutions to 64 features, and a linear layer to the classes."""

    def __init__(self, num_classes: int):
        super().__init__()
        widths = (3, 16, 32, 64)
        self.convolutions = nn.Sequential(
            nn.AvgPool2d(2),
            *[
                layer
                for i, o in zip(widths, widths[1:])
                for layer in (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
            ],
        )
        self.head = nn.Linear(64, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, 64) of uint8 images (N, 3, 64, 64)."""
        return self.convolutions(images / 127.5 - 1).mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))

    @torch.no_grad()
    def log_probs(self, images: torch.Tensor, classes: np.ndarray) -> np.ndarray:
        """Log-probability (N,) that each image shows its class."""
        log_probs = self(images).log_softmax(dim=1)
        return log_probs[torch.arange(len(images)), torch.as_tensor(classes)].numpy()

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> np.ndarray:
        return self(images).argmax(dim=1).numpy()


def train_classifier(images: torch.Tensor, classes: np.ndarray, epochs: int, seed: int = 0) -> Classifier:
    """Trains on uint8 images (N, 3, 64, 64), each shifted by up to 4 pixels and with a little noise."""
    torch.manual_seed(seed)
    classifier = Classifier(int(classes.max()) + 1)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(64):
            batch = images[chosen].float().roll(tuple(torch.randint(-4, 5, (2,)).tolist()), dims=(2, 3))
            batch = (batch + 8 * torch.randn_like(batch)).clamp(0, 255)
            loss = cross_entropy(classifier(batch), torch.as_tensor(classes)[chosen])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return classifier.eval().requires_grad_(False)


class FrechetDistance:
    """Frechet distance to real images, between Gaussians fitted to the classifier's leading features.

    Source: FID, arXiv 1706.08500, with the classifier in the Inception network's place.
    """

    def __init__(self, classifier: Classifier, real: torch.Tensor):
        self.classifier = classifier
        features = self._features(real)
        self.center, self.scale = features.mean(axis=0), features.std(axis=0) + 1e-6
        _, _, axes = np.linalg.svd((features - self.center) / self.scale, full_matrices=False)
        self.axes = axes[:NUM_COMPONENTS].T
        self.mean, self.covariance = self._fit(features)

    def __call__(self, images: torch.Tensor) -> float:
        mean, covariance = self._fit(self._features(images))
        root = sqrtm(self.covariance @ covariance).real
        return float(((mean - self.mean) ** 2).sum() + np.trace(self.covariance + covariance - 2 * root))

    def _features(self, images: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return torch.cat([self.classifier.features(batch) for batch in images.split(256)]).double().numpy()

    def _fit(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        components = (features - self.center) / self.scale @ self.axes
        return components.mean(axis=0), np.cov(components, rowvar=False)
