"""An OpenAI-compatible server over a GMSA model, and its page.

server.py the process, app.py routes, guard.py keys and limits, schemas.py what routes take and give, service.py from a
request to a prompt, scheduler.py the thread that owns the decoder, remote.py a
decoder elsewhere, remote_scheduler.py what stands in the thread's place then.
"""
