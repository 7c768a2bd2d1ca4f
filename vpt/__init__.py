"""Visual prompt tuning of pretrained vision transformers, and how far to trust the result."""

__version__ = "0.1.0"
