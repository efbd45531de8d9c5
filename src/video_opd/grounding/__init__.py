"""Finds events in one video: spans, agreement of samples, clips, subtitles and an HTML page."""
