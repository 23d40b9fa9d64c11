"""HTTP requests in, calls to the workers, HTTP answers out.

`api.py` has the endpoints and routes, `chat.py` the chat template, `admission.py` what surrounds every request (API
key, concurrency, deadline, log line), `health.py` the readiness check, `console_files.py` the web page.
"""
