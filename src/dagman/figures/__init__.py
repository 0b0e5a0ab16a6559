"""Arrays to pictures; the only importer of matplotlib."""
