"""One page in headless Chromium, driven by its DevTools protocol."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from contextlib import contextmanager

import aiohttp

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SECONDS = 60.0
"""Longest wait for the browser, and for a condition on the page."""


class Browser:
    """A page: its address, expressions on its document, and what its console says."""

    def __init__(self, port, runner):
        self._port, self._runner = port, runner
        self._number = 0
        self.complaints = []
        """Errors of scripts, of the security policy and of the network, and failed assertions."""

    async def connect(self):
        self._session = aiohttp.ClientSession()
        base = f"http://127.0.0.1:{self._port}"
        async with self._session.get(f"{base}/json/list") as answer:
            (page,) = [each for each in await answer.json() if each["type"] == "page"]
        url = page["webSocketDebuggerUrl"]
        self._socket = await self._session.ws_connect(url, max_msg_size=0)

    async def disconnect(self):
        await self._socket.close()
        await self._session.close()

    async def _call(self, method, parameters):
        self._number += 1
        number = self._number
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            said = json.loads((await self._socket.receive(timeout=SECONDS)).data)
            if said.get("id") == number:
                assert "error" not in said, said
                return said["result"]
            self._hear(said)

    def _hear(self, said):
        match said:
            case {"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": error}}:
                self.complaints.append(json.dumps(error))
            case {"method": "Log.entryAdded", "params": {"entry": {"level": "error"} as entry}}:
                self.complaints.append(f"{entry['text']} {entry.get('url', '')}")
            case {"method": "Runtime.consoleAPICalled", "params": {"type": "error"} as said_there}:
                self.complaints.append(json.dumps(said_there["args"]))

    def call(self, method, **parameters):
        return self._runner.run(self._call(method, parameters))

    def open(self, url):
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)

    def reload(self):
        self.call("Page.reload")

    def value(self, expression):
        """Value of an expression of JavaScript; None while the page changes."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def text(self):
        return self.value("document.body?.innerText ?? ''") or ""

    def wait_for(self, expression):
        """Wait until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.value(expression):
            assert time.monotonic() < end, f"{expression} is not true of: {self.text()}"
            time.sleep(0.02)

    def wait_for_text(self, *texts):
        for text in texts:
            self.wait_for(f"document.body?.innerText.includes({json.dumps(text)})")

    def resize(self, width, height=900):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def use_colours(self, scheme):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path):
        """Write an image of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def browser(profile):
    """Start Chromium with an empty page."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    command += [f"--user-data-dir={profile}", "--disable-background-networking", "about:blank"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet)
    try:
        found, end = profile / "DevToolsActivePort", time.monotonic() + SECONDS
        while not (found.exists() and found.read_text().count("\n")):
            assert process.poll() is None, "Chromium has ended"
            assert time.monotonic() < end, "Chromium does not answer"
            time.sleep(0.02)
        with asyncio.Runner() as runner:
            page = Browser(int(found.read_text().split()[0]), runner)
            runner.run(page.connect())
            try:
                yield page
            finally:
                runner.run(page.disconnect())
    finally:
        process.terminate()
        process.wait()
