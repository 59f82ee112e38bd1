"""--init_lora_weights: the run starts where the file is, whoever wrote it; what does not fit is refused before loading."""

import json
import shutil

import pytest
import torch
from families import FAMILIES, load_pipeline
from helpers import lora_weights, train, without_weights
from orpo.config import ModelConfig
from orpo.models.sdxl import StableDiffusionXL
from peft import get_peft_model_state_dict
from safetensors.torch import save_file


LAYERS = "to_q,to_out.0"
FILE = "pytorch_lora_weights.safetensors"


def options(base: str, source, **more) -> ModelConfig:
    return ModelConfig(
        pretrained_model_name_or_path=base,
        **{"lora_layers": LAYERS, "init_lora_weights": str(source), "rank": 3, "resolution": 64} | more,
    )


def load(cls, *args, **more):
    return cls.load(options(*args, **more), torch.device("cpu"), torch.float32, encoders=False)


def written(cls, base: str, folder, alpha: float = 6.0):
    """A family with a random LoRA, written to the folder in both formats."""
    model = load(cls, base, None, lora_alpha=alpha)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    folder.mkdir()
    model.save_lora(folder)
    model.save_for_other_programs(folder)
    return model


def updates(denoiser) -> dict[str, torch.Tensor]:
    """What the LoRA adds to each weight, whatever its factors and its alpha."""
    modules = [(name, module) for name, module in denoiser.named_modules() if hasattr(module, "lora_A")]
    return {name: module.get_delta_weight(next(iter(module.lora_A))) for name, module in modules}


def as_peft(model, folder) -> str:
    """As PEFT's own `save_pretrained` writes it, with alpha by pattern and rank-stabilized."""
    folder.mkdir()
    tensors = {f"base_model.model.{name}": value for name, value in get_peft_model_state_dict(model.denoiser).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"r": 3, "lora_alpha": 1.0, "use_rslora": True, "alpha_pattern": {"to_q|to_out.0": 6.0 / 3**0.5}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("name", ["sdxl", *FAMILIES])
def test_it_starts_with_the_strength_of_the_file_whatever_its_format_and_alpha(name, models, tmp_path):
    base = models[name]
    cls = StableDiffusionXL if name == "sdxl" else FAMILIES[name].cls
    original = written(cls, base, tmp_path / "lora")
    expected = updates(original.denoiser)
    peft = as_peft(original, tmp_path / "peft")
    for source in (tmp_path / "lora", tmp_path / "lora" / FILE, tmp_path / "lora" / "comfyui_lora.safetensors", peft):
        model = load(cls, base, source, lora_alpha=1.5)
        cls.check(model.options)
        model.start_from_initial_lora()
        torch.testing.assert_close(updates(model.denoiser), expected, rtol=1e-5, atol=1e-7)
        assert all(p.dtype == torch.float32 for p in model.denoiser.parameters() if p.requires_grad)
    pipeline = load_pipeline(base)
    pipeline.load_lora_weights(tmp_path / "lora")  # an oracle that reads the file by itself
    theirs = updates(getattr(pipeline, cls.denoiser_name))
    assert theirs.keys() == expected.keys()
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-7)


REFUSED = {
    "another rank": ({"rank": 4}, "has rank 3, and --rank=4: give --rank=3"),
    "fewer modules": ({"lora_layers": "to_q"}, "Give --lora_layers=to_out.0,to_q$"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_from_the_files_alone(case, tiny_sdxl, tmp_path):
    more, message = REFUSED[case]
    written(StableDiffusionXL, tiny_sdxl, tmp_path / "lora")
    base = without_weights(tiny_sdxl, tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        StableDiffusionXL.check(options(str(base), tmp_path / "lora", **more))


def test_the_advice_names_the_modules_of_the_file(tiny_sdxl, tmp_path):
    written(StableDiffusionXL, tiny_sdxl, tmp_path / "lora")
    with pytest.raises(ValueError, match="Give --lora_layers=") as error:
        StableDiffusionXL.check(options(tiny_sdxl, tmp_path / "lora", lora_layers="to_k"))
    layers = str(error.value).split("--lora_layers=")[-1]
    StableDiffusionXL.check(options(tiny_sdxl, tmp_path / "lora", lora_layers=layers))


def test_a_run_starts_from_it_and_a_resumed_one_does_not_need_it(tiny_sdxl, faces, tmp_path):
    flags = {"rank": 3, "lora_layers": LAYERS, "init_lora_weights": tmp_path / "lora", "checkpointing_steps": 1}
    written(StableDiffusionXL, tiny_sdxl, tmp_path / "lora", alpha=3.0)
    still = train(tiny_sdxl, faces, tmp_path / "still", max_train_steps=1, learning_rate=0.0, **flags)
    torch.testing.assert_close(still, lora_weights(tmp_path / "lora"))
    whole = train(tiny_sdxl, faces, tmp_path / "whole", max_train_steps=2, **flags)
    train(tiny_sdxl, faces, tmp_path / "parts", max_train_steps=1, **flags)
    shutil.rmtree(tmp_path / "lora")
    resumed = train(tiny_sdxl, faces, tmp_path / "parts", max_train_steps=2, resume_from_checkpoint="latest", **flags)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    assert max((whole[name] - still[name]).abs().max() for name in whole) > 1e-4
    assert "- init_lora_weights: " in (tmp_path / "whole" / "README.md").read_text()
