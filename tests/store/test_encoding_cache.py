"""Training from cached latents and prompt embeddings: the same run, without VAE and text encoders."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import arguments, face_rows, logged, train, write_parquet
from orpo.cli import encode_pairs
from orpo.models.identity import encoding_identity, module_identity
from orpo.models.latent_diffusion import LatentDiffusion
from orpo.models.sdxl import StableDiffusionXL
from orpo.pairs.dataset import DataOptions, TransformedPairs, load_pairs
from orpo.store import encode

import train_diffusion_orpo_sdxl_lora
from diffusers import AutoencoderKL


CPU = SimpleNamespace(
    device=torch.device("cpu"), process_index=0, num_processes=1, is_local_main_process=True, is_main_process=True
)


@pytest.fixture
def encoded(monkeypatch) -> dict[str, int]:
    """How many images and prompts the model encodes."""
    seen = {"images": 0, "prompts": 0}
    encode_images, encode_prompts = StableDiffusionXL.encode_images, StableDiffusionXL.encode_prompts

    def count_images(self, pixel_values):
        seen["images"] += len(pixel_values)
        return encode_images(self, pixel_values)

    def count_prompts(self, prompts):
        seen["prompts"] += len(prompts)
        return encode_prompts(self, prompts)

    monkeypatch.setattr(StableDiffusionXL, "encode_images", count_images)
    monkeypatch.setattr(StableDiffusionXL, "encode_prompts", count_prompts)
    return seen


def open_encoded(model: str, data: str, cache_dir, accelerator=CPU, **flags):
    flags = {"cache_latents": True, "cache_dir": cache_dir} | flags
    args = train_diffusion_orpo_sdxl_lora.parse_args(arguments(model, data, "unused", **flags))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "on_main_process", lambda accelerator, function, *args: function(*args))
        return encode_pairs(
            load_pairs(DataOptions.from_config(args)), args, accelerator, StableDiffusionXL, torch.float32
        )


@pytest.mark.parametrize("flags", [{}, {"random_flip": True, "proportion_empty_prompts": 0.5}])
def test_it_is_the_same_run(tiny_sdxl, faces, tmp_path, flags):
    """Losses of each step over more than an epoch, held-out metrics and the LoRA are those of a run without a cache."""
    flags |= {"max_train_steps": 8, "train_batch_size": 4, "report_to": "tensorboard", "learning_rate": 1e-4}
    flags |= {"run_validation": True, "num_validation_pairs": 4, "validation_prompts": "a", "cache_dir": tmp_path}
    flags |= {"validation_inference_steps": 1}
    plain = train(tiny_sdxl, faces, tmp_path / "plain", **flags)
    cached = train(tiny_sdxl, faces, tmp_path / "cached", cache_latents=True, **flags)
    torch.testing.assert_close(cached, plain, rtol=0, atol=2e-5)
    logs = {name: logged(tmp_path / name) for name in ("plain", "cached")}
    assert len(logs["plain"]["loss"]) == 8 and "eval_loss" in logs["plain"]
    assert logs["cached"].keys() == logs["plain"].keys()
    for name, values in logs["plain"].items():
        np.testing.assert_allclose(logs["cached"][name], values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_vae_and_text_encoders_are_there_for_validation_images_only(tiny_sdxl, faces, tmp_path, monkeypatch):
    seen = []
    predict, generate = StableDiffusionXL.predict, LatentDiffusion.generate
    monkeypatch.setattr(
        StableDiffusionXL,
        "predict",
        lambda self, *args: seen.append(("step", self.has_encoders)) or predict(self, *args),
    )
    monkeypatch.setattr(
        LatentDiffusion,
        "generate",
        lambda self, *args: seen.append(("generate", self.has_encoders)) or generate(self, *args),
    )
    flags = {"run_validation": True, "num_validation_pairs": 2, "validation_steps": 1, "validation_prompts": "a"}
    flags |= {"validation_inference_steps": 1, "cache_dir": tmp_path / "cache"}
    train(tiny_sdxl, faces, tmp_path / "lora", cache_latents=True, **flags)
    assert set(seen) == {("step", False), ("generate", True)}


def samples(data) -> list[dict]:
    cached = data.encodings.samples(data.train, data.transform, 0)
    return [cached[0, index] for index in range(data.num_pairs)]


def equal(one: list[dict], other: list[dict]) -> bool:
    return all(torch.equal(a["moments"], b["moments"]) for a, b in zip(one, other, strict=True))


def test_images_and_prompts_that_come_again_in_the_next_pairs_are_encoded_once(tiny_sdxl, tmp_path, encoded):
    """Images stand in several pairs, as ranked ones and those of Pick-a-Pic do, and so do prompts."""
    rows = face_rows(6, ties=0)
    rows += [row | {"jpg_0": rows[0]["jpg_0"]} for row in rows[1:]]
    rows[3]["caption"] = rows[0]["caption"]
    data = open_encoded(tiny_sdxl, write_parquet(tmp_path / "data", rows), tmp_path / "cache")
    assert data.num_pairs == 11
    assert encoded["images"] == len({row[name] for row in rows for name in ("jpg_0", "jpg_1")})
    assert encoded["prompts"] == len({row["caption"] for row in rows})
    args = train_diffusion_orpo_sdxl_lora.parse_args(arguments(tiny_sdxl, "unused", "unused"))
    model = StableDiffusionXL.load(args, torch.device("cpu"), torch.float32, denoiser=False)
    plain = TransformedPairs(data.train, data.transform, 0)
    for index, sample in enumerate(samples(data)):
        expected = plain[0, index]
        assert torch.equal(sample["original_sizes"], expected["original_sizes"])
        moments = model.encode_images(expected["pixel_values"].permute(0, 3, 1, 2))
        torch.testing.assert_close(sample["moments"], moments, rtol=1e-3, atol=1e-4)


def test_what_is_cached_is_not_encoded_again(tiny_sdxl, faces, tmp_path, encoded):
    first = open_encoded(tiny_sdxl, faces, tmp_path)
    assert encoded == {"images": 48, "prompts": 24}
    held_out = {"run_validation": True, "num_validation_pairs": 5, "validation_prompts": "a"}
    again = open_encoded(tiny_sdxl, faces, tmp_path, train_batch_size=7, seed=5, **held_out)
    assert encoded == {"images": 48, "prompts": 24} and again.num_pairs == 19
    assert equal(samples(first), samples(open_encoded(tiny_sdxl, faces, tmp_path)))
    open_encoded(tiny_sdxl, faces, tmp_path, random_flip=True)  # asks for the mirrored ones, too
    assert encoded["images"] == 48 + 96


def test_of_more_pairs_those_that_are_new_are_encoded(tiny_sdxl, tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(encode, "PAIRS_PER_SHARD", 4)
    open_encoded(tiny_sdxl, write_parquet(tmp_path / "8", face_rows(8, ties=0)), tmp_path / "cache")
    open_encoded(tiny_sdxl, write_parquet(tmp_path / "12", face_rows(12, ties=0)), tmp_path / "cache")
    assert encoded["images"] == 16 + 8


def with_other_weights(model: str, folder, module: str) -> str:
    shutil.copytree(model, folder)
    (path,) = (folder / module).glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return str(folder)


@pytest.mark.parametrize("what", ["vae", "text_encoder_2", "resolution", "image", "library"])
def test_what_would_be_encoded_otherwise_is_encoded_anew(tiny_sdxl, faces, tmp_path, encoded, monkeypatch, what):
    open_encoded(tiny_sdxl, faces, tmp_path / "cache")
    model, data, flags = tiny_sdxl, faces, {}
    if what in ("vae", "text_encoder_2"):
        model = with_other_weights(tiny_sdxl, tmp_path / "model", what)
    elif what == "resolution":
        flags["resolution"] = 32
    elif what == "image":
        rows = face_rows(28)
        rows[0]["jpg_0"] = rows[1]["jpg_0"]
        data = write_parquet(tmp_path / "data", rows)
    else:
        monkeypatch.setitem(encode.LIBRARIES, "torch", "99.0")
    open_encoded(model, data, tmp_path / "cache", **flags)
    assert encoded["images"] == (48 + 47 if what == "image" else 2 * 48)


def test_a_copy_of_the_model_is_the_same_model(tiny_sdxl, faces, tmp_path, encoded):
    open_encoded(tiny_sdxl, faces, tmp_path / "cache")
    open_encoded(shutil.copytree(tiny_sdxl, tmp_path / "copy"), faces, tmp_path / "cache")
    assert encoded["images"] == 48


def test_an_encoding_that_was_stopped_goes_on_where_it_was(tiny_sdxl, faces, tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(encode, "PAIRS_PER_SHARD", 5)
    encode_batch = AutoencoderKL.encode
    calls = iter(range(4))  # of 4 images: the fifth one ends within the second shard of 10
    monkeypatch.setattr(AutoencoderKL, "encode", lambda *args: (next(calls), encode_batch(*args))[1])
    with pytest.raises(RuntimeError, match="StopIteration"):
        open_encoded(tiny_sdxl, faces, tmp_path, vae_encode_batch_size=4)
    monkeypatch.setattr(AutoencoderKL, "encode", encode_batch)
    encoded["images"] = 0
    stopped = open_encoded(tiny_sdxl, faces, tmp_path, vae_encode_batch_size=4)
    assert encoded["images"] == 38
    assert equal(
        samples(stopped), samples(open_encoded(tiny_sdxl, faces, tmp_path / "another", vae_encode_batch_size=4))
    )


def test_processes_share_the_work(tiny_sdxl, faces, tmp_path, encoded, monkeypatch):
    """Each of three processes encodes its own shards; waiting is where the others do theirs."""
    monkeypatch.setattr(encode, "PAIRS_PER_SHARD", 5)
    shares = []

    def run_others(accelerator):
        monkeypatch.setattr(encode, "wait_for_reading", lambda accelerator: None)
        shares.append(encoded["images"])
        for rank in (1, 2):
            other = vars(CPU) | {"process_index": rank, "num_processes": 3, "is_main_process": False}
            with pytest.MonkeyPatch.context() as patch:  # of the last of them only all shards are there
                patch.setattr(encode, "describe", lambda *args: None)
                patch.setattr(encode, "read_at", lambda *args: {"encoded.safetensors": b""})
                open_encoded(tiny_sdxl, faces, tmp_path, SimpleNamespace(**other))

    monkeypatch.setattr(encode, "wait_for_reading", run_others)
    data = open_encoded(tiny_sdxl, faces, tmp_path, SimpleNamespace(**vars(CPU) | {"num_processes": 3}))
    assert shares == [20] and encoded["images"] == 48  # shards 0 and 3 of 5
    assert len(samples(data)) == 24


def test_a_module_on_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    """A folder as the Hub's cache has it, found offline."""
    for commit, ref in (("a" * 40, "main"), ("b" * 40, "other")):
        snapshot = tmp_path / "models--me--my-model" / "snapshots" / commit / "vae"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (snapshot.parents[2] / "refs").mkdir(exist_ok=True)
        (snapshot.parents[2] / "refs" / ref).write_text(commit)
    options = {"subfolder": "vae", "cache_dir": tmp_path}
    assert module_identity("me/my-model", **options) == f"me/my-model@{'a' * 40}"
    assert (
        module_identity("me/my-model", **options, revision="other", variant="fp16") == f"me/my-model@{'b' * 40} (fp16)"
    )


def test_precision_is_part_of_the_identity(tiny_sdxl, faces):
    args = train_diffusion_orpo_sdxl_lora.parse_args(arguments(tiny_sdxl, faces, "unused"))
    identities = [encoding_identity(StableDiffusionXL, args, dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert {name for name in identities[0] if identities[0][name] != identities[1][name]} == {"precision"}


def test_random_crops_are_refused(tiny_sdxl, faces, capsys):
    with pytest.raises(SystemExit):
        train_diffusion_orpo_sdxl_lora.parse_args(
            arguments(tiny_sdxl, faces, "unused", cache_latents=True, random_crop=True)
        )
    assert "--random_crop" in capsys.readouterr().err
