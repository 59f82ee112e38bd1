"""The values of --mixed_precision, and the dtype of the frozen weights under each."""

import torch


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
