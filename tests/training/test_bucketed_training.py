"""Training in aspect-ratio buckets, with the real scripts: every family, every source, and after an interruption."""

import json
import shutil

import pytest
import torch
from families import FAMILIES
from helpers import arguments, logged, shaped_rows, train, write_parquet, write_shards
from orpo.models.sdxl import StableDiffusionXL
from orpo.pairs.bad_pair import BadPair
from orpo.pairs.buckets import assign
from orpo.pairs.pair import PairTransform
from orpo.store.index import find_shards
from orpo.store.reader import read_samples
from orpo.store.sample import read_encoded
from orpo.training import trainer
from PIL import Image

import train_diffusion_orpo_sdxl_lora
from convert_to_webdataset import main as convert


BUCKETS = {"aspect_ratio_buckets": "64,64;48,80;80,48"}


@pytest.fixture(scope="module")
def shaped(tmp_path_factory) -> str:
    """24 pairs, two of each three not square."""
    return write_parquet(tmp_path_factory.mktemp("shaped"), shaped_rows(24))


@pytest.fixture(scope="module")
def encoded(shaped, tiny_sdxl, ray, tmp_path_factory) -> str:
    """The same as encoded shards."""
    folder = tmp_path_factory.mktemp("encoded")
    flags = [
        f"--pretrained_model_name_or_path={tiny_sdxl}",
        "--resolution=64",
        "--aspect_ratio_buckets=64,64;48,80;80,48",
    ]
    convert(
        [
            f"--dataset_name={shaped}",
            f"--output_dir={folder}",
            "--dataset_split_name=train",
            "--shard_size_mb=1",
            "--encode",
            *flags,
        ]
    )
    return str(folder)


def source(name: str, shaped: str, encoded: str, tmp_path) -> tuple[str | None, dict]:
    if name == "shards":
        folder = write_shards(tmp_path / "shards", shaped_rows(24), per_shard=7)
        return None, {"dataset_path": folder, "cache_dir": tmp_path / "cache"}
    if name == "encoded shards":
        return None, {"dataset_path": encoded}
    return shaped, {"cache_latents": name == "cached", "cache_dir": tmp_path / "cache"}


@pytest.mark.parametrize("name", ["dataset", "cached", "shards", "encoded shards"])
def test_a_resumed_run_equals_the_uninterrupted_one(name, shaped, encoded, tiny_sdxl, tmp_path):
    """Accumulation mixes shapes, and an epoch's end lies in the part that is resumed."""
    data, flags = source(name, shaped, encoded, tmp_path)
    flags |= BUCKETS | {"gradient_accumulation_steps": 3, "max_train_steps": 6, "checkpointing_steps": 2}
    whole = train(tiny_sdxl, data, tmp_path / "whole", **flags)
    position = json.loads((tmp_path / "whole" / "checkpoint-2" / "data_position_0.json").read_text())
    assert sum(position["buckets"].values()) == position["pairs_seen"] == 12
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    resumed = train(tiny_sdxl, data, tmp_path / "part", resume_from_checkpoint="latest", **flags)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    assert max(value.abs().max() for key, value in whole.items() if "lora_B" in key) > 1e-4


PLAIN = PairTransform(((64, 64), (48, 80), (80, 48)))


def test_an_encoding_of_a_shape_that_the_manifest_does_not_list_there_is_bad(encoded):
    found = find_shards([encoded])
    buckets = assign(found.sizes[0].reshape(-1, 2, 2), ((64, 64), (48, 80), (80, 48))).buckets
    assert found.encoding.moments == ((8, 8, 8), (8, 6, 10), (8, 10, 6)) and set(buckets.tolist()) == {0, 1, 2}
    for ordinal, members in read_samples(found.urls[0], 0, 6, int(found.counts[0])):
        for bucket in range(3):
            if bucket == buckets[ordinal]:
                assert (
                    read_encoded(found.encoding, members, bucket, PLAIN, 0)["moments"].shape[2:]
                    == found.encoding.moments[bucket][1:]
                )
            else:
                with pytest.raises(BadPair, match="moments_0 is"):
                    read_encoded(found.encoding, members, bucket, PLAIN, 0)


def test_encodings_train_as_the_images_do(shaped, tiny_sdxl, tmp_path):
    flags = BUCKETS | {"max_train_steps": 6}
    plain = train(tiny_sdxl, shaped, tmp_path / "plain", **flags)
    cached = train(tiny_sdxl, shaped, tmp_path / "cached", cache_latents=True, cache_dir=tmp_path / "cache", **flags)
    torch.testing.assert_close(cached, plain, rtol=1e-3, atol=1e-6)  # the VAE meets other batches
    again = train(tiny_sdxl, shaped, tmp_path / "again", cache_latents=True, cache_dir=tmp_path / "cache", **flags)
    torch.testing.assert_close(again, cached, rtol=0, atol=0)


def test_each_image_keeps_its_own_size_and_the_target_is_the_buckets(shaped, tiny_sdxl, tmp_path, monkeypatch):
    seen = []
    original = StableDiffusionXL.predict

    def recorded(self, denoiser, noisy_latents, timesteps, embeds, batch):
        hook = denoiser.register_forward_pre_hook(
            lambda _, args, given: seen.append((tuple(args[0].shape), given["added_cond_kwargs"]["time_ids"])),
            with_kwargs=True,
        )
        try:
            return original(self, denoiser, noisy_latents, timesteps, embeds, batch)
        finally:
            hook.remove()

    monkeypatch.setattr(StableDiffusionXL, "predict", recorded)
    train(tiny_sdxl, shaped, tmp_path, **BUCKETS | {"max_train_steps": 12})
    shapes = {shape[2:] for shape, _ in seen}
    assert shapes == {(8, 8), (6, 10), (10, 6)}
    sizes = set()
    for shape, time_ids in seen:
        assert (time_ids[:, 4:] == torch.tensor([shape[2] * 8.0, shape[3] * 8.0])).all()
        sizes |= {(tuple(original), shape[2:]) for original in time_ids[:, :2].int().tolist()}
    assert {((48, 80), (6, 10)), ((72, 120), (6, 10)), ((80, 48), (10, 6)), ((40, 160), (6, 10))} <= sizes


def test_an_epoch_covers_every_pair_and_validation_draws_each_shape(shaped, tiny_sdxl, tmp_path, monkeypatch):
    losses = []
    original = trainer.compute_losses
    monkeypatch.setattr(trainer, "compute_losses", lambda *a: losses.append(a[3]["seeds"]) or original(*a))
    flags = BUCKETS | {
        "max_train_steps": None,
        "num_train_epochs": 1,
        "train_batch_size": 5,
        "num_validation_pairs": 6,
    }
    flags |= {"run_validation": True, "validation_prompts": ["a red ball"], "num_validation_images": 3}
    train(tiny_sdxl, shaped, tmp_path, **flags, validation_inference_steps=1, report_to="tensorboard")
    seeds = [seed for batch in losses for seed in batch]
    assert len(set(seeds)) == len(seeds) and 18 <= len(seeds) <= 18 + 3 * 4
    images = [Image.open(tmp_path / f"image_{i}.png").size for i in range(3)]
    assert set(images) == {(64, 64), (80, 48), (48, 80)}
    assert 0 <= logged(tmp_path)["eval_rewards/accuracies"][-1] <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_in_buckets(name, shaped, models, tmp_path):
    weights = FAMILIES[name].train(models[name], shaped, tmp_path / "lora", **BUCKETS | {"max_train_steps": 6})
    assert max(value.abs().max() for key, value in weights.items() if "lora_B" in key) > 1e-4


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_compiled_model_is_compiled_once_a_shape_at_most(name, models):
    """And, since the compiler makes the second shape's code for any shape, not for every one of them."""
    model, graphs = FAMILIES[name].load(models[name]), []
    torch._dynamo.reset()
    model.denoiser.compile_repeated_blocks(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    counts, embeds = [], model.encode_prompts(["a red ball"])
    for height, width in [(64, 64), (48, 80), (80, 48), (64, 96), (96, 64), (64, 64), (48, 80)]:
        latents = torch.randn(2, 4, height // 8, width // 8)
        model.predict(model.denoiser, latents, torch.tensor([5, 5]), embeds, {}).sum().backward()
        counts.append(len(graphs))
    torch._dynamo.reset()
    assert 0 < counts[0] and counts[-1] == counts[4] <= 5 * counts[0]
    assert counts[-1] <= 2 * counts[0]


def test_a_square_alone_is_training_without_buckets(faces, tiny_sdxl, tmp_path):
    one = train(tiny_sdxl, faces, tmp_path / "one", aspect_ratio_buckets="64,64;")
    other = train(tiny_sdxl, faces, tmp_path / "other")
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("64,64;60,80", "multiples of 8 for SDXL, and 60x80 is not"),
        ("", "an empty entry is not a height and a width"),
        ("64", "64 is not a height and a width"),
        ("64,64;64,64", "names 64x64 twice"),
        ("8192,16384;", "8192x16384"),
        ("48,80", 'one shape is meant, end it with a semicolon: --aspect_ratio_buckets="48,80;"'),
    ],
)
def test_buckets_that_cannot_be_are_refused_at_once(text, message, capsys):
    with pytest.raises(SystemExit):
        train_diffusion_orpo_sdxl_lora.parse_args(arguments("model", "data", "out", aspect_ratio_buckets=text))
    assert message in capsys.readouterr().err


def test_sd3_is_asked_for_no_more_positions_than_it_has(shaped, models, tmp_path):
    with pytest.raises(ValueError, match="--aspect_ratio_buckets: 64x256"):
        FAMILIES["sd3"].train(models["sd3"], shaped, tmp_path / "lora", aspect_ratio_buckets="64,64;64,256")


def test_a_resumed_run_may_have_another_batch_size_though_batches_are_filled_up(shaped, tiny_sdxl, tmp_path):
    """Other batch sizes fill up the last batches of an epoch by other pairs; the rate's course stays as it was laid out."""
    flags = BUCKETS | {"max_train_steps": None, "num_train_epochs": 2, "lr_scheduler": "cosine", "seed": 0}
    train(
        tiny_sdxl, shaped, tmp_path / "a", train_batch_size=5, checkpointing_steps=2, report_to="tensorboard", **flags
    )
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    again = {"train_batch_size": 1, "gradient_accumulation_steps": 5, "resume_from_checkpoint": "latest"}
    train(tiny_sdxl, shaped, tmp_path / "b", report_to="tensorboard", **flags | again)
    first, second = logged(tmp_path / "a")["lr"], logged(tmp_path / "b")["lr"]
    assert second[0] == pytest.approx(first[2], rel=1e-6) and second[-1] < first[2]


def test_a_resumed_run_has_the_same_buckets(shaped, tiny_sdxl, tmp_path):
    train(tiny_sdxl, shaped, tmp_path, **BUCKETS, checkpointing_steps=1)
    with pytest.raises(ValueError, match="--aspect_ratio_buckets was .*64,64;48,80;80,48 and is now 64,64"):
        train(tiny_sdxl, shaped, tmp_path, aspect_ratio_buckets="64,64;", resume_from_checkpoint="latest")


def test_pairs_of_which_none_fits_are_refused(shaped, tiny_sdxl, tmp_path):
    with pytest.raises(ValueError, match="--max_crop=0 leaves none of the 24 pairs"):
        train(tiny_sdxl, shaped, tmp_path, aspect_ratio_buckets="48,64;", max_crop=0)
