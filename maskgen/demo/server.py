"""Answers the browser: the page, and a stream of lines for each request; other sites get nothing."""

import concurrent.futures
import hmac
import html
import json
import logging
import pathlib
import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from werkzeug import Request, Response, exceptions
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from maskgen.demo import abilities
from maskgen.demo.jobs import Queue
from maskgen.errors import TransientError, UserError
from maskgen.serving import Model

if TYPE_CHECKING:
  from maskgen.demo.gallery import Gallery

LARGEST = 24 << 20  # bytes of a request
SLICE = 1 << 16  # bytes of an answer that are sent at once, each within the time of `_Handler`
LOCAL = ("localhost", "127.0.0.1", "::1")
_FOLDER = pathlib.Path(__file__).parent
_LINES = "application/x-ndjson"
_HEADERS = {
  "Cache-Control": "no-store",
  "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
  "img-src data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Referrer-Policy": "no-referrer",  # the address may hold the token
  "X-Content-Type-Options": "nosniff",
}

log = logging.getLogger("maskgen")


class App:
  """The WSGI application: `GET /` is the page, `POST /METHOD` computes what `abilities.read` reads.

  An answer to the latter is a stream of JSON objects, one a line: states of the queue, and last
  `{"result": ...}` or `{"error": ...}`.

  Attributes:
    offered: what the page offers, see `abilities.describe`.
    token: what requests must show; None for browsers of this machine, which must name it by a local name, so
      that no other site's name can lead to it.
  """

  def __init__(
    self,
    model: Model,
    name: str,
    *,
    gallery: "Gallery | None" = None,
    token: str | None = None,
    queue: Queue | None = None,
  ):
    self.offered = abilities.describe(model, name, gallery)
    self.token = token
    self._served = abilities.Served(model, self.offered, gallery)
    self._queue = queue or Queue()
    self._page = render(self.offered)
    self._programs: set[tuple[Any, ...]] = set()

  def __call__(self, environ: Any, start_response: Any) -> Any:
    request = Request(environ)
    request.max_content_length = LARGEST
    try:
      response = self._answer(request)
    except exceptions.HTTPException as error:
      told = _line({"error": (error.description or "").rstrip(".")})
      response = Response(told, error.code, mimetype=_LINES)
    response.headers.update(_HEADERS)
    return response(environ, start_response)

  def _answer(self, request: Request) -> Response:
    self._check_sender(request)
    if request.path == "/" and request.method in ("GET", "HEAD"):
      return Response(self._page, mimetype="text/html")
    method = request.path.removeprefix("/")
    if method not in self.offered["methods"]:
      raise exceptions.NotFound("there is no such page")
    if request.method != "POST":
      raise exceptions.MethodNotAllowed(["POST"], "use POST")
    job = self._read(method, request)
    try:
      states = self._queue.follow(self._queue.submit(job.work))
    except TransientError as error:
      raise exceptions.ServiceUnavailable(str(error)) from error
    return Response(_slices(self._lines(job, states)), mimetype=_LINES)

  def _check_sender(self, request: Request) -> None:
    """Refuses what other sites may have a browser send.

    Raises:
      HTTPException: if the request is not from this page, or lacks the token.
    """
    host, origin = request.environ.get("HTTP_HOST", ""), request.headers.get("Origin")
    is_post = request.method == "POST"
    if self.token is None:
      if _hostname(host) not in LOCAL:
        raise exceptions.Forbidden("this server answers only to localhost: open it by that name")
    else:
      bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
      shown = bearer if is_post else request.args.get("token", "")
      if not hmac.compare_digest(shown.encode(), self.token.encode()):
        raise exceptions.Unauthorized("the token is wrong: open the address that the server printed")
    is_own = origin is None or origin.partition("://")[2] == host
    if not is_own or (
      is_post and request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
    ):
      raise exceptions.Forbidden("this request comes from another site")

  def _read(self, method: str, request: Request) -> abilities.Job:
    """Checks the body of a request.

    Raises:
      HTTPException: if it is too large or wrong.
    """
    if request.mimetype != "application/json":
      raise exceptions.UnsupportedMediaType("the request is not JSON")
    try:
      given = json.loads(request.get_data(cache=False), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
      raise exceptions.BadRequest("the request is not JSON") from error
    if not isinstance(given, dict):
      raise exceptions.BadRequest("the request is not a JSON object")
    try:
      return abilities.read(self._served, method, given)
    except UserError as error:
      raise exceptions.BadRequest(str(error)) from error

  def _lines(self, job: abilities.Job, states: Iterator[Mapping[str, Any]]) -> Iterator[bytes]:
    is_new = job.program not in self._programs
    try:
      for state in states:
        yield _line(state if "result" in state else {**state, "compiles": is_new})
      self._programs.add(job.program)
    except UserError as error:
      yield _line({"error": str(error)})
    except concurrent.futures.CancelledError:
      pass  # the server ends
    except Exception:
      log.exception("a request of the page failed")
      yield _line({"error": "the computation failed: the server's log says why"})


class _Handler(WSGIRequestHandler):
  timeout = 60  # seconds that a connection may be silent

  def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002  (werkzeug's name)
    """Logs nothing: addresses may hold the token, and errors are logged where they occur."""


def listen(host: str, port: int) -> socket.socket:
  """Returns a socket that listens at an address; `::` also takes connections by IPv4 where the system can.

  Raises:
    UserError: if it cannot listen there.
  """
  ipv6 = ":" in host
  family = socket.AF_INET6 if ipv6 else socket.AF_INET
  try:
    both = ipv6 and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=family, dualstack_ipv6=both)
  except OSError as error:
    where = f"--host={host} --port={port}"
    raise UserError(f"{where}: cannot listen there ({error.strerror}), give others") from error


def build(app: App, listener: socket.socket) -> BaseWSGIServer:
  """Returns a server that answers at a copy of a socket that listens already."""
  host, port = listener.getsockname()[:2]
  return make_server(host, port, app, threaded=True, request_handler=_Handler, fd=listener.fileno())


def render(offered: Mapping[str, Any]) -> str:
  """Returns the page of a model, with its style and its script inside."""
  facts = json.dumps(offered).replace("<", "\\u003c")  # no text can end the script
  page = (_FOLDER / "page.html").read_text()
  for file in ("page.css", "page.js", "controls.js"):
    page = page.replace(f"$${file}", (_FOLDER / file).read_text())
  return page.replace("$$name", html.escape(str(offered["name"]))).replace("$$facts", facts)


def _slices(lines: Iterator[bytes]) -> Iterator[bytes]:
  for line in lines:
    for start in range(0, len(line), SLICE):
      yield line[start : start + SLICE]


def _line(value: Mapping[str, Any]) -> bytes:
  return json.dumps(value).encode() + b"\n"


def _refuse(constant: str) -> None:
  raise ValueError(constant)  # NaN and Infinity are not JSON


def _hostname(host: str) -> str | None:
  """The name in a Host header, without the port; None if the header is malformed."""
  try:
    return urlsplit(f"//{host}").hostname
  except ValueError:
    return None
