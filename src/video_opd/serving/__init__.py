"""A frozen teacher in another process: its server, the messages, and the client that a run uses.

The server:

``serve``         starts it, and ends it when the process is told to
``app``           its routes
``queue``         the requests that wait for the model
``scorer``        the model that answers
``address``       where it listens
``requirements``  what a server needs, and what of it is missing here

The client:

``connect``  the teacher of a run, from ``teacher.urls``
``client``   a teacher that asks servers
``servers``  the servers of one teacher: who is asked, and again after a failure

Both:

``messages``  requests and replies
``reading``   reads them
``limits``    how large they may be
"""
