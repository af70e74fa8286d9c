"""`python -m torchprune`."""

from torchprune.cli import main

if __name__ == "__main__":
    main()
