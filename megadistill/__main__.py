"""`python -m megadistill` is the `megadistill` command."""

from megadistill.cli import main

if __name__ == "__main__":
    main()
