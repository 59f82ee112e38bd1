"""Shards of latents and prompt embeddings: what the converter writes, and that training from them is the same run."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import arguments, face_rows, logged, train, write_parquet, write_shards
from orpo.cli import plan_encoding
from orpo.config import TrainingConfig
from orpo.models.latent_diffusion import LatentDiffusion
from orpo.models.sdxl import StableDiffusionXL
from orpo.pairs.bad_pair import BadPair
from orpo.pairs.pair import PairTransform
from orpo.runtime.shapes import square
from orpo.store.folder import read_manifest
from orpo.store.index import find_shards
from orpo.store.reader import read_samples
from orpo.store.sample import read_encoded, to_pair
from safetensors.torch import load, save
from transformers import CLIPTextModel

from bases import base_folder
from convert_to_webdataset import main
from convert_to_webdataset import parse_args as converter_flags
from diffusers import AutoencoderKL
from train_diffusion_orpo_sdxl_lora_wds import parse_args


ROWS = 28
PLAIN = PairTransform(square(64))
BROKEN = 5  # its header is good, its tail is gone


pytestmark = pytest.mark.usefixtures("ray")


def convert(data, output, *flags) -> Path:
    main([f"--dataset_name={data}", f"--output_dir={output}", "--shard_size_mb=0.03", *flags])
    return Path(output)


def encode_flags(model: str) -> list[str]:
    return ["--encode", f"--pretrained_model_name_or_path={model}", "--resolution=64", "--vae_encode_batch_size=4"]


def broken_rows() -> list[dict]:
    rows = face_rows(ROWS)
    rows[BROKEN]["jpg_0"] = rows[BROKEN]["jpg_0"][:-200]
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    return write_parquet(tmp_path_factory.mktemp("rows"), broken_rows())


@pytest.fixture(scope="module")
def encoded(rows, tiny_sdxl, tmp_path_factory) -> Path:
    """Rows 0 to 8 in shard 0, of which one is broken, to 17 in shard 1, and to 27 in shard 2, of which four are ties."""
    return convert(rows, tmp_path_factory.mktemp("encoded"), *encode_flags(tiny_sdxl))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The images of shards 1 and 2."""
    return write_shards(tmp_path_factory.mktemp("plain"), broken_rows()[9:24], per_shard=9, first_shard=1)


def members(folder: Path) -> list[dict]:
    """Of all samples, in order."""
    paths = sorted(folder.glob("*.tar"))
    return [sample for path in paths for _, sample in read_samples(str(path), 0, ROWS)]


def flags_of(model: str, **flags) -> TrainingConfig:
    return parse_args(arguments(model, None, "unused", **{"dataset_path": "unused"} | flags))


def test_the_converter_counts_rows_as_ever_and_finds_images_that_break_off(encoded):
    manifest = read_manifest(str(encoded))
    labels = [sum(shard.labels[name] for shard in manifest.shards) for name in ("jpg_0", "jpg_1", "tie")]
    assert labels == [11, 12, 4]
    assert [(bad.row, "truncated" in bad.reason) for shard in manifest.shards for bad in shard.bad_rows] == [
        (BROKEN, True)
    ]
    assert len(manifest.shards) == 3 and len(members(encoded)) == 23


def test_samples_hold_what_the_encoders_say_of_the_centre_crops_and_of_the_prompt(encoded, plain, tiny_sdxl):
    model = StableDiffusionXL.load(flags_of(tiny_sdxl), torch.device("cpu"), torch.float32, denoiser=False)
    encoding = find_shards([str(encoded)]).encoding
    originals, found = members(plain), members(encoded)[8:]
    assert len(originals) == len(found) == 15
    for i in range(0, 15, 2):
        pair = to_pair(originals[i])
        expected, sample = (
            PairTransform(square(64))(pair, 0, 7, "row 0"),
            read_encoded(encoding, found[i], 0, PLAIN, 7),
        )
        moments = model.encode_images(expected["pixel_values"].permute(0, 3, 1, 2))
        torch.testing.assert_close(sample["moments"], moments, rtol=1e-4, atol=1e-4)
        for name, value in model.encode_prompts([pair.prompt]).items():
            torch.testing.assert_close(sample["embeds"][name], value[0], rtol=1e-4, atol=1e-4)
        for name in ("original_sizes", "crop_top_lefts"):
            assert torch.equal(sample[name], expected[name])
        assert sample["seed"] == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_training_is_the_same_run(tiny_sdxl, rows, encoded, plain, tmp_path, workers):
    """Losses over more than an epoch, held-out metrics and the LoRA, to float tolerance. Both have the same rows."""
    flags = {"max_train_steps": 7, "train_batch_size": 4, "report_to": "tensorboard", "learning_rate": 1e-4}
    flags |= {
        "run_validation": True,
        "num_validation_pairs": 3,
        "validation_prompts": ["a"],
        "num_validation_images": 1,
    }
    flags |= {"validation_inference_steps": 1, "shuffle_buffer_size": 4, "dataloader_num_workers": workers}
    from_images = train(tiny_sdxl, None, tmp_path / "images", dataset_path=plain, **flags)
    same_rows = f"{encoded}/train-0000{{1,2}}.tar"
    from_latents = train(tiny_sdxl, None, tmp_path / "latents", dataset_path=same_rows, **flags)
    torch.testing.assert_close(from_latents, from_images, rtol=0, atol=2e-5)
    logs = {name: logged(tmp_path / name) for name in ("images", "latents")}
    assert len(logs["images"]["loss"]) == 7 and "eval_loss" in logs["images"]
    assert logs["latents"].keys() == logs["images"].keys()
    for name, values in logs["images"].items():
        np.testing.assert_allclose(logs["latents"][name], values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_neither_vae_nor_text_encoders_are_loaded_but_to_draw(tiny_sdxl, encoded, tmp_path, monkeypatch):
    drawing, loaded = [], []
    generate = LatentDiffusion.generate
    monkeypatch.setattr(
        LatentDiffusion, "generate", lambda self, *args: drawing.append(self.has_encoders) or generate(self, *args)
    )
    for module in (AutoencoderKL, CLIPTextModel):
        original = module.from_pretrained.__func__

        def record(cls, *args, _original=original, **kwargs):
            loaded.append(cls.__name__)
            return _original(cls, *args, **kwargs)

        monkeypatch.setattr(module, "from_pretrained", classmethod(record))
    train(tiny_sdxl, None, tmp_path / "lora", dataset_path=encoded)
    assert loaded == []
    flags = {
        "run_validation": True,
        "num_validation_pairs": 2,
        "validation_prompts": ["a"],
        "validation_inference_steps": 1,
    }
    train(tiny_sdxl, None, tmp_path / "validated", dataset_path=encoded, **flags)
    assert drawing and all(drawing) and {"AutoencoderKL", "CLIPTextModel"} <= set(loaded)


def test_other_encoders_and_settings_are_refused_and_named(tiny_sdxl, demo_base, encoded, tmp_path):
    def refuse(match, model=tiny_sdxl, **flags):
        with pytest.raises(ValueError, match=match):
            train(model, None, tmp_path / "lora", dataset_path=encoded, **flags)

    refuse("resolution was 64 and is now 32", resolution=32)
    refuse("precision was float32 and is now bfloat16", mixed_precision="bf16")
    refuse("vae was sha256:.* and is now sha256", pretrained_vae_model_name_or_path=f"{demo_base}/vae")
    refuse("vae was .*; text_encoder was .*; text_encoder_2 was", model=demo_base)
    refuse("--random_crop and --random_flip", random_crop=True, random_flip=True)
    refuse("--proportion_empty_prompts", proportion_empty_prompts=0.1)


def change(**changes):
    """Replaces tensors of an encoded sample; None leaves one out."""

    def damage(content: bytes) -> bytes:
        tensors = load(content) | changes
        return save({name: value for name, value in tensors.items() if value is not None})

    return damage


def with_nan(content: bytes) -> bytes:
    tensors = load(content)
    tensors["moments_1"][3, 2, 1] = torch.nan
    return save(tensors)


def with_inf(content: bytes) -> bytes:
    tensors = load(content)
    name = next(name for name in tensors if name.startswith("embeds."))
    tensors[name].view(-1)[0], tensors[name].view(-1)[1] = torch.inf, -torch.inf
    return save(tensors)


DAMAGE = {
    "no safetensors": lambda content: b"x" * len(content),
    "empty": lambda content: b"",
    "truncated": lambda content: content[:-7],
    "longer": lambda content: content + b"\0",
    "header of 2^60 bytes": lambda content: (1 << 60).to_bytes(8, "little") + content[8:],
    "nested header": lambda content: (10**5).to_bytes(8, "little") + b"[" * 10**5,
    "another dtype": change(moments_0=torch.zeros(8, 32, 32, dtype=torch.float16)),
    "another shape": change(moments_1=torch.zeros(8, 32, 16)),
    "one is missing": change(moments_1=None),
    "one is too many": change(**{"embeds.more": torch.zeros(1)}),
    "NaN": with_nan,
    "infinite": with_inf,
    "negative size": change(original_sizes=torch.full((2, 2), -1)),
    "huge crop": change(crop_top_lefts=torch.full((2, 2), 1 << 40)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_hostile_encoding_is_a_bad_sample(encoded, damage):
    sample = members(encoded)[1]
    with pytest.raises(BadPair) as raised:
        read_encoded(
            find_shards([str(encoded)]).encoding,
            sample | {"encoded.safetensors": DAMAGE[damage](sample["encoded.safetensors"])},
            bucket=0,
            transform=PLAIN,
            seed=0,
        )
    assert raised.value.kind == "bad encoding" and len(str(raised.value)) < 1000


def test_labels_decide_the_order_and_ties_are_passed_over(encoded):
    encoding, sample = find_shards([str(encoded)]).encoding, members(encoded)[1]
    tensors = load(sample["encoded.safetensors"])
    for label, first in (("1", 0), ("0", 1)):
        texts = {"label_0.txt": label.encode(), "label_1.txt": str(1 - float(label)).encode()}
        read = read_encoded(encoding, sample | texts, 0, PLAIN, 0)
        assert torch.equal(read["moments"][0], tensors[f"moments_{first}"])
        assert torch.equal(read["moments"][1], tensors[f"moments_{1 - first}"])
        assert torch.equal(read["original_sizes"][0], tensors["original_sizes"][first])
        assert torch.equal(read["crop_top_lefts"][1], tensors["crop_top_lefts"][1 - first])
    assert read_encoded(encoding, sample | {"label_0.txt": b"0.5", "label_1.txt": b"0.5"}, 0, PLAIN, 0) is None
    with pytest.raises(BadPair, match="has only .*needs original_prompt.txt, encoded.safetensors, label_0.txt"):
        read_encoded(encoding, {name: value for name, value in sample.items() if name != "label_0.txt"}, 0, PLAIN, 0)


def test_bad_samples_of_a_stream_are_counted_and_the_others_train(tiny_sdxl, encoded, tmp_path, capsys):
    folder = shutil.copytree(encoded, tmp_path / "shards")
    shard = folder / "train-00001.tar"
    samples = [sample for _, sample in read_samples(str(shard), 0, ROWS)]
    samples[2]["encoded.safetensors"] = with_nan(samples[2]["encoded.safetensors"])
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for name in filter(lambda name: not name.startswith("__"), sample):
                entry = tarfile.TarInfo(f"{sample['__key__']}.{name}")
                entry.size = len(sample[name])
                tar.addfile(entry, io.BytesIO(sample[name]))
    with pytest.raises(ValueError, match="train-00001.tar: 1 bad encoding"):
        train(tiny_sdxl, None, tmp_path / "stopped", dataset_path=folder, max_train_steps=12)
    train(tiny_sdxl, None, tmp_path / "lora", dataset_path=folder, max_train_steps=12, max_bad_samples=0.1)
    assert "bad=1" in capsys.readouterr().err


def test_a_stopped_conversion_goes_on_and_writes_the_same_bytes(rows, encoded, tiny_sdxl, tmp_path):
    folder = shutil.copytree(encoded, tmp_path / "shards")
    (folder / "train-00001.tar").unlink()
    kept = (folder / "train-00000.tar").stat().st_mtime_ns
    convert(rows, folder, *encode_flags(tiny_sdxl))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in encoded.iterdir()
    }
    assert (folder / "train-00000.tar").stat().st_mtime_ns == kept
    for flags in ([], encode_flags(tiny_sdxl)[:2], [*encode_flags(tiny_sdxl), "--mixed_precision=bf16"]):
        with pytest.raises(ValueError, match="another --shard_size_mb, --keep_ties or encoding"):
            convert(rows, folder, *flags)


def test_cache_dir_is_where_downloaded_models_are_looked_for(rows, encoded, tiny_sdxl, tmp_path):
    """As in training; the Hub's own cache of this machine has no such model."""
    downloaded = tmp_path / "cache" / "models--somebody--sdxl"
    shutil.copytree(tiny_sdxl, downloaded / "snapshots" / ("0" * 40))
    (downloaded / "refs").mkdir()
    (downloaded / "refs" / "main").write_text("0" * 40)
    with pytest.raises(ValueError, match="somebody/sdxl is not a pipeline"):
        convert(rows, tmp_path / "not_found", *encode_flags("somebody/sdxl"))
    found = convert(rows, tmp_path / "found", *encode_flags("somebody/sdxl"), f"--cache_dir={tmp_path / 'cache'}")
    for tar in encoded.glob("*.tar"):
        assert (found / tar.name).read_bytes() == tar.read_bytes()


def test_images_and_latents_are_not_mixed(encoded, plain):
    with pytest.raises(ValueError, match="hold different things"):
        find_shards([str(plain), str(encoded)])


def test_flags_of_the_encoding_need_encode_and_a_model_that_is_known(rows, tiny_sdxl, tmp_path, capsys):
    for flags, message in (
        (["--resolution=64"], "--resolution has no effect without --encode"),
        (["--encode"], "--encode needs --pretrained_model_name_or_path"),
    ):
        with pytest.raises(SystemExit):
            convert(rows, tmp_path / "out", *flags)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="--resolution must be a multiple of 8"):
        convert(rows, tmp_path / "out", *encode_flags(tiny_sdxl)[:2], "--resolution=65")
    model = shutil.copytree(tiny_sdxl, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text()) | {"_class_name": "KandinskyPipeline"}
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is a KandinskyPipeline. It must be one of"):
        convert(rows, tmp_path / "out", *encode_flags(str(model)))


def test_without_encode_neither_torch_nor_diffusers_is_imported():
    code = (
        "import convert_to_webdataset, sys; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    folder = Path(__file__).parents[2] / "examples" / "diffusion_orpo"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True).stdout.strip() == "[]"
    )


def test_a_resolution_that_the_family_cannot_train_at_is_refused():
    """SD3 sees 2 x 2 latents at once, SDXL does not."""

    def plan(family: str):
        flags = ["--dataset_name=a", "--output_dir=b", "--encode", "--resolution=72"]
        config = converter_flags([*flags, f"--pretrained_model_name_or_path={base_folder(family)}"])
        return plan_encoding(config)

    assert plan("sdxl").shapes == ((72, 72),)
    with pytest.raises(ValueError, match="--resolution must be a multiple of 16"):
        plan("sd3")
