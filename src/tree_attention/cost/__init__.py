"""Bytes and links to seconds: what a step costs before it is run. Plain Python, without torch and the rest of us."""
