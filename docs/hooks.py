"""What the documentation takes from the code when it is built: `minitron --help` and every command's."""

from __future__ import annotations

import argparse
import os
from typing import Any

from minitron_nemo.command_line import command_line

CLI_PAGE = "reference/cli.md"


def on_page_markdown(markdown: str, page: Any, **unused: Any) -> str:
    """Append the commands' help to the page that is about them."""
    if page.file.src_uri != CLI_PAGE:
        return markdown
    os.environ["COLUMNS"] = "110"  # argparse folds its lines there
    whole = f"\n```text\n{command_line().format_help()}```\n"
    return "\n".join([markdown, whole, *(_section(name, verb) for name, verb in _verbs().items())])


def _verbs() -> dict[str, argparse.ArgumentParser]:
    (subparsers,) = (action for action in command_line()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(subparsers.choices)


def _section(name: str, verb: argparse.ArgumentParser) -> str:
    return f"\n## `minitron {name}`\n\n```text\n{verb.format_help()}```\n"
