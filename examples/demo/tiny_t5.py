"""A tiny T5 encoder and its tokenizer, for the pipelines that read prompts with T5 beside CLIP."""

import string

from transformers import T5Config, T5EncoderModel, T5TokenizerFast


T5_LENGTH = 16  # tokens that the demo's bases were trained with


def build_t5_tokenizer(words: list[str]) -> T5TokenizerFast:
    """A T5 tokenizer in which each of `words` is one token, and other text is spelled out in ASCII characters."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocabulary += [(f"▁{word}", -1.0) for word in sorted(set(words)) if len(word) > 1]
    vocabulary += [(character, -5.0) for character in sorted(string.printable.strip())]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=T5_LENGTH)


def build_t5(tokenizer: T5TokenizerFast, hidden_size: int) -> T5EncoderModel:
    """A T5 encoder of two layers with random weights."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=hidden_size,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)
