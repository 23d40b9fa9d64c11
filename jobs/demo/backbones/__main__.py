"""`python -m jobs.demo.backbones` makes the models anew."""

from jobs.demo.make_backbones import main

if __name__ == "__main__":
    main()
