"""Weights on disk: safetensors read and written as streams, and the depth of every tensor."""
