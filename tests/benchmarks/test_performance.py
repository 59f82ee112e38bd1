"""The benchmarks of speed: their count of operations, their scaled model, their statistics, and the page against stored results."""

import numpy as np
import pytest
import torch

from flops import count, sdxl_configs, text_flops, unet_flops, vae_flops, weights
from interleaved import Interleaved
from measuring import REPOSITORY, paired_ratio, stored
from scaled_sdxl import RESOLUTION, ratios, scaled_configs


@pytest.fixture(scope="module")
def real() -> dict[str, int]:
    """Operations of the real SDXL, counted again except for those that take long to count."""
    configs = sdxl_configs()
    return {"unet": unet_flops(configs, 1024), "vae": vae_flops(configs, 1024), "text": text_flops(configs)}


def test_a_product_counts_twice_its_multiplications():
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
    assert count(lambda: a @ b) == 2 * 3 * 5 * 7
    weight = torch.empty(4, 2, 3, 3, device="meta")
    image = torch.empty(1, 2, 8, 8, device="meta")
    assert count(lambda: torch.nn.functional.conv2d(image, weight, padding=1)) == 2 * 8 * 8 * 4 * 2 * 9


def test_real_sdxl_takes_what_others_counted(real):
    """28.2, 38.4, 9.76 and 0.11 TFLOP, and the sizes of SDXL's published weights."""
    expected = {"unet": 28.2e12, "unet_checkpointed": 38.4e12, "vae": 9.76e12, "text": 0.11e12}
    on_the_page = stored("flops")["flops"]
    assert real == {name: on_the_page[name] for name in real}
    for name, operations in expected.items():
        assert on_the_page[name] == pytest.approx(operations, rel=0.05 if name == "text" else 0.005), name
    sizes = weights(sdxl_configs())
    assert sizes["unet"] == 2_567_463_684
    assert sizes["vae"] == 83_653_863


def test_text_encoders_take_two_operations_a_weight_and_token():
    """But for attention between the tokens, and embeddings, which are looked up."""
    configs = sdxl_configs()
    tokens, layers = 77, ((768, 3072, 12), (1280, 5120, 32))
    in_matrices = sum(depth * (4 * width**2 + 2 * width * inner) for width, inner, depth in layers)
    in_attention = sum(depth * 2 * tokens * width for width, _, depth in layers)
    expected = 2 * tokens * (in_matrices + in_attention) + 2 * 1280 * 1280
    assert text_flops(configs) == pytest.approx(expected, rel=1e-3)


def test_the_scaled_model_has_the_ratios_of_the_real_one(real):
    configs = scaled_configs()
    unet = unet_flops(configs, RESOLUTION)
    assert vae_flops(configs, RESOLUTION) / unet == pytest.approx(ratios(real)["vae"], rel=0.04)
    assert text_flops(configs) / unet == pytest.approx(ratios(real)["text"], rel=0.15)


def test_sources_take_turns_and_each_gets_its_own_times():
    class Source:
        def __init__(self, name: str) -> None:
            self.name = name

        def training_batches(self, *args):
            return iter([(self.name, i) for i in range(3)])

    seen = []
    source = Interleaved({"a": Source("a"), "b": Source("b")}, lambda name, batch: seen.append((name, batch)))
    given = [batch for _, batch in zip(range(5), source.training_batches())]
    assert given == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2)]
    assert seen == [(name, (name, i)) for name, i in given[:4]]  # the last step's end is not seen
    assert {name: len(times) for name, times in source.times.items()} == {"a": 2, "b": 2}


def test_paired_ratios_cancel_what_slows_both_sides():
    slowness = np.random.default_rng(0).uniform(1, 10, 30)
    ratio = paired_ratio(list(1.2 * slowness), list(slowness))
    assert [ratio[name] for name in ("median", "low", "high", "min", "max")] == pytest.approx([1.2] * 5)


def test_the_page_shows_the_stored_ratios():
    page = (REPOSITORY / "docs" / "performance.md").read_text()
    ratios = [value for name in ("step", "reference_forward") for value in stored(name).values() if is_ratio(value)]
    shown = [r for r in ratios if "{median:.3f} [{low:.3f}, {high:.3f}]".format(**r) in page]
    assert len(shown) == 4 and f"{stored('flops')['bound']:.2f} times as fast" in page


def is_ratio(value) -> bool:
    return isinstance(value, dict) and "median" in value
