"""`python -m nodeservice` is the command line."""

from nodeservice.cli import main

if __name__ == "__main__":
    main()
