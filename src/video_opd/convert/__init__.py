"""Public annotation formats, and data files looked at: converted, checked, described."""
