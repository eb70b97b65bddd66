"""Runs `ferry` as `python -m conversion_lib`."""

from conversion_lib.cli.main import main

if __name__ == "__main__":
    main()
