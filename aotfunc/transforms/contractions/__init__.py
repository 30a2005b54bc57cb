"""Compute sums of products in the cheapest order, and only as far as they are needed."""

from .reassociate import reassociated

__all__ = ["reassociated"]
