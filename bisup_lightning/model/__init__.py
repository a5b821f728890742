"""Modules that quantize: a decoder layer with and without Θ, the KV cache, checkpoints read block by block."""
