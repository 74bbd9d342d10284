"""How tensors pass through: blocks read, computed and written by a few threads or by a GPU, in flat memory."""
