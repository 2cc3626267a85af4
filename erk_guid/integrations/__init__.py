"""Fronts for other programs; each imports what it needs, none is needed by the core."""
