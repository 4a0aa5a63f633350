"""`python -m gateway` is `lineside`."""

from gateway.cli.main import main

if __name__ == "__main__":
    main()
