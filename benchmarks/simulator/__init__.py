"""Simulates decode steps of attention on clusters that nobody here has: every kernel and message, rank by rank."""
