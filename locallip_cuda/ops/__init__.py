"""The ops: compiled kernels behind typed wrappers, and a twin of each in plain PyTorch (:mod:`.reference`)."""

from .kernels import activation_pattern, affine, chain_norm, lanczos_bound, margin, margin_step, masked_norm

__all__ = ["activation_pattern", "affine", "chain_norm", "lanczos_bound", "margin", "margin_step", "masked_norm"]
