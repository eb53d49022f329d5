"""The program built on the library: recipes, training, certification, and the command line."""

from .network import load

__all__ = ["load"]
