"""Post-training for language models: a base model and a data set in, an assistant out."""

__version__ = "0.1.0"
