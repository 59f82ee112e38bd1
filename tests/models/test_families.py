"""All families: against their pipelines, against the mathematics, and in runs; on tiny models of the real classes."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import FAMILIES, load_pipeline, save_tiny
from helpers import face_rows, write_shards
from orpo.training.step import compute_losses
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import kstest, norm

from bases import OWN_VAE, assemble_base, base_folder
from compare import compare


DATA = Path(__file__).parents[1] / "fixtures"
BASE_ERROR = 0.3  # of a velocity, whose mean square is 2, in SD 1
BASE_ERRORS = {
    "flux2": 0.35
}  # its latents are normalised channel by channel, so all count alike, also those that say little
FIRST = ("sd", "sd3", "flux")  # test_newer_families.py has what is the others' own
TAGS = {"sd": "stable-diffusion", "z_image": "z-image", "flux2": "flux2-klein", "qwen_image": "qwen-image"}
BLOCKS = {"sd": 4, "sd3": 2, "flux": 2, "z_image": 3, "flux2": 2, "qwen_image": 1}
BASES = [name for name in FAMILIES if base_folder(name).exists()]
STRENGTH = SimpleNamespace(beta_orpo=0.5, loser_share=None, odds_temperature=1.0)
PROMPTS = ["a red ball", "a prompt that is longer than the tokenizers of this model allow, whichever is asked " * 3]


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def family(name):
    return FAMILIES[name]


@pytest.fixture
def model(models, name):
    return models[name]


class Recorder:
    """Stands where the denoiser stands, keeps what it is given by name, and answers with a function of it."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, *args, **given):
        given |= dict(zip(("hidden_states", "timestep", "encoder_hidden_states"), args))
        assert given.pop("return_dict") is False
        self.given = given
        return (self.answer(given),)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, H, W) as FLUX's tokens of 2x2, built patch by patch."""
    rows = [
        latents[:, :, i : i + 2, j : j + 2].flatten(1)
        for i in range(0, latents.shape[2], 2)
        for j in range(0, latents.shape[3], 2)
    ]
    return torch.stack(rows, dim=1)


def given_by_the_pipeline(pipeline, prompts: list[str], latents: torch.Tensor, **options) -> dict:
    """What the pipeline gives to its denoiser in the first step, without classifier-free guidance, by name."""
    calls = []
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    hook = denoiser.register_forward_pre_hook(lambda _, args, given: calls.append((args, given)), with_kwargs=True)
    pipeline(prompts, latents=latents, num_inference_steps=4, output_type="latent", **options)
    hook.remove()
    args, given = calls[0]
    return given | dict(zip(("hidden_states", "timestep"), args))


@pytest.mark.parametrize("height, width", [(64, 64), (48, 80)])
@pytest.mark.parametrize("name", FIRST)
def test_the_denoiser_is_called_as_the_pipeline_calls_it(name, family, model, height, width):
    """Two pairs, that is four images: both winners before both losers, and so their prompts."""
    guidance_scale = 2.5 if name == "flux" else 1.0
    loaded = family.load(model, **{"guidance_scale": guidance_scale} if name == "flux" else {})
    latents = torch.randn(4, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    options = {"height": height, "width": width, "guidance_scale": guidance_scale} | family.call_options
    packed = pack(latents) if name == "flux" else latents
    expected = given_by_the_pipeline(load_pipeline(model), PROMPTS * 2, packed, **options)
    recorder = Recorder(lambda given: given["hidden_states"])
    timesteps = expected["timestep"].expand(4) * (1000 if name == "flux" else 1)
    answer = loaded.predict(recorder, latents, timesteps, loaded.encode_prompts(PROMPTS), {})
    assert torch.equal(answer, latents)  # what is packed is unpacked
    for key, value in recorder.given.items():
        theirs = expected.pop(key)
        if value is None or theirs is None:
            assert value is theirs
        else:
            torch.testing.assert_close(value, theirs.expand(value.shape).to(value.dtype), rtol=1e-5, atol=1e-6)
    assert not any(torch.is_tensor(value) for value in expected.values())  # nothing is left out


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_max_sequence_length_is_that_of_t5(family, model):
    for length in (5, 12):
        embeds = family.load(model, max_sequence_length=length).encode_prompts(PROMPTS)["prompt_embeds"]
        assert embeds.shape[1] == length + (24 if family is FAMILIES["sd3"] else 0)  # CLIP's 24


@pytest.mark.parametrize("name", FIRST)
def test_a_denoiser_that_knows_the_answer_has_no_error(name, family, model):
    """Winner and loser have targets of their own: each is judged by its own velocity."""
    loaded = family.load(model)
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    loaded.sample_latents = lambda moments, generators: latents
    alphas = loaded.noise_process.scheduler.alphas_cumprod.double() if name == "sd" else None

    def velocity(given):
        noisy, timesteps = given["hidden_states"].double(), given["timestep"]
        clean = (pack(latents) if name == "flux" else latents).double()
        if name == "sd":  # arXiv 2202.00512
            a = alphas[timesteps].view(-1, 1, 1, 1)
            return (a.sqrt() * (noisy - a.sqrt() * clean) / (1 - a).sqrt() - (1 - a).sqrt() * clean).float()
        sigmas = timesteps.double() / (1 if name == "flux" else 1000)
        return ((noisy - clean) / sigmas.view(-1, *[1] * (clean.ndim - 1))).float()  # noisy = clean + sigma velocity

    embeds = loaded.encode_prompts(["a", "b", "c", "d"])
    batch = {"moments": latents, "embeds": embeds, "seeds": [1, 2, 3, 4]}
    recorder = Recorder(velocity)
    _, metrics, _ = compute_losses(STRENGTH, loaded, recorder, batch)
    assert metrics["logps/chosen"].abs().max() < 1e-6
    assert metrics["logps/rejected"].abs().max() < 1e-6
    recorder.answer = lambda given: velocity(given).flip(0)
    _, metrics, _ = compute_losses(STRENGTH, loaded, recorder, batch)
    assert metrics["logps/chosen"].abs().min() > 0.1


@pytest.mark.parametrize("name", FIRST)
def test_latents_are_those_that_diffusers_samples_and_normalises(name, family, model):
    """Also in batches that the VAE takes one after another."""
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    loaded = family.load(model, vae_encode_batch_size=2)
    latents = loaded.sample_latents(loaded.encode_images(pixels), [torch.Generator().manual_seed(i) for i in range(3)])
    vae = load_pipeline(model).vae
    with torch.no_grad():
        posterior = vae.encode(pixels / 127.5 - 1).latent_dist
    sample = posterior.sample([torch.Generator().manual_seed(i) for i in range(3)])
    shift = vae.config.shift_factor or 0
    assert shift == (0 if name == "sd" else 0.3)
    torch.testing.assert_close(latents, (sample - shift) * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)


def flow(models, name: str = "sd3", **flags):
    return FAMILIES[name].load(models[name], **flags).noise_process


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_noise_and_targets_of_flow_matching_in_float64(models, name):
    """Sigma of the i-th timestep is x = 1 - i / 1000, shifted to 3 x / (1 + 2 x) in SD3; FLUX shifts in sampling only."""
    process = flow(models, name)
    generators = [torch.Generator().manual_seed(seed) for seed in range(64)]
    timesteps = process.sample_timesteps(generators)
    x = (1000 - torch.arange(1000, dtype=torch.float64)) / 1000
    grid = 3 * x / (1 + 2 * x) if name == "sd3" else x
    sigmas = grid[(grid[None] - timesteps[:, None].double() / 1000).abs().argmin(dim=1)]
    torch.testing.assert_close(timesteps.double(), 1000 * sigmas, rtol=1e-6, atol=0)
    latents_w, latents_l, noise = torch.randn(3, 64, 4, 8, 8).unbind()
    s = sigmas.view(-1, 1, 1, 1)
    for latents, target in zip((latents_w, latents_l), process.target(latents_w, latents_l, noise, timesteps)):
        noisy = process.add_noise(latents, noise, timesteps)
        torch.testing.assert_close(noisy.double(), (1 - s) * latents.double() + s * noise.double(), rtol=0, atol=2e-6)
        # The noisy image moves along the target: d noisy / d sigma, by a finite difference.
        ahead = process.add_noise(latents, noise, timesteps + 100)
        torch.testing.assert_close((ahead - noisy) / 0.1, target, rtol=0, atol=1e-4)


def cdf(scheme: str, flags: dict):
    """The distribution that a scheme draws from, of the place in the schedule from 0 (all noise) to 1."""
    if scheme == "logit_normal":
        return lambda u: norm.cdf((np.log(u / (1 - u)) - flags["logit_mean"]) / flags["logit_std"])
    if scheme == "mode":  # f(t) = 1 - t - s (cos^2(pi t / 2) - 1 + t) falls from 1 to 0, arXiv 2403.03206
        t = np.linspace(0, 1, 100_001)
        f = 1 - t - flags["mode_scale"] * (np.cos(np.pi * t / 2) ** 2 - 1 + t)
        return lambda u: 1 - np.interp(u, f[::-1], t[::-1])
    return lambda u: u


SCHEMES = {
    "logit_normal": {"logit_mean": 0.7, "logit_std": 0.6},
    "mode": {"mode_scale": 0.9},
    "sigma_sqrt": {},
    "cosmap": {},
    "none": {},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_timesteps_are_distributed_as_the_scheme_says(models, scheme):
    process = flow(models, "flux", **{"weighting_scheme": scheme} | SCHEMES[scheme])
    timesteps = process.sample_timesteps([torch.Generator().manual_seed(seed) for seed in range(3000)])
    places = 1 - timesteps.numpy() / 1000 + 0.0005  # the middle of the thousandth that was drawn
    assert kstest(places, cdf(scheme, SCHEMES[scheme])).pvalue > 1e-3


def test_a_timestep_is_the_pairs_own(models):
    process = flow(models)
    alone = [process.sample_timesteps([torch.Generator().manual_seed(seed)]) for seed in range(8)]
    together = process.sample_timesteps([torch.Generator().manual_seed(seed) for seed in range(8)])
    assert torch.equal(torch.cat(alone), together)
    assert len(together.unique()) == 8


@pytest.mark.parametrize("place", [0.0, 1.0])
def test_the_ends_of_the_schedule_are_in_it(models, place, monkeypatch):
    monkeypatch.setattr(
        "orpo.models.noise.compute_density_for_timestep_sampling", lambda *_, **__: torch.tensor([place])
    )
    (timestep,) = flow(models).sample_timesteps([torch.Generator()])
    assert timestep == pytest.approx(1000 if place == 0 else 1000 * 3e-3 / 1.002)


def test_weights_of_the_schemes(models):
    sigmas = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    expected = {"sigma_sqrt": sigmas**-2, "cosmap": 2 / (torch.pi * (1 - 2 * sigmas + 2 * sigmas**2))}
    for scheme in SCHEMES:
        weights = flow(models, weighting_scheme=scheme).weights(1000 * sigmas.float())
        torch.testing.assert_close(weights.double(), expected.get(scheme, torch.ones(3).double()))


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    return str(write_shards(tmp_path_factory.mktemp("shards"), face_rows(12), per_shard=5))


@pytest.mark.parametrize("source", ["dataset", "shards"])
def test_a_resumed_run_equals_the_uninterrupted_one(family, model, faces, shards, tmp_path, source):
    data = faces if source == "dataset" else None
    flags = {"lora_dropout": 0.2, "random_flip": True, "proportion_empty_prompts": 0.3, "checkpointing_steps": 2}
    flags |= {"max_train_steps": 4}
    if data is None:
        flags |= {"dataset_path": shards, "mixed_precision": "bf16"}
    whole = family.train(model, data, tmp_path / "whole", **flags)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    resumed = family.train(model, data, tmp_path / "part", resume_from_checkpoint="latest", **flags)
    assert whole.keys() == resumed.keys()
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    assert all(value.dtype == torch.float32 for value in whole.values())
    assert max(value.abs().max() for key, value in whole.items() if "lora_B" in key) > 1e-4


def test_the_trained_lora_draws_in_its_pipeline_what_it_drew_in_training(name, family, model, faces, tmp_path):
    """Dropout included, which acts in training alone."""
    flags = {"rank": 3, "lora_alpha": 9, "learning_rate": 0.02, "max_train_steps": 3, "run_validation": True}
    flags |= {"validation_prompts": ["a red ball"], "validation_inference_steps": 3, "num_validation_pairs": 2}
    flags |= {"lora_dropout": 0.3, "beta_orpo": 0.1}
    family.train(model, faces, tmp_path, seed=5, validation_guidance_scale=3.0, **flags)
    trained, base = (
        np.asarray(Image.open(tmp_path / f"image_0{which}.png"), dtype=int) for which in ("", "_without_lora")
    )
    pipeline = load_pipeline(model)
    options = {"height": 64, "width": 64, "num_inference_steps": 3} | family.guidance(3.0) | family.call_options
    for expected in (base, trained):
        image = pipeline(prompt="a red ball", generator=torch.Generator().manual_seed(5), **options).images[0]
        assert np.abs(np.asarray(image, dtype=int) - expected).max() <= 1
        pipeline.load_lora_weights(tmp_path)
    assert np.abs(trained - base).max() > (8 if name in FIRST else 2)
    config = getattr(pipeline, family.cls.denoiser_name).peft_config["default_0"]
    assert (config.r, config.lora_alpha) == (3, 9)


@pytest.mark.parametrize("name", BASES)
def test_the_demos_base_is_small_and_half_precision(name):
    files = list(base_folder(name).rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) < (2_300_000 if name in ("flux2", "qwen_image") else 1_600_000)
    assert any(path.parent.name == "vae" for path in files) == (name in OWN_VAE)  # the shared one is stored once
    for path in files:
        assert {value.dtype for value in load_file(path).values()} <= {torch.float16, torch.int64}


@pytest.mark.parametrize("name", [BASES[0], *(pytest.param(name, marks=pytest.mark.campaign) for name in BASES[1:])])
def test_the_demos_base_learns_to_smile(name, family, tmp_path):
    """From 112 pairs that it drew itself, as `make_pairs.py` labels them; on seeds that it did not train on."""
    base, flags = assemble_base(name, tmp_path / "base"), {"resolution": 64, "train_batch_size": 16, "rank": 8}
    flags |= {"max_train_steps": 40, "learning_rate": 2e-3, "beta_orpo": 0.2, "cache_latents": True}
    flags |= {"run_validation": True, "validation_prompts": ["a"], "validation_inference_steps": 1}
    flags |= {"num_validation_pairs": 16} | family.base_flags
    family.train(base, str(DATA / f"pairs_{name}"), tmp_path / "lora", **flags)
    results = json.loads((tmp_path / "lora" / "eval_results.json").read_text())
    # The base was trained by other code, `train_base.py`: a step that took noise or time otherwise would find it wrong.
    assert results["eval_nll_loss_without_lora"] < BASE_ERRORS.get(name, BASE_ERROR)
    seeds_per_prompt = 2 if name in FIRST else 4
    comparison = compare(base, str(tmp_path / "lora"), str(tmp_path / "grid.png"), seeds_per_prompt, steps=8)
    print(comparison)
    assert comparison.win_rate_low > 0.55
    assert comparison.new_wrong <= comparison.images // 48


def test_the_model_card_draws(name, family, model, faces, tmp_path, monkeypatch):
    """Its snippet runs, for the pipeline of the family and with prompts read as in training."""
    family.train(model, faces, tmp_path, max_train_steps=1, validation_prompts=["a red ball"])
    card = (tmp_path / "README.md").read_text()
    assert TAGS.get(name, name) in card.split("---")[1].split()
    snippet = card.split("```python\n")[1].split("```")[0]
    assert family.cls.pipeline_class.__name__ in snippet
    assert all(f"{option}={value!r}" in snippet for option, value in family.call_options.items())
    monkeypatch.chdir(tmp_path)
    exec(snippet.replace("'a red ball'", "'a red ball', height=64, width=64, num_inference_steps=1"), {})
    assert Image.open("image.png").size == (64, 64)


def test_compile_takes_the_repeated_blocks(name, family, model):
    """They are compiled at their first call; until then they are marked."""
    denoiser = family.load(model, compile=True).denoiser
    marked = [module for module in denoiser.modules() if module._compiled_call_impl is not None]
    assert len(marked) == BLOCKS[name]
    assert all(type(module).__name__.endswith("TransformerBlock") for module in marked)


def test_a_model_of_another_family_is_refused(name, family, models):
    other = "sd3" if name == "flux" else "flux"
    with pytest.raises(ValueError, match=f"is a {FAMILIES[other].cls.pipeline_class.__name__}: this script trains"):
        family.load(models[other])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sd"])
def test_a_resolution_that_does_not_fall_into_patches_is_refused(family, capsys):
    with pytest.raises(SystemExit):
        family.parse_args("unused", resolution=72)
    assert "--resolution must be a multiple of 16" in capsys.readouterr().err
    assert FAMILIES["sd"].parse_args("unused", resolution=72).resolution == 72


def test_one_source_of_pairs_is_named(family, capsys):
    cases = {
        "Name one source of pairs": [{"dataset_name": None}, {"dataset_path": "shards"}],
        "--cache_latents has no effect": [{"dataset_name": None, "dataset_path": "x", "cache_latents": True}],
        "--shuffle_buffer_size has no effect": [{"shuffle_buffer_size": 9}],
    }
    for message, mistakes in cases.items():
        for flags in mistakes:
            with pytest.raises(SystemExit):
                family.parse_args("unused", **flags)
            assert message in capsys.readouterr().err


def test_the_safety_checker_of_sd_1_5_is_not_needed(models, tmp_path):
    """It is named in the model's index and its files are absent, as where only the model was downloaded."""
    folder = shutil.copytree(models["sd"], tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["requires_safety_checker"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    assert FAMILIES["sd"].load(str(folder)).pipeline.safety_checker is None


def test_sd_predicts_what_its_scheduler_says(models, tmp_path):
    """2.1 has v-prediction, 1.5 epsilon; there, the target is the noise, for both images."""
    one_five = save_tiny("sd", tmp_path, prediction_type="epsilon")
    latents_w, latents_l, noise = torch.randn(3, 2, 4, 8, 8).unbind()
    timesteps = torch.tensor([10, 900])
    process = FAMILIES["sd"].load(one_five).noise_process
    assert torch.equal(process.target(latents_w, latents_l, noise, timesteps), noise)
    target_w, target_l = FAMILIES["sd"].load(models["sd"]).noise_process.target(latents_w, latents_l, noise, timesteps)
    assert not torch.equal(target_w, target_l)


@pytest.mark.parametrize("embeds", [True, False])
@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_a_transformer_is_told_the_guidance_that_its_pipeline_tells_it(name, embeds, models, tmp_path):
    """FLUX.1-dev takes one, FLUX.1-schnell doesn't, and klein's pipeline tells none to any."""
    folder = Path(shutil.copytree(models[name], tmp_path / "model"))
    pipeline = load_pipeline(str(folder))
    config = dict(pipeline.transformer.config) | {"guidance_embeds": embeds}
    pipeline.register_modules(transformer=type(pipeline.transformer).from_config(config))
    pipeline.save_pretrained(folder)
    family, told = FAMILIES[name], []
    loaded = family.load(str(folder), **{"guidance_scale": 2.5} if name == "flux" else {})
    for denoiser in (pipeline.transformer, loaded.denoiser):
        denoiser.register_forward_pre_hook(lambda _, args, given: told.append(given["guidance"]), with_kwargs=True)
    pipeline(prompt="a face", height=64, width=64, num_inference_steps=1, guidance_scale=2.5, **family.call_options)
    batch = {"moments": torch.zeros(2, 2 * loaded.vae.channels, 8, 8), "seeds": [1]}
    if name == "flux2":
        batch["moments"] = torch.zeros(2, 2 * loaded.latent_channels, 4, 4)
    losses, _, _ = compute_losses(STRENGTH, loaded, loaded.denoiser, batch | {"embeds": loaded.encode_prompts(["a"])})
    assert losses.isfinite().all()
    assert {None if value is None else value[0].item() for value in told} == {
        2.5 if name == "flux" and embeds else None
    }


def test_a_qwen_image_that_is_told_guidance_is_refused(models, tmp_path):
    folder = Path(shutil.copytree(models["qwen_image"], tmp_path / "model"))
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"guidance_embeds": True}))
    with pytest.raises(ValueError, match="is told a guidance scale"):
        FAMILIES["qwen_image"].cls.check(FAMILIES["qwen_image"].parse_args(str(folder)))
