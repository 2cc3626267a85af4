"""Checkpoints: safe reading of published files, our own format, downloads, presets."""

from __future__ import annotations

from erk_guid.checkpoints.loading import Loaded, convert, load
from erk_guid.checkpoints.native import save_network
from erk_guid.checkpoints.presets import PRESETS, Preset

__all__ = ["PRESETS", "Loaded", "Preset", "convert", "load", "save_network"]
