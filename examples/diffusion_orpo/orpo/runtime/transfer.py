"""Tensors on their way to the device, which the host does not wait for."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor without waiting for what the device still has to do.

    A copy from ordinary memory would wait; one from pinned memory, where CUDA is, does not.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def draw_noise(generators: list[torch.Generator], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard normal noise (len(generators), *shape) in float32, each row from its own generator.

    It is sampled on the CPU, so that it is the same on every device.
    """
    return to_device(torch.stack([torch.randn(shape, generator=generator) for generator in generators]), device)
