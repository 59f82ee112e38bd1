"""LoRA files of other programs: their effect is that of the file, or one sentence says what they are."""

import json

import pytest
import torch
from families import FAMILIES
from orpo.config import ModelConfig
from orpo.models.lora_files import check_all_loaded, find_misfit, read_initial_lora, read_lora_file
from orpo.models.sdxl import StableDiffusionXL
from safetensors.torch import load_file, save_file

from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel


ALL = ["sdxl", *FAMILIES]


@pytest.fixture(scope="module")
def opened(models):
    """By name, a tiny model of a family of which only the configuration is read, with LoRA layers in every kind of place."""
    opened = {}

    def open_(name: str):
        if name not in opened:
            cls = StableDiffusionXL if name == "sdxl" else FAMILIES[name].cls
            layers = "to_q,to_k,to_out.0" + (",conv1,proj_in,time_emb_proj" if cls.denoiser_name == "unet" else "")
            layers += ",single_transformer_blocks.*.attn.to_out" if name == "flux2" else ""
            options = ModelConfig(
                pretrained_model_name_or_path=models[name], rank=2, lora_alpha=3, lora_layers=layers, resolution=64
            )
            opened[name] = cls(options, torch.device("cpu"), torch.float32)
        return opened[name]

    return open_


def random_lora(model) -> dict[str, torch.Tensor]:
    """Random factors of a LoRA of rank 2 in PEFT's names, without a prefix."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in model.options.lora_layer_names:
        for name, module in model.empty_denoiser.named_modules():
            stem = layer.split("*")[0]
            fits = (
                name.startswith(stem) and name.endswith(".attn.to_out") if "*" in layer else name.endswith("." + layer)
            )
            if fits:
                out, *rest = module.weight.shape
                tensors[f"{name}.lora_A.weight"] = torch.randn(2, *rest, generator=generator)
                tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2, *[1] * (len(rest) - 1), generator=generator)
    return tensors


def effect(tensors: dict[str, torch.Tensor], scale) -> dict[str, torch.Tensor]:
    """What a LoRA adds to each weight: an oracle from the tensors alone."""
    modules = {name.split(".lora_")[0] for name in tensors}
    return {
        module: scale(module)
        * (tensors[f"{module}.lora_B.weight"].flatten(1) @ tensors[f"{module}.lora_A.weight"].flatten(1))
        for module in modules
    }


def read(model, file, **more) -> dict[str, torch.Tensor]:
    options = model.options.replace(**{"init_lora_weights": str(file)} | more)
    return read_initial_lora(options, model.pipeline_class, model.denoiser_name, model.empty_denoiser)


def prefixed(prefix: str, tensors: dict, a: str = "lora_A", b: str = "lora_B") -> dict:
    return {prefix + name.replace("lora_A", a).replace("lora_B", b): value for name, value in tensors.items()}


def alphas(prefix: str, tensors: dict) -> tuple[dict, dict]:
    """Tensors of alphas, another for each module, and the scales that they mean at rank 2."""
    modules = sorted({name.split(".lora_")[0] for name in tensors})
    values = {module: float(i % 5 + 1) for i, module in enumerate(modules)}
    tensors = {f"{prefix}{module}.alpha": torch.tensor(value) for module, value in values.items()}
    return tensors, {module: value / 2 for module, value in values.items()}


def flat(prefix: str, tensors: dict) -> dict:
    """kohya's rule: underscores in place of the dots of a module's name."""
    modules = {name: name.split(".lora_")[0] if ".lora_" in name else name.rsplit(".", 1)[0] for name in tensors}
    return {prefix + m.replace(".", "_") + name.removeprefix(m): tensors[name] for name, m in modules.items()}


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("writing", ["transformer.", "diffusion_model.", "base_model.model.", "down and up", "flat"])
@pytest.mark.parametrize("name", ALL)
def test_every_programs_names_have_the_effect_of_the_file(name, writing, alpha, opened, tmp_path):
    model = opened(name)
    tensors = random_lora(model)
    values, scales = (
        alphas("", tensors) if alpha else ({}, dict.fromkeys((n.split(".lora_")[0] for n in tensors), 1.0))
    )
    if writing == "flat":
        prefix = "lora_unet_" if model.denoiser_name == "unet" else "lora_transformer_"
        written = flat(prefix, prefixed("", tensors, "lora_down", "lora_up") | values)
    elif writing == "down and up":
        written = prefixed("diffusion_model.", tensors | values, "lora_down", "lora_up")
    else:
        prefix = writing.replace("transformer", model.denoiser_name) if writing == "transformer." else writing
        written = prefixed(prefix, tensors | values)
    save_file({key: value.contiguous() for key, value in written.items()}, tmp_path / "lora.safetensors")
    got = read(model, tmp_path / "lora.safetensors")
    torch.testing.assert_close(effect(got, lambda _: 3 / 2), effect(tensors, scales.get), rtol=1e-5, atol=1e-5)


def test_original_names_of_sdxl_are_renamed_by_diffusers(tmp_path):
    """kohya's `lora_unet_input_blocks_...` and ComfyUI's `diffusion_model.input_blocks...`, which say the same module."""
    with torch.device("meta"):
        denoiser = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64),
        )
    block = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    own = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {"lora_down.weight": torch.randn(2, 8), "lora_up.weight": torch.randn(8, 2), "alpha": torch.tensor(1.0)}
    for prefix, module in (("lora_unet_", block.replace(".", "_")), ("diffusion_model.", block)):
        save_file({f"{prefix}{module}.{part}": value for part, value in factors.items()}, tmp_path / "x.safetensors")
        lora = read_lora_file("--x", str(tmp_path / "x.safetensors"), StableDiffusionXLPipeline, denoiser)
        assert [*lora.layers] == [own] and not lora.unknown
        layer = lora.layers[own]
        torch.testing.assert_close([layer.a, layer.b, torch.tensor(layer.alpha)], [*factors.values()])


def test_linear_factors_stored_as_convolutions_are_reshaped(opened, tmp_path):
    model = opened("sd3")
    tensors = random_lora(model)
    save_file(
        prefixed("transformer.", {n: v[..., None, None] for n, v in tensors.items()}), tmp_path / "x.safetensors"
    )
    got = read(model, tmp_path / "x.safetensors", lora_alpha=2)
    torch.testing.assert_close(got, tensors)


KINDS = {
    "hada_w1_a": "is a LoHa",
    "lokr_w1": "is a LoKr",
    "dora_scale": "is a DoRA",
    "lora_magnitude_vector.weight": "is a DoRA",
    "lora_mid.weight": "is a LoCon with a Tucker decomposition",
    "diff": "is a difference of whole weights",
    "oft_blocks": "is an OFT",
    "lora_B.bias": "is a LoRA with biases",
    "something.weight": "not a plain LoRA",
}


@pytest.mark.parametrize("name", ["sdxl", "flux", "qwen_image"])
@pytest.mark.parametrize("key", KINDS)
def test_what_is_no_plain_lora_is_called_by_its_name(key, name, opened, tmp_path):
    model = opened(name)
    module = next(iter(random_lora(model))).split(".lora_")[0]
    for prefix, middle in (("lora_unet_", module.replace(".", "_")), (f"{model.denoiser_name}.", module)):
        tensors = flat("lora_unet_", prefixed("", random_lora(model), "lora_down", "lora_up"))
        save_file(tensors | {f"{prefix}{middle}.{key}": torch.ones(2, 2)}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=KINDS[key]) as error:
            read(model, tmp_path / "x.safetensors")
        assert "x.safetensors" in str(error.value) and len(str(error.value)) < 400


DAMAGED = {
    "half of a module": (lambda x: dict([*x.items()][1:]), "is damaged: of"),
    "another width": (lambda x: {n: v[:, :1] if "lora_A" in n else v for n, v in x.items()}, "has a weight of shape"),
    "transposed": (lambda x: {n: v.mT if "lora_B" in n else v for n, v in x.items()}, "has a weight of shape"),
    "two ranks": (
        lambda x: {
            n: torch.cat([v, v], int("lora_B" in n)) if n.startswith(min(x)[:-13]) else v for n, v in x.items()
        },
        "has rank 2 and 4, and --rank=2: this script trains one rank",
    ),
    "a text encoder": (lambda x: x | {"text_encoder.q.lora_A.weight": torch.ones(2, 2)}, "text encoder too"),
    "only a text encoder": (
        lambda x: {"lora_te1_q.lora_down.weight": torch.ones(2, 2)},
        "holds no LoRA of the denoiser",
    ),
    "other modules": (lambda x: {f"x.{n}": v for n, v in x.items()}, r"another model: (\d+) of its \1 modules"),
    "nothing": (lambda x: {}, "holds no LoRA"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_does_not_fit_says_what_it_is(case, opened, tmp_path):
    change, message = DAMAGED[case]
    model = opened("sd3")
    save_file({n: v.contiguous() for n, v in change(random_lora(model)).items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        read(model, tmp_path / "x.safetensors")


def test_a_pickle_that_is_no_lora_is_refused(opened, tmp_path):
    for name, content in (("x.bin", b"no pickle"), ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} can't be read as a LoRA"):
            read(opened("sd3"), tmp_path / name)


def test_a_lora_of_which_diffusers_would_drop_a_part_is_refused(tiny_sdxl, opened, tmp_path):
    """A file with two naming schemes, as diffusers' own converter writes them: only one of them is loaded."""
    model, pipeline = opened("sdxl"), StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    tensors = prefixed("unet.", random_lora(model))
    for mixed in (False, True):
        if mixed:
            tensors = {
                n.replace("to_q.lora_A", "to_q.lora.down").replace("to_q.lora_B", "to_q.lora.up"): v
                for n, v in tensors.items()
            }
            tensors = dict(sorted(tensors.items(), key=lambda item: "lora.down" not in item[0]))
        save_file(tensors, tmp_path / "x.safetensors")
        lora = read_lora_file(
            "--lora_weights=x", str(tmp_path / "x.safetensors"), model.pipeline_class, model.empty_denoiser
        )
        assert len(lora.layers) == len(tensors) / 2 and find_misfit("--lora_weights=x", lora, "unet", "m") is None
        pipeline.unload_lora_weights()
        pipeline.load_lora_weights({n: v.clone() for n, v in load_file(tmp_path / "x.safetensors").items()})
        if mixed:
            with pytest.raises(ValueError, match=rf"takes only \d+ of its {len(lora.layers)} modules"):
                check_all_loaded("--lora_weights=x", lora, pipeline.unet)
        else:
            check_all_loaded("--lora_weights=x", lora, pipeline.unet)


def test_the_identity_is_the_content_and_not_the_name(opened, tmp_path):
    model = opened("sdxl")
    tensors, digests = prefixed("unet.", random_lora(model)), {}
    values = {"unet.lora_alpha": 4, "unet.r": 2}
    changed = tensors | {min(tensors): tensors[min(tensors)] + 1e-3}
    for name, content, metadata in (
        ("same", tensors, values),
        ("copy", tensors, values),
        ("alpha", tensors, values | {"unet.lora_alpha": 2}),
        ("changed", changed, values),
    ):
        text = {"format": "pt", "written": name, "lora_adapter_metadata": json.dumps(metadata)}
        save_file(content, tmp_path / f"{name}.safetensors", metadata=text)
        source = str(tmp_path / f"{name}.safetensors")
        digests[name] = read_lora_file("--x", source, model.pipeline_class, model.empty_denoiser).digest
    assert digests["copy"] == digests["same"] and len(set(digests.values())) == 3
