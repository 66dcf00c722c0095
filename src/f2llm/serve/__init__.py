"""Serving: routes that clients of other services know, over one scheduler of batches."""
