"""The program built on the library: recipes, training, certification, and the command line."""
