"""Scorers: the published ones against their authors' arithmetic on tiny weights, loaded from a Hub cache as always."""

import json

import numpy as np
import pytest
import torch
from orpo.scoring.checkpoint_layouts import convert_open_clip
from orpo.scoring.reward_models import CLIP_H, CLIP_L, crop_pixels, pad_pixels
from orpo.scoring.scorers import check_scorer, load_scorer, score_images, scorer_label
from PIL import Image
from reference_models import (
    MED_CONFIG,
    image_reward_checkpoint,
    image_rewards,
    open_clip_checkpoint,
    open_clip_cosines,
)
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from tiny_sdxl import build_tokenizer


PROMPTS = ["a red ball", "Face", "a prompt that goes on and on " * 20]
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLOSE = {"rtol": 1e-5, "atol": 1e-4}
STD = np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Square, wide and tall; smooth enough to be pictures, with sharp edges that a filter blurs."""
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((20, 20), (16, 31), (27, 14))]
    return [Image.fromarray(x).resize((5 * x.shape[1], 5 * x.shape[0]), Image.Resampling.NEAREST) for x in small]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub cache; `hub(repository)` makes a snapshot's folder in it, as a download does."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def publish(repository: str):
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("0" * 40)
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True, exist_ok=True)
        return snapshot

    return publish


def tiny_clip(vocabulary: int, act: str, scale: float) -> CLIPModel:
    torch.manual_seed(0)
    shared = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": act, "projection_dim": 16}
    # Published CLIPs name token 2 as the end of a text; transformers then takes the highest, which is the end.
    text = CLIPTextConfig(hidden_size=32, intermediate_size=128, vocab_size=vocabulary, eos_token_id=2, **shared)
    vision = CLIPVisionConfig(hidden_size=48, intermediate_size=192, image_size=28, patch_size=14, **shared)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.logit_scale.fill_(np.log(scale))
    return model.eval()


def cosines(model: CLIPModel, tokenizer, images: list[Image.Image]) -> torch.Tensor:
    """As PickScore's README computes them, one prompt at a time, on pixels from PIL and NumPy."""
    pixels = torch.stack([reference_crop(image, 28) for image in images])
    values = []
    for pixel, prompt in zip(pixels, PROMPTS):
        ids = tokenizer(prompt, truncation=True, max_length=77)["input_ids"]
        assert len(ids) <= 77
        with torch.no_grad():
            image_embs = model.visual_projection(model.vision_model(pixel[None]).pooler_output)
            hidden = model.text_model(torch.tensor([ids])).last_hidden_state[0, ids.index(tokenizer.eos_token_id)]
            text_embs = model.text_projection(hidden)[None]
        values.append(F.cosine_similarity(text_embs, image_embs))
    return torch.cat(values)


def reference_crop(image: Image.Image, size: int) -> torch.Tensor:
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.BICUBIC), dtype=np.float64)
    top, left = int(round((height - size) / 2)), int(round((width - size) / 2))
    pixels = (pixels[top : top + size, left : left + size] / 255 - MEAN) / STD
    return torch.from_numpy(pixels).permute(2, 0, 1).float()


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2, as PIL and antialiased interpolation have it."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resampling_matrix(old: int, new: int) -> np.ndarray:
    """(new, old): the antialiased bicubic filter, widened by the ratio, each row adding up to 1."""
    scale = max(old / new, 1)
    centres = (np.arange(new) + 0.5) * old / new
    weights = cubic((np.arange(old) + 0.5 - centres[:, None]) / scale)
    return weights / weights.sum(axis=1, keepdims=True)


def test_images_are_cropped_as_clip_and_transformers_crop_them(images):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    ours = crop_pixels(images, 56)
    torch.testing.assert_close(ours, torch.stack([reference_crop(i, 56) for i in images]), atol=1e-5, rtol=0)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    theirs = processor(images=images[0], return_tensors="pt").pixel_values
    torch.testing.assert_close(ours[:1], theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [56, 240])
def test_hpsv2s_images_are_padded_with_black_and_resized_as_floats(images, size):
    for image, ours in zip(images, pad_pixels(images, size)):
        width, height = (round(side * size / max(image.size)) for side in image.size)
        pixels = np.asarray(image) / 255
        rows, columns = resampling_matrix(image.height, height), resampling_matrix(image.width, width)
        resized = np.moveaxis(rows @ np.moveaxis(pixels, -1, 0) @ columns.T, 0, -1)
        assert resized.min() < 0 and resized.max() > 1  # nothing clips what a bicubic filter overshoots
        padded = np.zeros((size, size, 3))
        top, left = (size - height) // 2, (size - width) // 2
        padded[top : top + height, left : left + width] = resized
        expected = torch.from_numpy((padded - MEAN) / STD).permute(2, 0, 1).float()
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)


def test_images_of_the_models_size_are_not_resampled():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    expected = torch.from_numpy((np.asarray(image) / 255 - MEAN) / STD).permute(2, 0, 1).float()
    for prepare in (crop_pixels, pad_pixels):
        torch.testing.assert_close(prepare([image], 28)[0], expected, atol=1e-5, rtol=0)


def test_clip_score_is_100_cosines_and_pickscore_carries_its_scale(hub, images):
    tokenizer = build_tokenizer(["red", "ball", "face"])
    model = tiny_clip(len(tokenizer), "quick_gelu", scale=50)
    for repository in (CLIP_L, "yuvalkirstain/PickScore_v1"):
        model.save_pretrained(hub(repository))
    for repository in (CLIP_L, CLIP_H):
        tokenizer.save_pretrained(hub(repository))
    model.config.save_pretrained(hub(CLIP_H))
    expected = cosines(model, tokenizer, images)
    assert expected.std() > 0.02
    torch.testing.assert_close(torch.tensor(load_scorer("clip", "cpu")(images, PROMPTS)), 100 * expected, **CLOSE)
    torch.testing.assert_close(torch.tensor(load_scorer("pickscore", "cpu")(images, PROMPTS)), 50 * expected, **CLOSE)


def test_a_batch_scores_as_its_images_alone_do(hub, images):
    tokenizer = build_tokenizer(["red"])
    tiny_clip(len(tokenizer), "quick_gelu", scale=50).save_pretrained(hub(CLIP_L))
    tokenizer.save_pretrained(hub(CLIP_L))
    scorer = load_scorer("clip", "cpu")
    alone = [scorer([image], [prompt])[0] for image, prompt in zip(images, PROMPTS)]
    np.testing.assert_allclose(scorer(images, PROMPTS), alone, rtol=1e-4)


def test_hpsv2_is_the_cosine_of_its_open_clip_checkpoint(hub, images):
    tokenizer = build_tokenizer(["red", "ball", "face"])
    tokenizer.save_pretrained(hub(CLIP_H))
    tiny_clip(len(tokenizer), "gelu", scale=1).config.save_pretrained(hub(CLIP_H))
    weights = open_clip_checkpoint(len(tokenizer))
    torch.save({"state_dict": dict(weights), "epoch": 1}, hub("xswu/HPSv2") / "HPS_v2.1_compressed.pt")
    tokens = [tokenizer(prompt, truncation=True, max_length=77)["input_ids"] for prompt in PROMPTS]
    expected = open_clip_cosines(weights, pad_pixels(images, 28), tokens, heads=4)
    assert expected.std() > 0.02
    torch.testing.assert_close(torch.tensor(load_scorer("hpsv2", "cpu")(images, PROMPTS)), expected)


def test_every_weight_of_an_open_clip_checkpoint_has_its_place():
    weights = open_clip_checkpoint(100)
    converted = convert_open_clip(weights)
    assert sum(value.numel() for value in converted.values()) == sum(value.numel() for value in weights.values())
    assert converted.keys() == tiny_clip(100, "gelu", 1).state_dict().keys()


def test_imagereward_is_its_authors_arithmetic(hub, images):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ball", "face", "prompt", "on", "and"]
    bert = hub("google-bert/bert-base-uncased")
    (bert / "vocab.txt").write_text("\n".join(vocabulary))
    (bert / "config.json").write_text(json.dumps({"model_type": "bert"}))
    weights = image_reward_checkpoint(len(vocabulary))
    torch.save(dict(weights), hub("THUDM/ImageReward") / "ImageReward.pt")
    config = MED_CONFIG | {"vocab_size": len(vocabulary)}
    (hub("THUDM/ImageReward") / "med_config.json").write_text(json.dumps(config))

    tokens, mask = torch.zeros(2, 3, 35, dtype=torch.long)
    for i, prompt in enumerate(PROMPTS):  # at most 35, with [CLS] and [SEP]
        words = [word if word in vocabulary else "[UNK]" for word in prompt.lower().split()][:33]
        ids = [vocabulary.index(word) for word in ("[CLS]", *words, "[SEP]")]
        tokens[i, : len(ids)], mask[i, : len(ids)] = torch.tensor(ids), 1
    expected = image_rewards(weights, crop_pixels(images, 32), tokens, mask)
    assert expected.std() > 0.05
    torch.testing.assert_close(torch.tensor(load_scorer("imagereward", "cpu")(images, PROMPTS)), expected)


def test_aesthetics_are_a_linear_head_on_the_normalized_image_embedding(hub, images):
    model = tiny_clip(100, "quick_gelu", scale=1)
    model.save_pretrained(hub(CLIP_L))
    torch.manual_seed(1)
    widths = {0: (16, 12), 2: (12, 8), 4: (8, 6), 6: (6, 4), 7: (4, 1)}  # numbered as with dropout between
    layers = {i: torch.nn.Linear(*width) for i, width in widths.items()}
    state_dict = {
        f"layers.{i}.{name}": value for i, layer in layers.items() for name, value in layer.state_dict().items()
    }
    torch.save(state_dict, hub("trl-lib/ddpo-aesthetic-predictor") / "aesthetic-model.pth")
    with torch.no_grad():
        pixels = torch.stack([reference_crop(image, 28) for image in images])
        x = model.visual_projection(model.vision_model(pixels).pooler_output)
        x = x / x.norm(dim=-1, keepdim=True)
        for layer in layers.values():
            x = layer(x)
    scores = load_scorer("aesthetic", "cpu")(images, PROMPTS)
    torch.testing.assert_close(torch.tensor(scores), x[:, 0])
    assert scores == load_scorer("aesthetic", "cpu")(images, ["other"] * 3)


@pytest.mark.parametrize(
    "name, repository",
    [
        ("pickscore", "yuvalkirstain/PickScore_v1"),
        ("clip", "openai/clip-vit-large-patch14"),
        ("hpsv2", "xswu/HPSv2 HPS_v2.1_compressed.pt"),
        ("imagereward", "THUDM/ImageReward"),
        ("aesthetic", "openai/clip-vit-large-patch14"),
    ],
)
def test_missing_weights_say_what_to_download(hub, name, repository):
    with pytest.raises(ValueError, match=f"{name}.*hf download {repository}"):
        check_scorer(name, 64)


def test_a_checkpoint_that_is_a_pickle_runs_nothing(hub, tmp_path):
    class Crafted:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"state_dict": Crafted()}, hub("xswu/HPSv2") / "HPS_v2.1_compressed.pt")
    with pytest.raises(Exception, match="(?i)weights.only"):
        load_scorer("hpsv2", "cpu")
    assert not (tmp_path / "ran").exists()


def test_ones_own_scorer_comes_from_a_module_or_a_file(tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_mine.py").write_text("FACTOR = 3")
    (tmp_path / "my_scorers.py").write_text(
        "from neighbour_of_mine import FACTOR\ndef width(images, prompts): return [FACTOR * i.width for i in images]\n"
    )
    image = Image.new("RGB", (7, 5))
    assert load_scorer(f"{tmp_path}/my_scorers.py:width", "cpu")([image], ["a"]) == [21]
    monkeypatch.chdir(tmp_path)
    assert load_scorer("my_scorers:width", "cpu")([image], ["a"]) == [21]
    assert scorer_label("my_scorers:width") == scorer_label(f"{tmp_path}/my_scorers.py:width") == "width"


@pytest.mark.parametrize(
    "name, message",
    [
        ("pikscore", "Unknown scorer 'pikscore'.*pickscore"),
        ("no_such_module:f", "can't be imported.*no_such_module"),
        ("json:no_such_function", "can't be imported.*no_such_function"),
        ("/no/such/file.py:f", "can't be imported.*/no/such/file.py"),
        ("string:digits", "is str, not a function"),
        ("math:sqrt", "fails on two grey images"),
        ("json:dumps", "fails on two grey images"),
    ],
)
def test_scorers_that_are_none_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        check_scorer(name, 64)


def test_scores_that_are_none_are_refused():
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="mine returned 1 scores for 2 images"):
        score_images("mine", lambda images, prompts: [1.0], [image] * 2, ["a", "b"])
    with pytest.raises(ValueError, match="mine returned nan.*'b'"):
        score_images("mine", lambda images, prompts: [1.0, float("nan")], [image] * 2, ["a", "b"])
    assert score_images("mine", lambda images, prompts: torch.ones(2), [image] * 2, ["a", "b"]) == [1.0, 1.0]


def test_a_scorers_file_gets_its_own_neighbours_whatever_they_are_called(tmp_path):
    (tmp_path / "images.py").write_text("ANSWER = 4.0\n")
    (tmp_path / "judge.py").write_text(
        "from images import ANSWER\n\n\ndef judge(images, prompts):\n    return [ANSWER] * len(images)\n"
    )
    assert load_scorer(f"{tmp_path / 'judge.py'}:judge", "cpu")([None], ["a"]) == [4.0]
