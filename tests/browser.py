"""A headless Chromium that tests drive through the DevTools protocol, over a pipe."""

import base64
import json
import shutil
import subprocess
from typing import Any

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
  *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
  *("--disable-background-networking", "--no-first-run", "--remote-debugging-pipe"),
)


class Browser:
  """One page; use it as a context manager."""

  def __init__(self, folder: Any, width: int = 1280, height: int = 900, *, dark: bool = False):
    assert FOUND is not None
    flags = (*FLAGS, f"--user-data-dir={folder}", f"--window-size={width},{height}")
    # The pipe's ends are file descriptors 3 and 4.
    command = ["bash", "-c", 'exec "$@" 3<&0 4>&1 >/dev/null', "browser", FOUND, *flags, "about:blank"]
    self._process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    self._number, self._session = 0, None
    pages = self.call("Target.getTargets")["targetInfos"]
    page = next(target["targetId"] for target in pages if target["type"] == "page")
    self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    self.call("Emulation.setEmulatedMedia", features=[scheme])
    size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
    self.call("Emulation.setDeviceMetricsOverride", **size)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._process.kill()
    self._process.communicate()

  def call(self, method: str, **parameters: Any) -> dict[str, Any]:
    """Sends a command and returns its result; events that come in between are dropped."""
    self._number += 1
    sent = {"id": self._number, "method": method, "params": parameters}
    if self._session:
      sent["sessionId"] = self._session
    self._process.stdin.write(json.dumps(sent).encode() + b"\0")
    self._process.stdin.flush()
    while True:
      got = bytearray()
      while not got.endswith(b"\0"):
        byte = self._process.stdout.read(1)
        assert byte, "the browser has ended"
        got += byte
      answer = json.loads(got[:-1])
      if answer.get("id") == self._number:
        assert "error" not in answer, answer
        return answer["result"]

  def run(self, script: str) -> Any:
    """The value of a JavaScript expression, also of a promise."""
    answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
    assert "exceptionDetails" not in answer, answer
    return answer["result"].get("value")

  def wait(self, condition: str, seconds: int = 120) -> None:
    """Waits until a JavaScript expression is true; fails if it never is."""
    look = f"const look = () => ({condition}) ? done(true) : setTimeout(look, 20)"
    limit = f"setTimeout(() => done(false), {1000 * seconds})"
    assert self.run(f"new Promise(done => {{ {look}; look(); {limit}; }})"), condition

  def open(self, url: str) -> None:
    self.call("Page.navigate", url=url)
    self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

  def mouse(self, kind: str, x: float, y: float) -> None:
    """A mouse event: "mousePressed", "mouseMoved" or "mouseReleased", in pixels of the window."""
    self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

  def drag(self, start: tuple[float, float], *path: tuple[float, float]) -> None:
    self.mouse("mousePressed", *start)
    for point in path:
      self.mouse("mouseMoved", *point)
    self.mouse("mouseReleased", *(path or (start,))[-1])

  def key(self, key: str, modifiers: int = 0) -> None:
    """Presses and releases a key; `modifiers` is 2 for Ctrl and 8 for Shift."""
    text = {"Enter": "\r"}.get(key, key) if len(key) == 1 or key == "Enter" else ""
    code = {"Enter": 13, "Delete": 46}.get(key, ord(key[0].upper()))
    shared = dict(key=key, modifiers=modifiers, windowsVirtualKeyCode=code)
    self.call("Input.dispatchKeyEvent", type="keyDown", text="" if modifiers & 2 else text, **shared)
    self.call("Input.dispatchKeyEvent", type="keyUp", **shared)

  def screenshot(self) -> bytes:
    """A PNG file of the whole page."""
    return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
