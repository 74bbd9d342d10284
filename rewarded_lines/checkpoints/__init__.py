"""Weights on disk: safetensors and adapters, read and written as streams; the depth of every tensor."""
