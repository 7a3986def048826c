"""The CANN simulator: test equipment, see README.md."""
