"""Inference networks that load published checkpoints under their own parameter names."""
