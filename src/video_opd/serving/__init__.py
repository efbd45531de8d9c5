"""A frozen teacher in another process: its server, the messages, and the client that a run uses."""
