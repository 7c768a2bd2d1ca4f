"""Attention of timm's blocks, opened to extra keys and values, travelling prompts and recording."""
