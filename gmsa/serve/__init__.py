"""An OpenAI-compatible server over a GMSA model, and its page.

server.py the process, app.py routes, guard.py keys and limits, schemas.py what routes take and give, service.py from a
request to a prompt, chat.py messages to pieces, scheduler.py the thread that owns the decoder, generation.py rows that
are decoded together, workers.py decoders elsewhere in place of those two.
"""
