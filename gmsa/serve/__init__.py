"""An OpenAI-compatible server over a GMSA model, and its page.

server.py the process, app.py routes, guard.py keys and limits, schemas.py what routes take and give, service.py from a
request to a prompt, chat.py where the question of a long message begins, scheduler.py the thread that owns the decoder,
workers.py decoders elsewhere in its place.
"""
