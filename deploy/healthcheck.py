"""Health check of the images: exit code 0 where `fbclip serve` answers /healthz on this machine."""

import http.client
import os

token = os.environ.get("FBCLIP_TOKEN")
connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("FBCLIP_SERVE_PORT", "8000")), timeout=4)
connection.request("GET", "/healthz", headers={"Authorization": f"Bearer {token}"} if token else {})
raise SystemExit(connection.getresponse().status != 200)
