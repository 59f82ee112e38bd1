"""LoRA keys of the published architectures, and the campaign of benchmarks/true_size.py on its smallest model."""

import sys
from pathlib import Path

import pytest
import torch
from orpo.models.checks import find_modules


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import published  # noqa: E402
import published_lora  # noqa: E402
import true_size  # noqa: E402


WHOLE_AND_CUT = [(name, None) for name in published.DENOISERS] + [
    (name, true_size.BLOCKS) for name in true_size.SHALLOW
]


@pytest.mark.parametrize("name, blocks", WHOLE_AND_CUT)
def test_the_lora_of_a_published_model_has_the_modules_of_its_architecture(name, blocks):
    """Of the default --lora_layers, on the model itself, without memory; and on the copy that the campaign trains."""
    with torch.device("meta"):
        denoiser = published.denoiser(name, **({} if blocks is None else true_size.SHALLOW[name]))
    found = {
        module: (layer.in_features, layer.out_features)
        for end in true_size.FAMILIES[name].lora_layers.split(",")
        for module, layer in find_modules(denoiser, end).items()
    }
    assert found == published_lora.modules(name, blocks)


def test_sdxls_has_as_many_tensors_and_bytes_as_is_said():
    shapes = published_lora.tensors("sdxl", rank=8)
    assert len(shapes) == 1120
    assert 4 * sum(a * b for a, b in shapes.values()) / 1e6 == pytest.approx(46.4, abs=0.1)
