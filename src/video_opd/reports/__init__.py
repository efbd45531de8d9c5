"""Reads run folders, writes tables, plots and one HTML file."""
