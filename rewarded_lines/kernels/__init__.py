"""Blocks of tensors through compiled kernels or a GPU; norms, thresholds and masks of whole tensors."""
