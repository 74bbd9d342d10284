"""What a checkpoint is, by depth: tensors, scales and the norms of residuals."""
