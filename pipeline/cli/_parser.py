"""The parser of a command's options: what does not fit is one line, as every other message for the user is."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Without the usage above each error, which hides the line that matters."""

    def error(self, message: str) -> NoReturn:
        name = self.prog.rpartition(" ")[2]
        self.exit(2, f"temper {name}: {message}; `{self.prog} --help` lists the options\n")
