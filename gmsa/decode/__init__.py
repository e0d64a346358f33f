"""Prompts in, tokens out: the only rooms that know the decoder's cache."""
