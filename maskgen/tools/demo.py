"""Opens a page to try a model in the browser: python -m maskgen.tools.demo --model=DIR"""

import secrets
import socket
from collections.abc import Sequence

from etils import epath

from maskgen import cli
from maskgen.errors import UserError

_PORT = 8188


def main(argv: Sequence[str]) -> None:
  """Parses the command line, loads the model and serves the page until it is interrupted.

  Raises:
    UserError: if the model or the address is wrong.
  """
  parser = cli.Parser(
    "Serves a page to try a model in the browser: paint a hole and fill it, remove something, extend the "
    "picture, generate, and compare candidates. Only this machine can reach it, but every user of the "
    "machine. If --host names another address, it asks for the token in the address that it prints; "
    "--host=127.0.0.2 stays on this machine and asks for it.",
    "python -m maskgen.tools.demo --model=runs/quickstart/mage",
  )
  parser.add_model("workdir of a run, or an export; by default emoji", default="emoji")
  parser.add_argument("--host", default="localhost", help="address to listen at, such as 0.0.0.0 for all")
  parser.add_argument(
    "--port", type=int, default=_PORT, help=f"port, 0 for any that is free; default {_PORT}"
  )
  parser.add_argument("--folder", help="pictures among which the page finds those most similar to a picture")
  args = parser.parse_args(argv)
  if not 0 <= args.port < 2**16:
    raise UserError(f"--port={args.port}: give a number from 0 to {2**16 - 1}")

  import maskgen
  from maskgen.demo import server
  from maskgen.demo.jobs import Queue

  token, queue = None if args.host in server.LOCAL else secrets.token_urlsafe(), Queue()
  with server.listen(args.host, args.port) as listener:  # loading takes longer
    model, gallery = maskgen.load(args.model), None
    if args.folder is not None:
      from maskgen.demo.gallery import Gallery  # imports TensorFlow

      gallery = Gallery(model, args.folder)
    name = epath.Path(args.model).name or args.model
    app = server.App(model, name, gallery=gallery, token=token, queue=queue)
    if not app.offered["methods"]:
      raise UserError(f"--model={args.model} makes no pictures: give --folder, to find similar ones there")
    listening = server.build(app, listener)
    bound = listener.getsockname()[0]
  host = socket.gethostname() if bound in ("0.0.0.0", "::") else args.host
  host = f"[{host}]" if ":" in host else host
  query = f"?token={token}" if token else ""
  print(f"open http://{host}:{listening.port}/{query} in a browser; Ctrl-C ends the server", flush=True)
  try:
    listening.serve_forever()
  finally:
    queue.close()


if __name__ == "__main__":
  cli.run(main)
