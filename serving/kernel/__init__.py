"""Triton kernels: what a decoder layer does beside its dense products, with the adapters' part fused in."""
