"""Saving and loading quantized models with transformers."""
