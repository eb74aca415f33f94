"""Faults need both ends: the paired harness."""

from __future__ import annotations

from tests.support.harness import pair, pairs

__all__ = ["pair", "pairs"]
