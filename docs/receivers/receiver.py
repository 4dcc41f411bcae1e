"""A receiver of AcousticSense's webhooks: Python 3.9 or later and `pip install -r requirements.txt`.

    WEBHOOK_SECRET=whsec_... PORT=3000 python receiver.py

What it remembers, it remembers in memory. In earnest that is a table of a database, written in one transaction with
what an event changes.
"""

import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks import Webhook, WebhookVerificationError

webhook = Webhook(os.environ["WEBHOOK_SECRET"])

MOST_BYTES = 64 * 1024  # every event is smaller than 20 kB
REMEMBERED_SECONDS = 7 * 24 * 3600  # longer than an event is tried

lock = threading.Lock()
seen = {}  # webhook-id -> when it came
latest = {}  # ref -> the latest result


def remember(event_id):
    now = time.time()
    with lock:
        while seen and now - next(iter(seen.values())) > REMEMBERED_SECONDS:
            del seen[next(iter(seen))]
        if event_id in seen:
            return False
        seen[event_id] = now
        return True


def work(event_id, event):
    if event_id.startswith("evt_test_"):
        return "test"
    data = event["data"]
    if event["type"] not in ("job.completed", "job.failed") or data["ref"] is None:
        return "noted"
    with lock:
        known = latest.get(data["ref"])
        if known is not None and known["revision"] > data["revision"]:
            return "outdated"
        genre = data["genres"][0]["label"] if data["genres"] else None
        latest[data["ref"]] = {"revision": data["revision"], "state": data["state"], "genre": genre}
    return "latest"


class Receiver(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_POST(self):
        length = self.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            self.close_connection = True
            return self.answer(413)
        body = self.rfile.read(int(length))
        try:
            # What was signed is these very bytes: verify first, parse then.
            event = webhook.verify(body, dict(self.headers.items()))
        except (WebhookVerificationError, ValueError) as error:
            # ValueError: headers or a body that are nothing of the kind. The reason is shown with the attempt to whoever
            # registered the endpoint.
            return self.answer(401, str(error).encode())
        if event["type"] == "endpoint.verification":
            return self.answer(200, json.dumps({"challenge": event["data"]["challenge"]}).encode())
        event_id = self.headers["webhook-id"]
        is_new = remember(event_id)
        # First remembered, then answered, then worked on: the sender waits 15 s, and what was answered never comes again.
        self.answer(204)
        self.wfile.flush()
        print(event_id, event["type"], work(event_id, event) if is_new else "known", flush=True)

    def answer(self, status, body=b""):
        self.send_response(status)
        if status != 204:
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", "3000"))), Receiver)
print(f"Listening on http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
