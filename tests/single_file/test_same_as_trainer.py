"""The one file is the trainer, seen from the front: the same loss, the same flags, the same pairs, the same LoRA."""

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusion_orpo_loss import odds_ratio_objective
from helpers import encode, train, write_parquet
from orpo.pairs.image import decode_image
from orpo.pairs.pair import PairTransform, crop_image
from orpo.runtime.shapes import square
from PIL import Image
from single_file_script import load, train_single_file

import train_diffusion_orpo_sdxl_lora as trainer
from faces import ALL_KINDS, draw_face


SIZES = [(64, 80), (72, 64), (64, 64), (96, 64)]  # the shorter side is the resolution, so that nothing is resized


def rows(count: int) -> list[dict]:
    """Rows of images in several sizes, with either one preferred, and every fifth a tie."""
    made = []
    for i in range(count):
        images = [
            encode(draw_face(ALL_KINDS[i % len(ALL_KINDS)], smile).resize(SIZES[(i + j) % len(SIZES)]), "PNG")
            for j, smile in enumerate((0.9, -0.9))
        ]
        label = 0.5 if i % 5 == 4 else float(i % 2)
        made.append(
            {"jpg_0": images[0], "jpg_1": images[1], "label_0": label, "caption": ALL_KINDS[i % len(ALL_KINDS)].prompt}
        )
    return made


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    return write_parquet(tmp_path_factory.mktemp("pairs"), rows(30))


@pytest.fixture(scope="module")
def tiny_sdxl_v(tiny_sdxl, tmp_path_factory) -> str:
    """The same pipeline, said to predict velocity."""
    folder = tmp_path_factory.mktemp("tiny-sdxl-v") / "base"
    shutil.copytree(tiny_sdxl, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    return str(folder)


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("beta, share", [(0.0, None), (0.1, None), (2.0, None), (None, 0.375), (None, 0.1)])
def test_the_loss_is_the_packages(beta, share):
    grid = torch.tensor([0.0, 1e-10, 1e-9, 1e-6, 1e-3, 0.05, 0.69, 1.0, 10.0, 100.0])
    errors = torch.cartesian_prod(grid, grid).T.clone()
    results = []
    for loss in (
        load().orpo_loss,
        lambda w, l, b, s: odds_ratio_objective(w, l, b, loser_share=s, reduction="none", return_metrics=True),
    ):
        error_w, error_l = (error.clone().requires_grad_() for error in errors)
        losses, extra = loss(error_w, error_l, beta, share)
        log_odds_ratio = extra["log_odds_chosen"] if isinstance(extra, dict) else extra
        results.append((losses, log_odds_ratio, *torch.autograd.grad(losses.sum(), (error_w, error_l))))
    for ours, packages in zip(*results):
        torch.testing.assert_close(ours, packages, rtol=1e-6, atol=0)


def in_modes() -> dict[str, bytes]:
    grid = np.arange(64 * 64).reshape(64, 64)
    hidden = np.stack([grid % 256, grid // 16, 255 - grid % 256, grid % 7 * 42], axis=-1).astype(np.uint8)
    images = {"RGBA": Image.fromarray(hidden), "LA": Image.fromarray(hidden).convert("LA")}
    images |= {
        "16-bit": Image.fromarray((grid * 16).astype(np.uint16)),
        "palette": Image.fromarray(hidden[..., :3]).quantize(16),
    }
    return {mode: encode(image, "PNG") for mode, image in images.items()}


@pytest.mark.parametrize(("mode", "encoded"), in_modes().items())
def test_transparency_and_16_bits_are_seen_as_the_trainer_sees_them(mode, encoded):
    ours = load().to_rgb(datasets.Image().decode_example({"bytes": encoded, "path": None}))
    assert np.array_equal(np.asarray(ours), np.asarray(decode_image(encoded, "")))
    assert len(np.unique(np.asarray(ours))) > 10


# Flags that diffusers' scripts have, and the trainer does without.
UPSTREAMS = {
    "scale_lr",
    "use_8bit_adam",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "allow_tf32",
    "hub_token",
    "logging_dir",
}


def test_every_flag_is_one_of_the_trainers_with_the_same_default():
    line = ["--pretrained_model_name_or_path=model", "--dataset_name=data"]
    flags, trainers = vars(load().parse_args(line)), vars(trainer.parse_args(line))
    assert flags.pop("seed") == 0  # the trainer's is random
    assert flags.keys() - trainers.keys() == UPSTREAMS
    for name in flags.keys() & trainers.keys():
        assert flags[name] == (list(trainers[name]) if isinstance(flags[name], list) else trainers[name]), name


@pytest.mark.parametrize("flags", [{}, {"random_crop": True, "random_flip": True}])
def test_the_lora_is_the_trainers(tiny_sdxl, pairs, tmp_path, flags):
    """Over the end of an epoch, with accumulated gradients and a learning rate that changes at every step."""
    flags |= {
        "max_train_steps": 5,
        "train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "loser_share": 0.4,
        "seed": 3,
    }
    theirs = train(tiny_sdxl, pairs, tmp_path / "trainer", **flags)
    ours = train_single_file(tiny_sdxl, pairs, tmp_path / "single", **flags)
    other = train_single_file(tiny_sdxl, pairs, tmp_path / "other", **(flags | {"loser_share": 0.1}))
    print(distance(ours, theirs), distance(ours, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert distance(ours, other) > 100 * max(distance(ours, theirs), 1e-6)  # a small difference would show


def test_the_lora_is_the_trainers_with_velocity_prediction_and_trls_columns(tiny_sdxl_v, tmp_path):
    chosen = [
        {"chosen": row["jpg_0"], "rejected": row["jpg_1"], "prompt": row["caption"]} for row in rows(8)
    ]  # whatever the label says
    data = write_parquet(tmp_path / "pairs", chosen, features=None)
    flags = {"max_train_steps": 3, "train_batch_size": 2, "max_train_samples": 6, "max_grad_norm": 0}
    flags["beta_orpo"] = 0.1
    theirs = train(tiny_sdxl_v, data, tmp_path / "trainer", **flags)
    ours = train_single_file(tiny_sdxl_v, data, tmp_path / "single", **flags)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("random_crop", [False, True])
def test_resized_images_are_the_trainers_but_for_rounding(random_crop):
    """Pillow resizes here and torch there: a channel of a pixel may differ by a step or two of 255."""
    single_file = load()
    line = ["--pretrained_model_name_or_path=model", "--dataset_name=data", "--resolution=64", "--random_flip"]
    args = single_file.parse_args(line + ["--random_crop"] * random_crop)
    transform = PairTransform(square(64), random_crop=random_crop, random_flip=True)
    dataset = single_file.PairDataset(None, None, args, (4, 8, 8), 1000)
    rng = np.random.default_rng(0)
    for seed in range(40):
        width, height = rng.integers(64, 200, 2)
        image = draw_face(ALL_KINDS[seed % len(ALL_KINDS)], 0.5).resize((int(width), int(height)))
        flip, *crop = np.random.default_rng(seed).random(3)
        pixels, time_ids = dataset.transform(image, flip, crop)
        flipped, crop, _ = transform.sample(seed)
        expected, original_size, corner = crop_image(encode(image, "PNG"), "image", (64, 64), flipped, crop)
        assert time_ids == (*original_size, *corner, 64, 64)
        difference = (pixels.permute(1, 2, 0).int() - expected.int()).abs()
        assert difference.max() <= 2 and (difference > 0).float().mean() < 0.1


def test_a_photo_that_lies_on_its_side_is_turned_upright(tmp_path):
    """The header says that the left half of the stored image is the upper one."""
    lying = Image.new("RGB", (80, 64), "red")
    lying.paste("blue", (0, 0, 40, 64))
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    lying.save(file, "PNG", exif=exif)
    row = {
        "jpg_0": file.getvalue(),
        "jpg_1": encode(draw_face(ALL_KINDS[0], 0), "PNG"),
        "label_0": 0.0,
        "caption": "x",
    }
    single_file = load()
    args = single_file.parse_args(
        [
            "--pretrained_model_name_or_path=model",
            f"--dataset_name={write_parquet(tmp_path, [row])}",
            "--resolution=64",
        ]
    )
    dataset, pairs = single_file.load_pairs(args)
    example = single_file.PairDataset(dataset, pairs, args, (4, 8, 8), 1000)[0, 0]
    expected, size, corner = crop_image(file.getvalue(), "image", (64, 64))
    assert example["time_ids"][1].tolist() == [*size, *corner, 64, 64] and size == (80, 64)
    assert torch.equal(example["pixel_values"][1], expected.permute(2, 0, 1))


def test_script_and_readme_are_short():
    folder = Path(load().__file__).parent
    assert len((folder / "train_diffusion_orpo_sdxl_lora.py").read_text().splitlines()) <= 650
    assert len((folder / "README.md").read_text().splitlines()) <= 100
