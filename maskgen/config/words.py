"""The section `objective.words` that configs of ViLex share, see `maskgen.numerics.prompts.Words`."""

import pathlib
from typing import Any

from maskgen.errors import UserError


def words_beside(args: Any, templated: float) -> dict[str, Any]:
  """How examples are trained with words, by the arguments of a config.

  Args:
    args: `templates`, a file with a text on each line; `caption_share`; `words_win`, which sets the others as
      the digits' results suggest; `place`; `subject`, words joined by "+"; `recoloured`.
    templated: the share of the examples with such a text.

  Raises:
    UserError: if the shares are more than 1 in total, or the file cannot be read.
  """
  captions = args.caption_share or (0.4 if args.words_win else 0.0)
  share = templated + captions
  if share > 1:
    raise UserError(f"config arguments: template_share and caption_share are {share:g} in total: lower one")
  return dict(
    share=share,
    templates=_read_lines(args.templates) if templated else (),
    templated=templated / share if share else 0.0,
    place=args.place or ("within" if args.words_win or args.subject else "before"),
    subject=tuple(filter(None, args.subject.split("+"))),
    recoloured=args.recoloured or (0.4 if args.words_win else 0.0),
  )


def _read_lines(path: str) -> tuple[str, ...]:
  try:
    text = pathlib.Path(path).expanduser().read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"config argument ':templates={path}': not a readable text file ({error})") from error
  return tuple(filter(None, map(str.strip, text.splitlines())))
