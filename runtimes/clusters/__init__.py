"""Scoring of more pairs than one process can: Arrow tables, Parquet files, Ray and Spark."""
