"""The loss in trainers that others wrote, as docs/plug_in.md shows it: its blocks are what runs here."""

import copy
import functools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from accelerate import Accelerator
from PIL import Image, ImageOps
from plug_in.scripts import apply_diff, current_script, functions, packaged_script, training_step

from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from faces import ALL_KINDS, draw_face
from tiny_sd import build_tiny_sd


DOC = (Path(__file__).parents[2] / "docs" / "plug_in.md").read_text()
STEPS, BETA = 32, 0.1


def block(heading: str) -> str:
    """The block of code under a heading of the page."""
    section = DOC.split(f"## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```(?:python|diff)\n(.*?)```", section, flags=re.DOTALL)
    return code


@pytest.fixture
def names() -> dict:
    """What the page takes for granted: U-Net, scheduler, loader; and its `orpo_step`."""
    names = {"unet": build_unet(), "scheduler": DDPMScheduler(), "loader": load(pairs(0))}
    exec(block("The step"), names)
    return names


def build_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    )


def pairs(seed: int, steps: int = STEPS, size: int = 4) -> list[dict]:
    """Batches in which the winners vary around one image, and the losers around another."""
    image_w, image_l = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "latents_w": image_w + 0.1 * torch.randn(size, 4, 8, 8, generator=generator),
            "latents_l": image_l + 0.1 * torch.randn(size, 4, 8, 8, generator=generator),
            "prompt_embeds": torch.randn(size, 5, 16, generator=generator),
        }
        for _ in range(steps)
    ]


def load(batches: list[dict]) -> torch.utils.data.DataLoader:
    """The same batches from a loader, which draws no random numbers of the step's."""
    rows = [dict(zip(batch, row)) for batch in batches for row in zip(*batch.values())]
    return torch.utils.data.DataLoader(rows, batch_size=4, generator=torch.Generator())


def direct_objective(error_w: torch.Tensor, error_l: torch.Tensor, beta: float = BETA) -> torch.Tensor:
    """ORPO from its definition, in float64: fit the winner; log sigmoid of the log odds ratio."""
    error_w, error_l = error_w.double(), error_l.double()
    odds_w, odds_l = (torch.exp(-error) / (1 - torch.exp(-error)) for error in (error_w, error_l))
    return (error_w + beta * torch.log(1 + odds_l / odds_w)).mean()


def direct_loss(unet, scheduler, batch) -> torch.Tensor:
    """The step without the page: each image in a call of its own."""
    noise = torch.randn_like(batch["latents_w"])
    timesteps = torch.randint(1000, (len(noise),))
    errors = []
    for latents in (batch["latents_w"], batch["latents_l"]):
        model_pred = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, batch["prompt_embeds"]).sample
        errors.append((model_pred - noise).square().mean(dim=(1, 2, 3)))
    return direct_objective(*errors)


def train_directly(batches: list[list[dict]]) -> UNet2DConditionModel:
    """Trains a U-Net without the page, as many processes would: a list of batches, and random numbers, for each."""
    unet, scheduler = build_unet(), DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)
    states = []
    for rank in range(len(batches)):
        torch.manual_seed(rank)
        states.append(torch.get_rng_state())
    for step in zip(*batches):
        for rank, batch in enumerate(step):
            torch.set_rng_state(states[rank])
            (direct_loss(unet, scheduler, batch) / len(step)).backward()
            states[rank] = torch.get_rng_state()
        optimizer.step()
        optimizer.zero_grad()
    return unet


@torch.no_grad()
def error_margin(unet) -> torch.Tensor:
    """By how much the losers' errors exceed the winners' on new pairs, shape (64,): above 0 where the winner is preferred."""
    (batch,), scheduler = pairs(1, steps=1, size=64), DDPMScheduler()
    generator = torch.Generator().manual_seed(2)
    noise, timesteps = torch.randn(64, 4, 8, 8, generator=generator), torch.arange(64) * 15
    errors = [
        (unet(scheduler.add_noise(latents, noise, timesteps), timesteps, batch["prompt_embeds"]).sample - noise)
        .square()
        .mean(dim=(1, 2, 3))
        for latents in (batch["latents_w"], batch["latents_l"])
    ]
    return errors[1] - errors[0]


def assert_aligned(unet) -> None:
    """The trained U-Net prefers winners that it has not seen; one that is not trained does not."""
    before, after = ((error_margin(model) > 0).float().mean() for model in (build_unet(), unet))
    assert before < 0.7
    assert after > 0.85


def assert_same_weights(unet, expected, atol: float = 2e-4) -> None:
    for name, parameter in unet.state_dict().items():
        torch.testing.assert_close(
            parameter, expected.state_dict()[name], rtol=0, atol=atol, msg=lambda m: f"{name}: {m}"
        )


def test_the_step_of_the_page_has_the_gradients_of_a_direct_loop(names):
    (batch,) = pairs(3, steps=1)
    torch.manual_seed(5)
    loss, metrics = names["orpo_step"](names["unet"], names["scheduler"], batch)
    loss.backward()
    unet = build_unet()
    torch.manual_seed(5)
    expected = direct_loss(unet, names["scheduler"], batch)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected)
    for parameter, other in zip(names["unet"].parameters(), unet.parameters()):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-5)
    z, margin = metrics["log_odds_chosen"], metrics["logps/chosen"] - metrics["logps/rejected"]
    assert torch.equal(z > 0, margin > 0) and margin.abs().min() > 0


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_lightning(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(block("Lightning"), names)
    assert_aligned(names["unet"])
    assert_same_weights(names["unet"], train_directly([pairs(0)]))
    assert names["trainer"].global_step == STEPS


def train_under_fsdp(rank: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    names = {"unet": build_unet(), "scheduler": DDPMScheduler(), "loader": load(pairs(10 + rank))}
    exec(block("The step"), names)
    torch.manual_seed(rank)
    exec(block("A plain loop under FSDP2"), names)
    local = sum(parameter.to_local().numel() for parameter in names["unet"].parameters())
    whole = {name: value.full_tensor() for name, value in names["unet"].state_dict().items()}
    if rank == 0:
        torch.save({"world_size": dist.get_world_size(), "local": local, "weights": whole}, result)
    dist.barrier()
    dist.destroy_process_group()


def test_fsdp_with_two_processes_trains_the_weights_of_one_process(tmp_path):
    arguments = (str(tmp_path / "store"), str(tmp_path / "result"))
    torch.multiprocessing.start_processes(train_under_fsdp, arguments, nprocs=2, start_method="spawn")
    result = torch.load(tmp_path / "result")
    expected = train_directly([pairs(10), pairs(11)])
    trained = build_unet()
    trained.load_state_dict(result["weights"])
    assert result["world_size"] == 2
    size = sum(parameter.numel() for parameter in trained.parameters())
    assert result["local"] < 0.7 * size  # a process holds its share
    assert_same_weights(trained, expected)
    assert_aligned(trained)


def test_a_compiled_step(names, monkeypatch):
    """The backend writes no C++ here: for this U-Net that takes minutes on a CPU. The graph is the same."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    exec(block("torch.compile"), names)
    assert_same_weights(names["unet"], train_directly([pairs(0)]))
    assert_aligned(names["unet"])


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory, demo_base) -> str:
    """Folder of a Stable Diffusion with a random U-Net and a trained VAE."""
    folder = tmp_path_factory.mktemp("tiny-sd")
    vae = AutoencoderKL.from_pretrained(demo_base, subfolder="vae", dtype=torch.float32)
    build_tiny_sd(["red", "ball", "face"], vae, channels=(16, 32), prediction_type="epsilon").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["packaged", "current"])
def lora_script(request, tmp_path_factory) -> str:
    """Source of diffusers' text-to-image LoRA script, with the page's change."""
    source = packaged_script(tmp_path_factory.mktemp("wheel")) if request.param == "packaged" else current_script()
    return apply_diff(source, block("diffusers' text-to-image LoRA script"))


def to_pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def face_pairs(kinds: list) -> dict[str, list]:
    """Columns of a dataset of pairs: faces, and their negatives."""
    faces = [draw_face(kind, 0.9) for kind in kinds]
    return {
        "chosen": faces,
        "rejected": [ImageOps.invert(face) for face in faces],
        "prompt": ["red ball"] * len(kinds),
    }


def test_diffusers_lora_step_has_the_gradients_of_a_direct_loop(lora_script, tiny_sd):
    """The script's own data preparation and step, changed as the page says: SGD moves weights by their gradient."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    unet, scheduler = pipeline.unet, DDPMScheduler.from_pretrained(tiny_sd, subfolder="scheduler")
    start = copy.deepcopy(unet)
    optimizer = torch.optim.SGD(unet.parameters(), lr=1.0)
    names = {
        "args": SimpleNamespace(
            gradient_accumulation_steps=1,
            max_grad_norm=1e9,
            noise_offset=0,
            prediction_type=None,
            snr_gamma=None,
            train_batch_size=2,
            train_text_encoder=False,
            use_peft=True,
        ),
        "accelerator": Accelerator(cpu=True),
        "caption_column": "prompt",
        "image_column": "chosen",
        "lora_layers": list(unet.parameters()),
        "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        "noise_scheduler": scheduler,
        "optimizer": optimizer,
        "text_encoder": pipeline.text_encoder,
        "tokenizer": pipeline.tokenizer,
        "train_loss": 0.0,
        "train_transforms": to_pixels,
        "unet": unet,
        "vae": pipeline.vae,
        "weight_dtype": torch.float32,
    }
    exec("import torch, torch.nn.functional as F\nfrom diffusion_orpo_loss import orpo_loss", names)
    exec(
        compile(functions(lora_script, {"preprocess_train", "tokenize_captions", "collate_fn"}), "script", "exec"),
        names,
    )
    columns = names["preprocess_train"](face_pairs(ALL_KINDS[:3]))
    names["batch"] = names["collate_fn"]([dict(zip(columns, row)) for row in zip(*columns.values())])
    torch.manual_seed(4)
    exec(compile(training_step(lora_script), "script", "exec"), names)

    faces = face_pairs(ALL_KINDS[:3])
    torch.manual_seed(4)
    with torch.no_grad():
        pixels = torch.stack([to_pixels(image) for image in faces["chosen"] + faces["rejected"]])
        latents = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
        embeds, _ = pipeline.encode_prompt(faces["prompt"], "cpu", 1, do_classifier_free_guidance=False)
    noise = torch.randn(3, 4, 8, 8)
    timesteps = torch.randint(0, 1000, (6,))[:3]
    errors = []
    for clean in latents.chunk(2):
        model_pred = start(scheduler.add_noise(clean, noise, timesteps), timesteps, embeds).sample
        errors.append((model_pred - noise).square().mean(dim=(1, 2, 3)))
    expected = direct_objective(*errors)
    expected.backward()
    torch.testing.assert_close(names["loss"].double(), expected)
    for (name, moved), parameter in zip(unet.named_parameters(), start.parameters()):
        torch.testing.assert_close(
            parameter - moved, parameter.grad, rtol=1e-2, atol=1e-5, msg=lambda m: f"{name}: {m}"
        )
