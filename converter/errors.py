"""What can go wrong while converting, as one named exception with what was expected and what came."""

from __future__ import annotations


class ConversionRefused(Exception):
    """The source can not become a prefix, or not without something that was not given."""
