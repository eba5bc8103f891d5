"""The namespace of the registered ops, `torch.ops.<NAMESPACE>`; a build for the Hub has its own (package.py)."""

NAMESPACE = "extrema_fast"
