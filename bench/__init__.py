"""Measuring artifacts: throughput and ranking quality."""
