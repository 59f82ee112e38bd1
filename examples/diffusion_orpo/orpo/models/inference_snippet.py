"""The Python code of a model card: how to generate with the trained LoRA."""


def inference_snippet(trained, lora: str, prompt: str, steps: int, guidance_scale: float) -> str:
    """Python code that generates an image as training's validation does.

    Args:
        trained: the model family, with another one to generate with or without.
        lora: its folder, or name on the Hub.
        prompt: of the image.
        steps, guidance_scale: of the validation, for another model to generate with.
    """
    model = trained.validation_model or trained
    options, pipeline = model.options, model.pipeline_class.__name__
    source, call_options = f"{options.pretrained_model_name_or_path!r},", dict(model.call_options)
    if model.negative_prompt is not None:
        call_options["negative_prompt"] = model.negative_prompt
    if model is not trained:
        source += f"  # trained on {trained.options.pretrained_model_name_or_path!r}, which takes the LoRA, too"
        call_options["num_inference_steps"] = steps
        call_options |= model.guidance_options(guidance_scale)
    lines = [source]
    imports = pipeline
    if options.pretrained_vae_model_name_or_path is not None:
        vae = model.vae.module_class.__name__
        imports = f"{vae}, {pipeline}"
        lines.append(f"vae={vae}.from_pretrained({options.pretrained_vae_model_name_or_path!r}, dtype=dtype),")
    lines += [f"{name}=None," for name in model.absent_modules]
    loading = "".join(f"    {line}\n" for line in (*lines, "dtype=dtype,"))
    config = ", ".join(f"{name}={value!r}" for name, value in options.sampler_config.items())
    call_options = "".join(f", {name}={value!r}" for name, value in call_options.items())
    scheduler_line = f"pipeline.scheduler.register_to_config({config})\n" if config else ""
    return (
        "import torch\n"
        f"from diffusers import {imports}\n\n"
        f'device, dtype = ("cuda", torch.{model.inference_dtype}) if torch.cuda.is_available() else ("cpu", torch.float32)\n'
        f"pipeline = {pipeline}.from_pretrained(\n{loading}).to(device)\n"
        f"{scheduler_line}pipeline.load_lora_weights({lora!r})\n"
        f"image = pipeline(prompt={prompt!r}{call_options}).images[0]\n"
        'image.save("image.png")\n'
    )
