"""Alarms and notices to a web server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

from fbclip import addresses
from fbclip.errors import UsageError
from fbclip.runtime.live.records import Notice, Record

TIMEOUT_S = 5.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Don't: urllib would ask the other address without the body."""


class Webhook:
    """A POST of JSON for each notice; of an alarm ("on" or "off") with the `result` that it is about.

    Results alone are not posted: where the server is away, the many of them would push alarms out of the queue.

    Args:
        url: http:// or https://; a token belongs into its path or query.
        timeout_s: seconds that an answer may take.

    Raises:
        UsageError: the address is malformed.
    """

    name = "webhook"

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S) -> None:
        address = addresses.parse(url, "a webhook is https://HOST/PATH", {"http": 80, "https": 443}, "webhook")
        if address.user:
            raise UsageError(
                "a webhook takes no user and password: put a token into the path or query", option="webhook"
            )
        self._url, self._timeout_s = address.bare, timeout_s
        self._host = address.host
        self._open = urllib.request.build_opener(_NoRedirect).open
        self._latest: dict[str, Any] = {}

    def write(self, record: Record) -> None:
        self._latest = record.to_dict()

    def notify(self, notice: Notice) -> None:
        values = notice.to_dict()
        if notice.kind == "alarm" and self._latest.get("time") == notice.time:
            values["result"] = self._latest
        self._post(json.dumps(values, allow_nan=False))

    def close(self) -> None:
        """Nothing is open between posts."""

    def _post(self, body: str) -> None:
        request = urllib.request.Request(self._url, body.encode(), {"Content-Type": "application/json"})
        try:
            self._open(request, timeout=self._timeout_s).close()
        except urllib.error.HTTPError as error:
            with error:
                raise OSError(f"the webhook at {self._host} answered {addresses.status(error.code)}") from error
        except (HTTPException, ValueError) as error:  # whose text may hold the address, or a proxy's
            raise OSError(f"no answer of the webhook at {self._host} as HTTP has it: {type(error).__name__}") from error
        except OSError as error:
            raise OSError(f"no answer of the webhook at {self._host}: {getattr(error, 'reason', error)}") from error
