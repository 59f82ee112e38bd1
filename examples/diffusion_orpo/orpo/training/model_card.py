"""The README.md of a trained LoRA: what it is, how it was trained, what was measured, and how to use it."""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from diffusers.utils.hub_utils import populate_model_card

from .protocols import ModelFamily
from .run import Run
from .validation import ValidationResults


def save_model_card(
    run: Run, model: ModelFamily, data: str, steps: int, results: ValidationResults | None, folder: Path
) -> None:
    """Writes README.md and the validation images.

    Args:
        run: the `Run`.
        model: the model family, for tags, license and the inference snippet.
        data: describes the training pairs.
        steps: optimizer steps trained.
        results: of the validation, if one was run.
        folder: gets the files.
    """
    config, lora = run.config, run.hub_repository or str(run.output_dir.resolve())
    prompts = [_one_line(prompt) for prompt in config.validation_prompts for _ in range(config.num_validation_images)]
    gallery = _save_images(folder, results) if results else []
    base_model, dataset_name = config.pretrained_model_name_or_path, config.dataset_name
    card_data = ModelCardData(
        license=model.license,
        library_name="diffusers",
        base_model=None if Path(base_model).exists() else base_model,
        datasets=None if dataset_name is None or Path(dataset_name).exists() else dataset_name,
        widget=[{"text": prompt, "output": {"url": image}} for prompt, (image, _) in zip(prompts, gallery)] or None,
    )
    card = ModelCard(
        f"---\n{card_data.to_yaml()}\n---\n{_text(run, model, data, steps, results, gallery, prompts, lora)}"
    )
    tags = ["text-to-image", "diffusers-training", "diffusers", "lora", "template:sd-lora", "orpo", *model.tags]
    populate_model_card(card, tags=tags).save(folder / "README.md")


def _save_images(folder: Path, results: ValidationResults) -> list[tuple[str, str]]:
    """Saves each prompt's image with and without the LoRA; returns their names."""
    names = []
    for i, (image, image_without_lora) in enumerate(zip(results.images, results.images_without_lora)):
        names.append((f"image_{i}.png", f"image_{i}_without_lora.png"))
        image.save(folder / names[-1][0])
        image_without_lora.save(folder / names[-1][1])
    return names


def _one_line(text: str) -> str:
    """Text with a space in place of each line break, control character and broken character."""
    return "".join(c if c.isprintable() else " " for c in text)


def _plain(text: str) -> str:
    """Markdown and HTML that show this text, in one line, also within a table: every active character is escaped."""
    return re.sub(r"[\\`*_\[\]<>&~|@#$]|:(?=//)|(?<=www)\.", r"\\\g<0>", _one_line(text))


def _code(text: str) -> str:
    """The same as code: between more backticks than it holds in a row."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{_one_line(text)}{space}{fence}"


def _text(run: Run, model: ModelFamily, data, steps, results, gallery, prompts, lora) -> str:
    sections = [
        f"# {model.name} LoRA aligned with ORPO: {_plain(Path(lora).name)}\n",
        "<Gallery />\n" if gallery else "",
        f"A LoRA for {_code(run.config.pretrained_model_name_or_path)}, trained on preference pairs with ORPO (odds ratio preference"
        " optimization, [arXiv 2403.07691](https://arxiv.org/abs/2403.07691)) for diffusion, without a reference"
        " model.\n",
        f"## Use\n\n```python\n{_snippet(run, model, lora, prompts[0])}```\n",
        "`pytorch_lora_weights.safetensors` is for diffusers; `comfyui_lora.safetensors` is the same LoRA for ComfyUI,"
        " AUTOMATIC1111 and other programs: copy it into their folder of LoRAs.\n",
        f"## Training\n\n- data: {_plain(data)}\n- optimizer steps: {steps}",
        "\n".join(
            f"- {name}: {_plain(str(value))}"
            for name, value in run.config.values(card=True).items()
            if value is not None
        )
        + "\n",
    ]
    if results and results.metrics:
        sections.append("## Held-out pairs\n\n| metric | with the LoRA | without |\n|---|---|---|")
        rows = (
            f"| {name} | {value:.4f} | {results.metrics_without_lora[name]:.4f} |"
            for name, value in results.metrics.items()
        )
        sections.append("\n".join(rows) + "\n")
    if gallery:
        sections.append("## The same prompts and seeds\n\n| prompt | with the LoRA | without |\n|---|---|---|")
        sections.append(
            "\n".join(
                f"| {_plain(prompt)} | ![]({image}) | ![]({image_without}) |"
                for prompt, (image, image_without) in zip(prompts, gallery)
            )
        )
    return "\n".join(section for section in sections if section) + "\n"


def _snippet(run: Run, model: ModelFamily, lora: str, prompt: str) -> str:
    config = run.config
    return model.inference_snippet(lora, prompt, config.validation_inference_steps, config.validation_guidance_scale)
