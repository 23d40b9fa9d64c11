"""`python -m jobs.demo.backbones` trains and saves the models again."""

from jobs.demo.make_backbones import main

if __name__ == "__main__":
    main()
