"""The flags that name a model and its LoRA, and those of the noise processes."""

from ..runtime.flags import Flag, FlagGroup
from .bnb_config import read_bnb_config


MODEL = FlagGroup(
    "model",
    (
        Flag(
            "pretrained_model_name_or_path",
            "Path to pretrained model or model identifier from huggingface.co/models.",
            required=True,
            is_source=True,
        ),
        Flag(
            "pretrained_vae_model_name_or_path",
            "Path or identifier of a VAE to use instead of the model's own, such as madebyollin/sdxl-vae-fp16-fix, "
            "which works in float16. A VAE whose config says `force_upcast` runs in float32.",
            card=True,
            is_source=True,
        ),
        Flag(
            "validation_model_path",
            "Another checkpoint of the same architecture to draw the validation images with, such as the distilled one that "
            "the LoRA is for: a folder, or an identifier. It is loaded for each validation, with the LoRA as it is then, "
            "beside the model that trains. Give the steps and the guidance that it wants, as in "
            "--validation_inference_steps=4 --validation_guidance_scale=1. Default: the model that trains.",
            card=True,
            is_source=True,
        ),
        Flag("revision", "Revision of the pretrained model."),
        Flag("variant", "Variant of the pretrained model's files, e.g. fp16."),
        Flag("cache_dir", "Folder for downloaded models and data sets."),
        Flag(
            "quantize_base",
            "Load the denoiser's linear layers in 8 or 4 bits with bitsandbytes: less memory, slower. The LoRA trains in "
            "float32 all the same, and loads into the model that is not quantized. Needs a GPU.",
            choices=("8bit", "nf4"),
            resume="same",
        ),
        Flag(
            "bnb_quantization_config_path",
            "The same by a JSON file of what diffusers' BitsAndBytesConfig takes, in place of --quantize_base, as in "
            'diffusers\' scripts: {"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}. A compute dtype that the file leaves '
            "out is that of --mixed_precision.",
            read_bnb_config,
            resume="same",
        ),
        Flag("rank", "Rank of the LoRA matrices.", int, 4, range=(1,), resume="same", card=True),
        Flag(
            "lora_alpha",
            "The LoRA is scaled by alpha / rank. Default: the rank.",
            float,
            lambda args: args.rank,
            resume="same",
            card=True,
        ),
        Flag(
            "lora_dropout",
            "Dropout probability in the LoRA layers.",
            float,
            0.0,
            range=(0, 1),
            resume="warn",
            card=True,
        ),
        Flag(
            "lora_layers",
            "Comma-separated names of the denoiser's modules that get a LoRA, or ends of names; * stands for anything. Default: "
            "all attention projections, and in FLUX.1 and FLUX.2 the feed-forward layers.",
            resume="same",
            card=True,
        ),
        Flag(
            "init_lora_weights",
            "A LoRA to start from, in place of one that changes nothing, as for a second round on pairs drawn with it: folder, "
            "file or name on the Hub, from diffusers, PEFT or kohya's scripts, for the modules and of the rank that the run "
            "trains. A resumed run continues from its checkpoint.",
            resume="warn",
            card=True,
        ),
        Flag("gradient_checkpointing", "Recompute activations backward: less memory, slower.", bool),
        Flag(
            "compile",
            "Compile the denoiser's repeated blocks with torch.compile: a minute at the start, then faster steps.",
            bool,
        ),
        Flag("vae_encode_batch_size", "Images that the VAE encodes at once; bounds its memory.", int, 8, range=(1,)),
        Flag(
            "mixed_precision",
            "Precision of the frozen weights and of the forward pass; the LoRA trains in float32 in any case. "
            "Default: as in the accelerate configuration.",
            choices=("no", "fp16", "bf16"),
            resume="same",
            card=True,
        ),
        Flag("allow_tf32", "Use TF32 for float32 matrix products on CUDA.", bool),
    ),
)

DDPM_FLAGS = FlagGroup(
    "loss",
    (
        Flag(
            "prediction_type",
            "What the U-Net predicts. Default: what the model's noise scheduler says.",
            choices=("epsilon", "v_prediction"),
            resume="same",
            card=True,
        ),
        Flag(
            "snr_gamma",
            "Weigh each pair by min-SNR with this gamma (arXiv 2303.09556; 5.0 is usual). Default: no weighting.",
            float,
            range=(1e-6,),
            resume="warn",
            card=True,
        ),
    ),
)

FLOW_MATCHING_FLAGS = FlagGroup(
    "loss",
    (
        Flag(
            "weighting_scheme",
            "How noise levels are weighted: logit_normal and mode draw some timesteps more often, sigma_sqrt and cosmap "
            "draw all equally and weigh the loss, none does neither.",
            default="logit_normal",
            choices=("logit_normal", "mode", "sigma_sqrt", "cosmap", "none"),
            resume="warn",
            card=True,
        ),
        Flag(
            "logit_mean",
            "Mean of logit_normal: larger values draw less noise.",
            float,
            0.0,
            range=(-10, 10),
            resume="warn",
            card=True,
        ),
        Flag(
            "logit_std",
            "Standard deviation of logit_normal.",
            float,
            1.0,
            range=(0, 10),
            resume="warn",
            card=True,
        ),
        Flag(
            "mode_scale",
            "Scale of mode, from -1 to 1.75: above 0 draws the middle more often, below 0 the ends.",
            float,
            1.29,
            range=(-1, 1.75),
            resume="warn",
            card=True,
        ),
    ),
)


def max_sequence_length(default: int, note: str = "", reader: str = "T5", highest: int = 512) -> Flag:
    """--max_sequence_length, for families whose text encoder reads as many tokens as it is told to."""
    text = f"Tokens of a prompt that {reader} reads, at most {highest}{note}."
    return Flag("max_sequence_length", text, int, default, range=(1, highest), resume="warn", card=True)


GUIDANCE_SCALE = Flag(
    "guidance_scale",
    "Guidance scale that the model is told in training, where it takes one: FLUX.1-dev and FLUX.2-dev do, FLUX.1-schnell "
    "and FLUX.2 klein don't.",
    float,
    3.5,
    range=(0,),
    resume="warn",
    card=True,
)
