"""Turning a model into an equivalent one that quantizes better."""
