"""Checkpoints: safe reading of published files, our own format, downloads, presets."""

from __future__ import annotations

from erk_guid.models.checkpoints.loading import Checkpoint, convert, load
from erk_guid.models.checkpoints.native import save_network
from erk_guid.models.checkpoints.presets import PRESETS, Preset

__all__ = ["PRESETS", "Checkpoint", "Preset", "convert", "load", "save_network"]
