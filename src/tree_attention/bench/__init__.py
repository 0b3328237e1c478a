"""Measurements, as functions that run on each rank and return plain records."""
