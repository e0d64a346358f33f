"""Beyond one process: models in parts, decoders behind vLLM, corpora compressed by many workers."""
