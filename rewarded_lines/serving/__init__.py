"""λ in the request: a plugin of vLLM, a server, and a small page."""
