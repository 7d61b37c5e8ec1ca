"""Chromium without a window, driven over a pipe by its DevTools protocol."""

import itertools
import json
import os
import select
import subprocess
import sys

#: Seconds to wait for a word of the browser.
PATIENCE = 60
# The browser reads commands from descriptor 3 and answers on 4.
_START = """
import os, sys
r, w = (os.dup(int(fd)) for fd in sys.argv[1:3])
os.dup2(r, 30); os.dup2(w, 31); os.dup2(30, 3); os.dup2(31, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page of a browser; `events` has what it was told, in order."""

    def __init__(self, program, profile):
        theirs, self._out = os.pipe()
        self._in, back = os.pipe()
        command = [sys.executable, "-c", _START, str(theirs), str(back), program, "--headless"]
        command += ["--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            command,
            pass_fds=(theirs, back),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(back)
        self._ids = itertools.count(1)
        self._rest = b""
        self._session = None
        self.events = []
        targets = self.call("Target.getTargets")["targetInfos"]
        (page,) = [t["targetId"] for t in targets if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _next(self):
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], PATIENCE)[0]:
                raise TimeoutError("the browser does not answer")
            read = os.read(self._in, 1 << 20)
            if not read:
                raise EOFError("the browser has ended")
            self._rest += read
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **params):
        """The result of a command."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer["result"]
            self.events.append(answer)

    def open(self, address):
        """Go to a page, until all of it is there."""
        self.events.clear()
        self.call("Page.navigate", url=address)
        while not self.named("Page.loadEventFired"):
            self.events.append(self._next())

    def named(self, method):
        """The events of a name, since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def value(self, expression):
        """What an expression is in the page."""
        call = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        return self.call("Runtime.evaluate", **call)["result"].get("value")

    def close(self):
        """End the browser."""
        try:
            self._session = None
            self.call("Browser.close")
        finally:
            self._process.wait(20)
            os.close(self._in)
            os.close(self._out)
