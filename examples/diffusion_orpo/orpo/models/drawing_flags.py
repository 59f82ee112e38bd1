"""The flags that name a model to draw with, and say how: see `drawing.py`."""

from ..runtime.flags import Flag, FlagGroup, pick
from .flags import MODEL


DRAWN_MODEL = FlagGroup(
    "model",
    (
        *pick(
            [MODEL],
            ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision", "variant", "cache_dir"),
        ),
        Flag("lora_scale", "Strength of the LoRA.", float, 1.0),
        Flag(
            "prediction_type",
            "What the U-Net predicts, where the training was told so. Default: what the model's scheduler says.",
            choices=("epsilon", "v_prediction"),
        ),
        Flag(
            "dtype",
            "Precision to draw in. Default: fp16 or bf16 on a GPU, depending on the family; fp32 on a CPU.",
            choices=("fp32", "fp16", "bf16"),
        ),
    ),
)

DRAWING = FlagGroup(
    "drawing",
    (
        Flag(
            "resolution",
            "Pixels per side. Default: 1024, and 512 for Stable Diffusion 1.x and 2.x; name 768 for 2.1.",
            int,
            range=(8,),
        ),
        Flag("num_inference_steps", "Sampling steps per image.", int, 30, range=(1,)),
        Flag("guidance_scale", "Classifier-free guidance. Default: as in training's validation.", float, range=(0,)),
        Flag(
            "max_sequence_length",
            "Tokens of a prompt that are read, in families that have the flag. Default: as in training.",
            int,
            range=(1,),
        ),
        Flag(
            "seed",
            "Seed of the first image; each further one has the next. A second round needs other seeds.",
            int,
            0,
            range=(0,),
        ),
        Flag("batch_size", "Images drawn at once.", int, 4, range=(1,)),
    ),
)
