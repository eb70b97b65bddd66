"""The commands of `ferry`, by what they are about; cli.py puts them together."""
