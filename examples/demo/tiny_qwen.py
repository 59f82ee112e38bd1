"""A tiny Qwen tokenizer with its chat template, for the pipelines that read prompts with a Qwen language model."""

from tokenizers import pre_tokenizers
from transformers import AddedToken, Qwen2Tokenizer, Qwen3Config


PROMPT_LENGTH = 32  # tokens that the demo's bases were trained with, those of the chat template included
# Of the template that QwenImagePipeline puts before a prompt: it drops the first 34 tokens, which these words make it.
TEMPLATE_WORDS = (
    "system user assistant Describe the image by detailing the color shape size texture quantity text spatial"
    " relationships of the objects and background"
).split()
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_qwen_tokenizer(words: list[str]) -> Qwen2Tokenizer:
    """A tokenizer in which each of `words` is one token, with the space before it; other text is spelled out in bytes."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate([*alphabet, *special])},
        merges=[],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
        model_max_length=512,
    )
    words = sorted({*TEMPLATE_WORDS, *words})
    tokenizer.add_tokens(
        [AddedToken(word, single_word=True, lstrip=word != "Describe", normalized=False) for word in words]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_qwen3_config(tokenizer: Qwen2Tokenizer, num_layers: int) -> Qwen3Config:
    """Of a Qwen3 with 32 channels."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
        initializer_range=0.2,  # the text encoder stays as it is made, so its words must differ from the start
    )
