"""`python -m epochal`, which launchers start: the command line."""

from epochal.cli import main

if __name__ == "__main__":
    main()
