"""What --mixed_precision may be, and the dtype of the frozen weights under it."""

import torch


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
