"""Generation: what answers prompts as any merge of a plan, with vLLM, transformers or a server."""
