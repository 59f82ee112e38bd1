"""The names and shapes that a LoRA of a published model has, written down from its architecture and not read from a model."""

JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
SELF = ("to_q", "to_k", "to_v", "to_out.0")


def modules(name: str, blocks: int | None = None) -> dict[str, tuple[int, int]]:
    """Modules that the default --lora_layers names, with the channels that go in and come out.

    Args:
        name: of the model.
        blocks: of each kind, in a copy that is cut; not for SDXL. Default: as many as are published.
    """
    listed, published = {
        "sdxl": (_sdxl, ()),
        "sd3": (_sd3, (24,)),
        "flux": (_flux, (19, 38)),
        "z_image": (_z_image, (30, 2)),
        "flux2": (_flux2, (5, 20)),
        "qwen_image": (_qwen, (60,)),
    }[name]
    return listed(*(blocks or number for number in published))


def tensors(name: str, rank: int, blocks: int | None = None) -> dict[str, tuple[int, int]]:
    """Keys and shapes of pytorch_lora_weights.safetensors."""
    prefix = "unet" if name == "sdxl" else "transformer"
    shapes = {}
    for module, (into, out) in modules(name, blocks).items():
        shapes[f"{prefix}.{module}.lora_A.weight"] = (rank, into)
        shapes[f"{prefix}.{module}.lora_B.weight"] = (out, rank)
    return shapes


def _sdxl() -> dict[str, tuple[int, int]]:
    """70 transformer blocks: of 640 channels two a place, of 1280 ten; each attends to itself and to 2048 of the prompt."""
    places = [(f"down_blocks.1.attentions.{i}", 640, 2) for i in range(2)]
    places += [(f"down_blocks.2.attentions.{i}", 1280, 10) for i in range(2)]
    places += [("mid_block.attentions.0", 1280, 10)]
    places += [(f"up_blocks.0.attentions.{i}", 1280, 10) for i in range(3)]
    places += [(f"up_blocks.1.attentions.{i}", 640, 2) for i in range(3)]
    found = {}
    for place, channels, depth in places:
        for i in range(depth):
            for layer in SELF:
                of_prompt = 2048 if layer in ("to_k", "to_v") else channels
                found[f"{place}.transformer_blocks.{i}.attn1.{layer}"] = (channels, channels)
                found[f"{place}.transformer_blocks.{i}.attn2.{layer}"] = (of_prompt, channels)
    return found


def _sd3(blocks: int) -> dict[str, tuple[int, int]]:
    """24 joint blocks of 1536 channels, the last of which makes nothing of the prompt."""
    found = {f"transformer_blocks.{i}.attn.{layer}": (1536, 1536) for i in range(blocks) for layer in JOINT}
    del found[f"transformer_blocks.{blocks - 1}.attn.to_add_out"]
    return found


def _flux(double: int, single: int) -> dict[str, tuple[int, int]]:
    """19 double blocks of 3072 channels with two feed-forward layers of four times that, and attention of 38 single ones."""
    found = {f"transformer_blocks.{i}.attn.{layer}": (3072, 3072) for i in range(double) for layer in JOINT}
    for i in range(double):
        for part in ("ff", "ff_context"):
            found[f"transformer_blocks.{i}.{part}.net.0.proj"] = (3072, 12288)
            found[f"transformer_blocks.{i}.{part}.net.2"] = (12288, 3072)
    for i in range(single):
        found |= {f"single_transformer_blocks.{i}.attn.{layer}": (3072, 3072) for layer in SELF[:3]}
    return found


def _z_image(layers: int, refiners: int) -> dict[str, tuple[int, int]]:
    """30 layers of 3840 channels, and two refiners each of image and prompt."""
    blocks = [f"layers.{i}" for i in range(layers)]
    blocks += [f"{part}_refiner.{i}" for part in ("noise", "context") for i in range(refiners)]
    return {f"{block}.attention.{layer}": (3840, 3840) for block in blocks for layer in SELF}


def _flux2(double: int, single: int) -> dict[str, tuple[int, int]]:
    """FLUX.2 klein 4B: 5 double blocks of 3072 channels, 20 single ones whose attention and gated MLP of 9216 are fused."""
    found = {f"transformer_blocks.{i}.attn.{layer}": (3072, 3072) for i in range(double) for layer in SELF}
    for i in range(single):
        found[f"single_transformer_blocks.{i}.attn.to_qkv_mlp_proj"] = (3072, 3 * 3072 + 2 * 9216)
        found[f"single_transformer_blocks.{i}.attn.to_out"] = (3072 + 9216, 3072)
    return found


def _qwen(blocks: int) -> dict[str, tuple[int, int]]:
    """60 double blocks of 3072 channels; the image's projections alone."""
    return {f"transformer_blocks.{i}.attn.{layer}": (3072, 3072) for i in range(blocks) for layer in SELF}
