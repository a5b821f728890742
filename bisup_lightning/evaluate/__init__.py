"""Perplexity, zero-shot accuracy, and where errors arise."""
