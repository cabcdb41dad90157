"""What makes output real: files, records, the commit."""
