"""Adapters for other programs; each imports what it needs, and the core needs none."""
