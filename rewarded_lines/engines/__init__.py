"""Generation: engines that answer prompts as any merge of a plan, with vLLM, transformers or a server."""
