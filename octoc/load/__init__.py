"""Readers: one file per kind of source, each ends in a `Model`."""
