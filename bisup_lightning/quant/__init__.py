"""Arithmetic on tensors: quantizers, packing, GPTQ, Hadamard transforms, and the kernels for them."""
