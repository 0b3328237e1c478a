"""Measurements: functions that every rank calls and that return plain records, the same on every rank."""
