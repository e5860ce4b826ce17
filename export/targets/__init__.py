"""What an export writes, a file for each kind of artifact."""
