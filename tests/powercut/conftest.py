"""What is cut off is the paired harness's."""

from __future__ import annotations

from tests.support.harness import pairs

__all__ = ["pairs"]
