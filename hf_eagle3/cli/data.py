"""`hf-eagle3 data`: commands that look at training data."""

from . import preview
from .arguments import Parser


def add_options(parser: Parser) -> None:
    """The commands of `hf-eagle3 data`."""
    parser.description = "Look at training data."
    lines = {"preview": "show which tokens of training rows are supervised, and the numbers of the data"}
    parser.add_commands(lines, dest="data_command")
    preview.add_options(parser.commands["preview"])
