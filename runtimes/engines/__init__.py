"""Engines that run artifacts, a file each. They are imported on use."""
