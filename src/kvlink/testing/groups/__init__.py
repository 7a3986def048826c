"""The groups of cases, one file each."""
