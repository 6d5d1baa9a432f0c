"""Health check of the images: exit code 0 where `fbclip serve` answers /healthz on this machine."""

import http.client
import os

connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("FBCLIP_SERVE_PORT", "8000")), timeout=4)
try:
    connection.request("GET", "/healthz")
    status = connection.getresponse().status
except OSError as error:
    raise SystemExit(str(error)) from None
raise SystemExit(None if status == 200 else f"/healthz answered {status}")
