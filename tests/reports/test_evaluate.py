"""`evaluate_lora.py` as a user runs it, on a tiny SDXL: images, resuming, settings, results; a scorer in validation."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from families import FAMILIES, load_pipeline
from forking import fork_two_processes, kill_while_saving
from helpers import arguments, logged, train
from orpo.generation.model import Generator
from orpo.generation.prompts import BUILT_IN_PROMPTS
from orpo.models.lora_files import write_for_other_programs
from orpo.models.sdxl import StableDiffusionXL
from orpo.scoring.image_statistics import saturation
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate_lora
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from train_diffusion_orpo_sdxl_lora import parse_args


SIDES = ("base", "lora")
PROMPTS = ["a red ball", 'a face | "quoted" & <b>bold</b>', "red face"]


@pytest.fixture(scope="module")
def lora(tiny_sdxl, tmp_path_factory) -> str:
    """Folder of a LoRA with random weights and an alpha that is not its rank."""
    folder = tmp_path_factory.mktemp("lora")
    save_lora(tiny_sdxl, folder, seed=0)
    return str(folder)


def save_lora(base: str, folder: Path, seed: int) -> None:
    args = parse_args(arguments(base, "unused", "unused", rank=2, lora_alpha=3))
    model = StableDiffusionXL.load(args, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_lora(folder)


@pytest.fixture(scope="module")
def evaluate(tiny_sdxl, lora, tmp_path_factory):
    """Runs the script in this process; returns the output folder."""
    prompt_file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompt_file.write_text("\n\n".join([*PROMPTS, PROMPTS[0]]) + "\n")

    def evaluate(output_dir: Path, **flags) -> Path:
        PartialState._reset_state()
        defaults = {
            "pretrained_model_name_or_path": tiny_sdxl,
            "lora_weights": lora,
            "prompt_file": prompt_file,
            "output_dir": output_dir,
            "resolution": 64,
            "num_inference_steps": 2,
            "scorers": ["saturation"],
        }
        flags = {name: value for name, value in (defaults | flags).items() if value is not None}
        line = []
        for name, value in flags.items():
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        evaluate_lora.main(line)
        return output_dir

    return evaluate


@pytest.fixture(scope="module")
def finished(evaluate, tmp_path_factory) -> Path:
    """The output folder of an evaluation with two images of each prompt."""
    return evaluate(tmp_path_factory.mktemp("finished"), num_images_per_prompt=2)


@pytest.fixture
def again(finished, evaluate, tmp_path):
    """Runs the script on a copy of that folder; returns the copy."""
    shutil.copytree(finished, tmp_path / "out", copy_function=shutil.copy2)

    def again(**flags) -> Path:
        return evaluate(tmp_path / "out", **{"num_images_per_prompt": 2} | flags)

    return again


@pytest.fixture
def run(evaluate, tmp_path):
    """Runs the script in a new folder."""

    def run(output_dir: Path = tmp_path / "out", **flags) -> Path:
        return evaluate(output_dir, **flags)

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


def pngs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def generate_one(
    tiny_sdxl: str, prompt: str, seed: int, lora: str | None = None, scale: float = 1.0, steps: int = 2
) -> np.ndarray:
    """What a user generates, one image at a time."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    (image,) = pipeline(
        prompt,
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(seed),
        cross_attention_kwargs={"scale": scale} if lora else None,
    ).images
    return np.asarray(image, dtype=int)


def test_images_are_those_a_user_generates_with_and_without_the_lora(run, finished, tiny_sdxl, lora):
    """Whatever the batch size, by which no pixel moves by more than one."""
    out = run(num_images_per_prompt=2, batch_size=1, lora_scale=0.5, base_images_dir=finished / "base")
    pairs = results_of(out)["pairs"]
    assert [(pair["prompt"], pair["seed"]) for pair in pairs] == [
        (prompt, 2 * i + j) for i, prompt in enumerate(PROMPTS) for j in range(2)
    ]
    for pair in pairs[1:4:2]:
        scaled, (base, whole) = (
            pixels(out / "lora" / pair["image"]),
            (pixels(finished / side / pair["image"]) for side in SIDES),
        )
        assert abs(base - generate_one(tiny_sdxl, pair["prompt"], pair["seed"])).max() <= 1
        assert abs(whole - generate_one(tiny_sdxl, pair["prompt"], pair["seed"], lora)).max() <= 1
        assert abs(scaled - generate_one(tiny_sdxl, pair["prompt"], pair["seed"], lora, 0.5)).max() <= 1
        assert min(abs(base - whole).max(), abs(whole - scaled).max()) > 5


def test_results_are_the_scores_of_the_images_on_disk(finished):
    results = results_of(finished)
    values = np.array(
        [
            [saturation([Image.open(finished / side / pair["image"])], [""])[0] for pair in results["pairs"]]
            for side in SIDES
        ]
    )
    np.testing.assert_allclose([[pair[side]["saturation"] for pair in results["pairs"]] for side in SIDES], values)
    comparison = results["scorers"]["saturation"]
    assert comparison["win_rate"] == np.mean(values[1] > values[0])
    assert comparison["difference"] == pytest.approx((values[1] - values[0]).mean())
    assert results["statistics"]["saturation"]["mean_lora"] == pytest.approx(values[1].mean())
    assert {"high_frequency", "saturation"} == results["statistics"].keys()
    settings = results["settings"]
    assert settings["prompts"] == PROMPTS and settings["scheduler"]["_class_name"] == "EulerDiscreteScheduler"
    assert (settings["num_inference_steps"], settings["guidance_scale"], settings["seed"]) == (2, 5.0, 0)
    assert {"torch", "diffusers"} == settings["versions"].keys() and settings["dtype"] == "fp32"


def test_a_lora_that_adds_nothing_ties_everywhere(run, tiny_sdxl, tmp_path):
    args = parse_args(arguments(tiny_sdxl, "unused", "unused"))
    StableDiffusionXL.load(args, torch.device("cpu"), torch.float32).save_lora(tmp_path / "untrained")
    comparison = results_of(run(lora_weights=tmp_path / "untrained"))["scorers"]["saturation"]
    assert (comparison["ties"], comparison["win_rate"], comparison["difference"]) == (3, 0.5, 0)


def test_only_what_is_missing_is_generated_again(again, finished, tmp_path, monkeypatch):
    before, out = {side: pngs(finished / side) for side in SIDES}, tmp_path / "out"
    kept = out / "base" / "00000-0.png"
    kept.write_bytes(before["lora"]["00000-0.png"])  # a mark: generated again, it would be the base's
    (out / "base" / "00001-0.png").unlink()
    (out / "lora" / "00002-0.png").unlink()
    (out / "lora" / ".00002-0.png.partial").write_bytes(b"half a picture")
    again()
    assert kept.read_bytes() == before["lora"]["00000-0.png"]
    assert pngs(out / "base")["00001-0.png"] == before["base"]["00001-0.png"]
    assert pngs(out / "lora") == before["lora"]

    monkeypatch.setattr(Generator, "load", None)  # with all images there, no model is loaded
    again(scorers=["high_frequency"], num_images_per_prompt=1, num_prompts=2)
    assert results_of(out)["scorers"].keys() == {"high_frequency"} and results_of(out)["num_pairs"] == 2


def test_more_images_and_prompts_are_added_to_both_folders(again, finished, tmp_path):
    more = tmp_path / "more.txt"
    more.write_text("\n".join(["one more", *PROMPTS]))
    out = again(num_images_per_prompt=3, prompt_file=more)
    seeds = {pair["image"]: pair["seed"] for pair in results_of(out)["pairs"]}
    assert len(set(seeds.values())) == len(seeds) == 12
    for side in SIDES:
        before, after = pngs(finished / side), pngs(out / side)
        assert len(after) == 12 and {name: after[name] for name in before} == before


def test_a_killed_evaluation_goes_on_with_complete_images_only(run, tmp_path):
    """SIGKILL in the middle of writing the fifth image, the second of its batch: the end is bit for bit the same."""

    kill_while_saving(5, lambda: run(batch_size=2))
    out = tmp_path / "out"
    assert len(pngs(out / "base")) == 3 and len(pngs(out / "lora")) == 1 and not (out / "results.json").exists()
    run(batch_size=2)
    whole = run(batch_size=2, output_dir=tmp_path / "whole")
    for side in ("base", "lora"):
        assert pngs(out / side) == pngs(whole / side)
    assert results_of(out)["scorers"] == results_of(whole)["scorers"]


def test_two_processes_generate_what_one_generates(run, tmp_path):
    flags = {"batch_size": 1, "num_images_per_prompt": 2}

    def run_as(rank: int) -> None:
        draw_batch = StableDiffusionXLPipeline.__call__

        def draw_and_count(*args, **kwargs):
            with (tmp_path / f"batches-{rank}").open("a") as file:
                file.write("a batch\n")
            return draw_batch(*args, **kwargs)

        StableDiffusionXLPipeline.__call__ = draw_and_count
        run(output_dir=tmp_path / "two", **flags)

    fork_two_processes(run_as)
    assert [len((tmp_path / f"batches-{rank}").read_text().splitlines()) for rank in range(2)] == [6, 6]
    one = run(output_dir=tmp_path / "one", **flags)
    for path in one.glob("*/*.png"):
        assert abs(pixels(path) - pixels(tmp_path / "two" / path.relative_to(one))).max() <= 1
    two, alone = (results_of(folder)["statistics"]["saturation"] for folder in (tmp_path / "two", one))
    assert two["mean_lora"] == pytest.approx(alone["mean_lora"], rel=1e-3)


def test_a_folder_of_other_settings_is_refused_with_what_differs(again, tiny_sdxl, tmp_path):
    for flags, message in (
        ({"guidance_scale": 3}, "generated differently: guidance_scale was 5.0 and is now 3.0. Choose"),
        ({"seed": 3}, "seed was 0 and is now 3"),
        ({"dtype": "bf16"}, 'dtype was "fp32" and is now "bf16"'),
        ({"prediction_type": "v_prediction"}, "; scheduler was "),
        ({"lora_scale": 0.3}, "lora_scale was 1.0 and is now 0.3"),
    ):
        with pytest.raises(ValueError, match=message):
            again(**flags)
    save_lora(tiny_sdxl, tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="lora.*holds images that were generated differently.*lora_sha256"):
        again(lora_weights=tmp_path / "other")
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "00000-0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no settings.json"):
        again(base_images_dir=moved)
    (moved / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="settings.json is damaged, or was written by another program"):
        again(base_images_dir=moved)


def test_evaluations_of_several_loras_share_the_bases_images(run, finished, tiny_sdxl, tmp_path):
    times = {path: path.stat().st_mtime_ns for path in (finished / "base").glob("*")}
    save_lora(tiny_sdxl, tmp_path / "other", seed=1)
    other = run(base_images_dir=finished / "base", lora_weights=tmp_path / "other", num_images_per_prompt=2)
    assert {path: path.stat().st_mtime_ns for path in (finished / "base").glob("*")} == times
    assert not (other / "base").exists() and pngs(finished / "lora") != pngs(other / "lora")


def test_a_base_that_changed_in_its_folder_is_another_one(run, tiny_sdxl, tmp_path):
    """A fine-tune saved again, another VAE, another sampler: images of before are not taken for its own."""
    base = Path(shutil.copytree(tiny_sdxl, tmp_path / "base-model"))
    out = run(pretrained_model_name_or_path=base)
    first = pngs(out / "base")
    for name in ("unet", "vae", "text_encoder_2"):
        (file,) = (base / name).glob("*.safetensors")
        before = file.read_bytes()
        save_file({key: value * 0.9 for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"generated differently: {name} was "):
            run(pretrained_model_name_or_path=base)
        file.write_bytes(before)
    run(pretrained_model_name_or_path=base)
    assert pngs(out / "base") == first


def test_the_loras_alphas_are_part_of_what_it_is(run, lora, tmp_path):
    """kohya's files hold them as tensors, which diffusers does not count among the weights."""
    write_for_other_programs(Path(lora) / "pytorch_lora_weights.safetensors", tmp_path / "kohya.safetensors")
    out = run(lora_weights=tmp_path / "kohya.safetensors")
    same = run(output_dir=tmp_path / "same")
    for name in pngs(out / "lora"):
        assert abs(pixels(out / "lora" / name) - pixels(same / "lora" / name)).max() <= 1
    tensors = load_file(tmp_path / "kohya.safetensors")
    halved = {name: value / 2 if name.endswith("alpha") else value for name, value in tensors.items()}
    save_file(halved, tmp_path / "kohya.safetensors")
    with pytest.raises(ValueError, match="lora_sha256"):
        run(lora_weights=tmp_path / "kohya.safetensors")


def test_a_lora_that_fits_in_part_is_scored_with_a_warning(run, lora, tmp_path, capsys):
    tensors = load_file(Path(lora) / "pytorch_lora_weights.safetensors")
    renamed = {name.replace("mid_block", "mid_block9"): value for name, value in tensors.items()}
    save_file(renamed, tmp_path / "half.safetensors")
    modules = {name.split(".lora")[0] for name in tensors}
    message = f"{sum('mid_block' in name for name in modules)} of its {len(modules)} modules are not in the unet"
    for _ in range(2):  # also where all images are there already
        out = run(lora_weights=tmp_path / "half.safetensors")
        (warning,) = results_of(out)["warnings"]
        assert message in warning and warning in capsys.readouterr().out
        assert message in (out / "index.html").read_text()
    whole = run(output_dir=tmp_path / "whole")
    assert results_of(whole)["warnings"] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_generates_as_for_its_users(run, name, models, tmp_path):
    """With the family's own guidance and length of prompts, where the flags say nothing."""
    family, base = FAMILIES[name], models[name]
    model = family.load(base, rank=2, lora_alpha=3)
    for parameter in model.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save_lora(tmp_path / "lora")
    out = run(pretrained_model_name_or_path=base, lora_weights=tmp_path / "lora", num_prompts=1, **family.flags)
    pipeline = load_pipeline(base)
    guidance = {"sd": 7.5, "sd3": 7.0, "flux": 3.5, "z_image": 5.0}.get(name, 4.0)
    assert results_of(out)["settings"]["guidance_scale"] == guidance
    options = {"height": 64, "width": 64, "num_inference_steps": 2} | family.guidance(guidance) | family.call_options
    generated = []
    for side in ("base", "lora"):
        image = pipeline(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(0), **options).images[0]
        generated.append(np.asarray(image, dtype=int))
        assert abs(pixels(out / side / "00000-0.png") - generated[-1]).max() <= 1
        pipeline.load_lora_weights(tmp_path / "lora")
    assert abs(generated[0] - generated[1]).max() > 3


def test_a_broken_image_is_named(again, tmp_path):
    image = tmp_path / "out" / "lora" / "00001-0.png"
    image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(ValueError, match="lora/00001-0.png can't be read.*Remove it"):
        again()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"scorers": ["pikscore"]}, "Unknown scorer 'pikscore'"),
        ({"scorers": ["pickscore"]}, "hf download yuvalkirstain/PickScore_v1"),
        ({"lora_weights": "/no/such/lora"}, "--lora_weights=/no/such/lora"),
        ({"resolution": 60}, "--resolution must be a multiple of 8; got 60"),
        ({"max_sequence_length": 12}, "--max_sequence_length has no effect with SDXL"),
        ({"pretrained_model_name_or_path": "x.safetensors"}, "single file.*from_single_file"),
        ({"prompt_file": "/no/such/file"}, "--prompt_file=/no/such/file does not exist"),
        ({"dataset_name": "some/data"}, "--prompt_file and --dataset_name: choose one"),
    ],
)
def test_what_cannot_be_had_stops_before_anything_is_generated(run, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(Generator, "load", None)
    with pytest.raises((SystemExit, ValueError)) as error:
        run(**flags)
    assert re.search(message, " ".join(f"{error.value} {capsys.readouterr().err}".split()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"resolution": 0}, "--resolution must be at least 8"),
        ({"batch_size": 0}, "--batch_size must be at least 1"),
        ({"scorers": ["saturation", "a:saturation"]}, "--scorers: names must differ"),
    ],
)
def test_bad_flags_are_refused(run, capsys, flags, message):
    with pytest.raises(SystemExit):
        run(**flags)
    assert message in capsys.readouterr().err


def test_a_lora_of_another_model_is_refused_before_anything_is_generated(run, demo_base, tmp_path):
    save_lora(demo_base, tmp_path / "other", seed=0)
    with pytest.raises(ValueError, match="does not fit"):
        run(lora_weights=tmp_path / "other")
    assert not list(tmp_path.glob("out/*/*.png"))


def test_prompts_of_a_dataset_are_the_first_different_ones(run, faces, tmp_path):
    out = run(prompt_file=None, dataset_name=faces, num_prompts=3, dataset_split_name="train")
    prompts = results_of(out)["settings"]["prompts"]
    assert len(set(prompts)) == 3 and all("with a face" in prompt for prompt in prompts)
    with pytest.raises(ValueError, match="none called text.*--caption_column"):
        run(prompt_file=None, dataset_name=faces, caption_column="text")
    with pytest.raises(ValueError, match="no split 'test'"):
        run(prompt_file=None, dataset_name=faces, dataset_split_name="test", dataset_config_name="default")


def test_the_built_in_prompts_are_many_and_different():
    lines = BUILT_IN_PROMPTS.read_text().splitlines()
    assert len(set(lines)) == len(lines) >= 50 and all(line == line.strip() and line for line in lines)


def test_no_other_watermark_and_the_vae_of_the_flag(run, tiny_sdxl, tmp_path):
    vae = AutoencoderKL.from_pretrained(tiny_sdxl, subfolder="vae")
    for parameter in vae.decoder.conv_out.parameters():
        parameter.data.zero_()
    vae.save_pretrained(tmp_path / "grey")
    out = run(pretrained_vae_model_name_or_path=tmp_path / "grey", num_prompts=1, variant=None, revision=None)
    assert np.unique(pixels(out / "base" / "00000-0.png")).tolist() in ([127], [128])


def test_a_scorer_compares_validation_images_with_the_bases(tiny_sdxl, faces, tmp_path, monkeypatch):
    """The base's images are generated once; training goes on as it would without a scorer."""
    generate, generated = StableDiffusionXL.generate, []
    monkeypatch.setattr(StableDiffusionXL, "generate", lambda *args: generated.append(args[1:]) or generate(*args))
    (tmp_path / "mine.py").write_text(
        "from orpo.scoring.image_statistics import saturation\n"
        "CALLS = []\n"
        "def mine(images, prompts):\n"
        "    scores = saturation(images, prompts)\n"
        f"    open({str(tmp_path / 'calls')!r}, 'a').write(repr([list(prompts), scores]) + '\\n')\n"
        "    return scores\n"
    )
    flags = {
        "run_validation": True,
        "validation_steps": 2,
        "num_validation_pairs": 4,
        "validation_prompts": ["red", "ball"],
        "num_validation_images": 2,
        "validation_inference_steps": 1,
        "max_train_steps": 6,
        "learning_rate": 3e-2,
        "report_to": "tensorboard",
    }
    scored = train(tiny_sdxl, faces, tmp_path / "scored", validation_scorer=f"{tmp_path}/mine.py:mine", **flags)
    assert len(generated) == 4 * (3 + 1)  # at steps 2, 4 and after training; and the base's
    plain = train(tiny_sdxl, faces, tmp_path / "plain", **flags)
    assert all(torch.equal(scored[name], plain[name]) for name in plain)

    check, base, *with_lora = [eval(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert base[0] == ["red", "red", "ball", "ball"] and len(with_lora) == 3
    base_images = [Image.open(tmp_path / "scored" / f"image_{i}_without_lora.png") for i in range(4)]
    np.testing.assert_allclose(base[1], saturation(base_images, [""] * 4))
    for image, (prompt, seed) in zip(base_images, [("red", 0), ("red", 1), ("ball", 0), ("ball", 1)]):
        assert abs(np.asarray(image, dtype=int) - generate_one(tiny_sdxl, prompt, seed, steps=1)).max() <= 1
    final_images = [Image.open(tmp_path / "scored" / f"image_{i}.png") for i in range(4)]
    np.testing.assert_allclose(with_lora[-1][1], saturation(final_images, [""] * 4))

    differences = [np.subtract(scores, base[1]) for _, scores in with_lora]
    scalars = logged(tmp_path / "scored")
    np.testing.assert_allclose(scalars["eval_score_difference"], [d.mean() for d in differences], rtol=1e-5)
    np.testing.assert_allclose(scalars["eval_win_rate"], [(d > 0).mean() + 0.5 * (d == 0).mean() for d in differences])
    assert abs(differences[-1]).min() > 0
    written = json.loads((tmp_path / "scored" / "eval_results.json").read_text())
    assert written["eval_win_rate"] == pytest.approx(scalars["eval_win_rate"][-1])
    assert "eval_win_rate" not in logged(tmp_path / "plain")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"validation_scorer": "saturation"}, "--validation_scorer needs --run_validation"),
        ({"validation_scorer": "pikscore", "run_validation": True}, "--validation_scorer: Unknown scorer 'pikscore'"),
        ({"validation_scorer": "pickscore", "run_validation": True}, "hf download yuvalkirstain/PickScore_v1"),
    ],
)
def test_a_validation_scorer_that_cannot_score_is_refused_before_models_load(capsys, flags, message):
    with pytest.raises(SystemExit):
        parse_args(arguments("no/model", "unused", "unused", **flags))
    assert message in " ".join(capsys.readouterr().err.split())
