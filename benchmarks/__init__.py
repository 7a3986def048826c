"""What ``make bench`` measures, and the thresholds it holds the figures against."""
