"""Networks, checkpoint files and encoders."""

from __future__ import annotations

from erk_guid.models.networks.precond import freeze

__all__ = ["freeze"]
