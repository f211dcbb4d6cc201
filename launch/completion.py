"""Prints the script by which a shell completes commands, flags and settings of `ijepa`.

python launch/completion.py bash > ~/.local/share/bash-completion/completions/ijepa
python launch/completion.py zsh > ~/.zfunc/_ijepa                        # a folder of fpath
python launch/completion.py fish > ~/.config/fish/completions/ijepa.fish

Reference: docs/install.md
"""

from __future__ import annotations

import sys

from ijepa_scale import terminal
from ijepa_scale.completion.answers import answer, joined
from ijepa_scale.completion.shells import SCRIPTS


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake in the arguments."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["--words"]:  # what the scripts ask: the shell, and the words up to the one to complete
        whole, done = joined(words[2:]) if words[1:2] == ["bash"] else (words[2:], "")
        print("\n".join(answer(whole).lines(done)))
        return 0
    parser = terminal.Parser(description=__doc__)
    parser.add_argument("shell", choices=list(SCRIPTS), help="the shell")
    flags = parser.parse_args(words)
    print(SCRIPTS[flags.shell], end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
