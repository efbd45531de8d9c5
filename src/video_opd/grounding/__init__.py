"""The answer for one video and one person: spans, agreement, a page, clips, subtitles."""
