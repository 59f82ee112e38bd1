"""The training step in the open, without the loop."""

from functools import partialmethod
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusion_orpo_loss import odds_ratio_objective
from helpers import arguments, train
from orpo.cli import encode_pairs
from orpo.config import LossConfig
from orpo.models.latent_diffusion import advise_tf32
from orpo.models.sdxl import StableDiffusionXL
from orpo.pairs.dataset import DataOptions, load_pairs
from orpo.training.metrics import Window
from orpo.training.optimizer import make_optimizer
from orpo.training.step import compute_losses
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers import UNet2DConditionModel
from train_diffusion_orpo_sdxl_lora import parse_args


@pytest.fixture
def setup(tiny_sdxl, faces):
    """Model, flags and one batch of 4 pairs."""

    def make(**flags):
        args = parse_args(arguments(tiny_sdxl, faces, "unused", **flags))
        model = StableDiffusionXL.load(args, torch.device("cpu"), torch.float32)
        data = load_pairs(DataOptions.from_config(args))
        batch = next(iter(data.training_batches(4, seed=0, position=None, rank=0, world_size=1)))
        return args, model, batch

    return make


class Recorder:
    """Stands where the U-Net stands, keeps its input and answers with a function of it."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, sample, timesteps, encoder_hidden_states, added_cond_kwargs, return_dict):
        self.sample, self.timesteps, self.text, self.added = (
            sample,
            timesteps,
            encoder_hidden_states,
            added_cond_kwargs,
        )
        return (self.answer(self),)


def test_both_images_of_a_pair_share_noise_timestep_and_prompt(setup):
    """The same image on both sides makes both halves of the U-Net's one batch equal, and z zero."""
    args, model, batch = setup()
    batch["pixel_values"] = batch["pixel_values"][:4].repeat(2, 1, 1, 1)
    for name in ("original_sizes", "crop_top_lefts"):
        batch[name] = batch[name][:4].repeat(2, 1)
    model.pipeline.vae.encode = lambda x: SimpleNamespace(
        latent_dist=SimpleNamespace(parameters=x[:, :1, ::8, ::8].repeat(1, 8, 1, 1) - 40)
    )  # of no variance: one generator serves both images of a pair, which draw different samples
    unet = Recorder(lambda call: torch.zeros_like(call.sample))
    _, metrics, timesteps = compute_losses(args, model, unet, batch)
    for value in (unet.sample, unet.timesteps, unet.text, *unet.added.values()):
        assert torch.equal(value[:4], value[4:])
    assert torch.equal(unet.timesteps[:4], timesteps)
    assert torch.equal(metrics["log_odds_chosen"], torch.zeros(4))


def test_pairs_of_a_batch_get_different_noise_and_timesteps(setup):
    args, model, batch = setup()
    unet = Recorder(lambda call: torch.zeros_like(call.sample))
    model.sample_latents = lambda moments, generators: torch.zeros(8, 4, 8, 8)
    compute_losses(args, model, unet, batch)
    assert len(unet.timesteps[:4].unique()) == 4
    noise = unet.sample[:4].flatten(1)
    assert torch.corrcoef(noise).triu(1).abs().max() < 0.3


def test_randomness_is_the_pairs_own(setup):
    """A pair has the same loss in any batch: alone, or among others."""
    args, model, batch = setup()
    losses, _, timesteps = compute_losses(args, model, model.denoiser, batch)
    for i in range(4):
        alone = {name: batch[name][i::4] for name in ("pixel_values", "original_sizes", "crop_top_lefts")}
        alone |= {name: batch[name][i : i + 1] for name in ("prompts", "seeds")}
        loss, _, timestep = compute_losses(args, model, model.denoiser, alone)
        assert timestep == timesteps[i]
        torch.testing.assert_close(loss[0], losses[i], rtol=1e-5, atol=1e-6)


def test_epsilon_prediction_is_judged_by_the_shared_noise(setup):
    """A U-Net that knows winner's latents and schedule can name the noise: its winner's error is 0."""
    args, model, batch = setup()
    latents = torch.randn(8, 4, 8, 8)
    model.sample_latents = lambda moments, generators: latents
    alphas = model.noise_process.scheduler.alphas_cumprod.double()

    def true_noise(call):
        a = alphas[call.timesteps].view(-1, 1, 1, 1)
        return ((call.sample - a.sqrt() * latents) / (1 - a).sqrt()).float()

    _, metrics, _ = compute_losses(args, model, Recorder(true_noise), batch)
    assert metrics["logps/chosen"].abs().max() < 1e-8
    assert metrics["logps/rejected"].abs().max() < 1e-8


def test_v_prediction_has_a_target_for_each_image(setup):
    """v = sqrt(a) noise - sqrt(1 - a) latents, arXiv 2202.00512: a U-Net that gives each image its own v is right."""
    args, model, batch = setup(prediction_type="v_prediction")
    latents = torch.randn(8, 4, 8, 8)
    model.sample_latents = lambda moments, generators: latents
    alphas = model.noise_process.scheduler.alphas_cumprod.double()

    def true_velocity(call):
        a = alphas[call.timesteps].view(-1, 1, 1, 1)
        noise = (call.sample - a.sqrt() * latents) / (1 - a).sqrt()
        return (a.sqrt() * noise - (1 - a).sqrt() * latents).float()

    _, metrics, _ = compute_losses(args, model, Recorder(true_velocity), batch)
    assert metrics["logps/chosen"].abs().max() < 1e-8
    assert metrics["logps/rejected"].abs().max() < 1e-8


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_by_the_schedules_betas(setup, prediction_type):
    _, model, _ = setup(prediction_type=prediction_type, snr_gamma=5.0)
    timesteps = torch.tensor([0, 10, 300, 999])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # SDXL's schedule
    alphas = (1 - betas).cumprod(0)[timesteps]
    snr = alphas / (1 - alphas)
    expected = torch.minimum(snr, torch.tensor(5.0)) / (snr if prediction_type == "epsilon" else snr + 1)
    weights = model.noise_process.weights(timesteps)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-3, atol=0)


def test_snr_gamma_weighs_the_loss(setup):
    args, model, batch = setup(snr_gamma=5.0)
    weighted, metrics, timesteps = compute_losses(args, model, model.denoiser, batch)
    weights = model.noise_process.weights(timesteps)
    model.noise_process.snr_gamma = None
    plain, same_metrics, _ = compute_losses(args, model, model.denoiser, batch)
    torch.testing.assert_close(weighted, plain * weights)
    torch.testing.assert_close(metrics, same_metrics)
    assert not torch.allclose(weighted, plain)


def test_beta_weighs_the_odds_ratio(setup):
    args, model, batch = setup(beta_orpo=0.0)
    losses, metrics, _ = compute_losses(args, model, model.denoiser, batch)
    assert torch.equal(losses, metrics["nll_loss"])
    losses, metrics, _ = compute_losses(args.replace(beta_orpo=2.0), model, model.denoiser, batch)
    torch.testing.assert_close(losses, metrics["nll_loss"] - 2.0 * metrics["log_odds_ratio"])


def test_a_run_starts_with_a_share_unless_a_beta_is_given():
    def strength(**given: float) -> tuple[float | None, float | None]:
        config = LossConfig(**given)
        return config.beta_orpo, config.loser_share

    assert strength() == (None, 0.375)
    assert strength(beta_orpo=0.0) == (0.0, None)
    assert strength(loser_share=0.2) == (None, 0.2)


def test_share_and_temperature_are_those_of_the_loss(setup, tiny_sdxl, faces, tmp_path):
    _, model, batch = setup()
    strength = LossConfig(loser_share=0.3, odds_temperature=4.0)
    losses, metrics, _ = compute_losses(strength, model, model.denoiser, batch)
    errors = -metrics["logps/chosen"], -metrics["logps/rejected"]
    expected = odds_ratio_objective(*errors, loser_share=0.3, temperature=4.0, reduction="none")
    torch.testing.assert_close(losses, expected)
    one, four = (
        train(tiny_sdxl, faces, tmp_path / str(t), max_train_steps=2, beta_orpo=2, odds_temperature=t, seed=0)
        for t in (1, 4)
    )
    assert any(not torch.equal(one[name], four[name]) for name in one)


def test_the_optimizer_gets_its_flags(tiny_sdxl, faces):
    args = parse_args(arguments(tiny_sdxl, faces, "unused", learning_rate=3e-4, adam_weight_decay=0.3))
    parameter = torch.nn.Parameter(torch.ones(4096))
    (group,) = make_optimizer(args, [parameter]).param_groups
    assert (group["lr"], group["weight_decay"]) == (3e-4, 0.3)
    args = parse_args(arguments(tiny_sdxl, faces, "unused", optimizer="AdamW8bit"))
    optimizer = make_optimizer(args, [parameter])
    assert type(optimizer).__name__ == "AdamW8bit"
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert (parameter < 1).all()
    assert any(state.dtype == torch.uint8 for state in optimizer.state[parameter].values() if torch.is_tensor(state))


class HostReads(TorchDispatchMode):
    """Counts the operations that hand a tensor's value to Python: on a GPU the host waits for each."""

    names = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim")
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name.removeprefix("aten::") in self.names
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags", [{}, {"snr_gamma": 5.0, "prediction_type": "v_prediction"}])
def test_a_micro_step_never_waits_for_the_device(setup, flags):
    args, model, batch = setup(**flags)
    window = Window()
    with HostReads() as reads:
        losses, metrics, timesteps = compute_losses(args, model, model.denoiser, batch)
        losses.mean().backward()
        window.add(losses, metrics, timesteps)
        assert reads.count == 0
        losses.mean().item()
        assert reads.count == 1  # it does count


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("cached", [False, True])
def test_a_micro_step_never_waits_for_cuda(tiny_sdxl, faces, tmp_path, cached):
    flags = {"cache_latents": cached, "cache_dir": tmp_path}
    args = parse_args(arguments(tiny_sdxl, faces, tmp_path, **flags))
    accelerator = Accelerator(mixed_precision="fp16")
    data = load_pairs(DataOptions.from_config(args))
    if cached:
        data = encode_pairs(data, args, accelerator, StableDiffusionXL, torch.float16)
    model = StableDiffusionXL.load(args, accelerator.device, torch.float16, encoders=not cached)
    batches = iter(data.training_batches(4, seed=0, position=None, rank=0, world_size=1))
    for mode in ("default", "error"):  # the first step may copy schedules
        batch = next(batches)
        torch.cuda.set_sync_debug_mode(mode)
        losses, metrics, timesteps = compute_losses(args, model, model.denoiser, batch)
        losses.mean().backward()
        Window().add(losses, metrics, timesteps)
        torch.cuda.set_sync_debug_mode("default")


def test_images_and_prompts_are_encoded_once_a_step(setup):
    """4 pairs are 8 images in one call of the denoiser, and 4 prompts."""
    args, model, batch = setup()
    seen = {"prompts": [], "images": 0, "denoiser": []}
    encode_images, encode_prompts = model.encode_images, model.encode_prompts
    model.encode_prompts = lambda prompts: seen["prompts"].append(len(prompts)) or encode_prompts(prompts)
    model.encode_images = lambda pixels: seen.update(images=seen["images"] + len(pixels)) or encode_images(pixels)

    def denoiser(sample, *args, **kwargs):
        seen["denoiser"].append(len(sample))
        return model.denoiser(sample, *args, **kwargs)

    compute_losses(args, model, denoiser, batch)
    assert seen == {"prompts": [4], "images": 8, "denoiser": [8]}


def test_compiled_blocks_compute_the_same(setup, monkeypatch):
    """With the compiler's own first half, which traces forward and backward; its second half compiles C++ for minutes."""
    compile_blocks = partialmethod(UNet2DConditionModel.compile_repeated_blocks, backend="aot_eager")
    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", compile_blocks)
    args, model, batch = setup()
    torch.manual_seed(0)
    _, compiled, _ = setup(compile=True)
    compiled.denoiser.load_state_dict(model.denoiser.state_dict())
    blocks = [module for module in compiled.denoiser.modules() if module._compiled_call_impl is not None]
    assert {type(block).__name__ for block in blocks} == {"BasicTransformerBlock"}
    gradients = []
    for either in (model, compiled):
        losses, _, _ = compute_losses(args, either, either.denoiser, batch)
        losses.mean().backward()
        gradients.append([p.grad for p in either.denoiser.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "dtype, device, allow, capability, is_given",
    [
        (torch.float32, "cuda", False, (8, 0), True),
        (torch.float32, "cuda", True, (8, 0), False),
        (torch.float32, "cuda", False, (7, 5), False),  # has no TF32
        (torch.float16, "cuda", False, (9, 0), False),
        (torch.float32, "cpu", False, (9, 0), False),
    ],
)
def test_tf32_advice(monkeypatch, caplog, dtype, device, allow, capability, is_given):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allow))
    advise_tf32(dtype, torch.device(device))
    assert ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE" in caplog.text) == is_given


def test_lora_dropout_acts_in_every_step_and_in_no_validation(tiny_sdxl, faces, tmp_path, monkeypatch):
    seen, predict = [], StableDiffusionXL.predict

    def record(self, *args):
        seen.append((torch.is_grad_enabled(), self.denoiser.training))
        return predict(self, *args)

    monkeypatch.setattr(StableDiffusionXL, "predict", record)
    flags = {"run_validation": True, "validation_steps": 1, "num_validation_pairs": 2, "validation_prompts": "a"}
    train(tiny_sdxl, faces, tmp_path, max_train_steps=3, validation_inference_steps=1, **flags)
    steps, validation = (True, True), (False, False)
    assert [mode for mode, _ in groupby(seen)] == [validation, *[steps, validation] * 3]  # the base first
