"""`python -m torchprune`."""

from torchprune.cli.app import main

if __name__ == "__main__":
    main()
