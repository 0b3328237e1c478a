"""The cost model: predicts the time and memory of decoding from a few constants. Plain Python: imports no torch."""
