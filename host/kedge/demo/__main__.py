"""``python -m kedge.demo [digits|ocr|chat|fleet] [--keep]``."""

from __future__ import annotations

import argparse
import sys

from kedge.demo.chat import show_chat
from kedge.demo.fleet import show_fleet
from kedge.demo.reading import show_reading
from kedge.demo.story import show_demo
from kedge_protocol.errors import KedgeError


def main() -> int:
    """Run the demo; return 1 if a step failed."""
    parser = argparse.ArgumentParser(prog="python -m kedge.demo", description="The main job of Kedge, shown.")
    parser.add_argument(
        "what",
        nargs="?",
        choices=("digits", "ocr", "chat", "fleet"),
        default="digits",
        help="digits, a photo whose text is read, a language model, or two hundred simulated devices",
    )
    parser.add_argument("--keep", action="store_true", help="leave everything running at the end")
    try:
        given = parser.parse_args()
        show = {"digits": show_demo, "ocr": show_reading, "chat": show_chat, "fleet": show_fleet}[given.what]
        show(keep=given.keep)
    except KedgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
