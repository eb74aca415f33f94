"""Overlays need both ends: the paired harness."""

from __future__ import annotations

from tests.support.harness import pairs

__all__ = ["pairs"]
