"""What PyTorch itself says: outputs and gradients in eager mode, with attention that has a second derivative."""

import contextlib
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def plain_attention() -> Any:
    """Attention by its formula, and recurrent layers without cuDNN: the fused kernels have no double backward."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False), torch.enable_grad():
        yield
