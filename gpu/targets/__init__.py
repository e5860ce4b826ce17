"""Writers of engine files."""
