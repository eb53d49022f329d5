"""Benchmarks of the extension beside two baselines: materialised masked matrices, and the paper's published method."""
