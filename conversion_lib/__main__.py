"""`python -m conversion_lib` is `ferry`."""

from conversion_lib.cli.main import main

if __name__ == "__main__":
    main()
