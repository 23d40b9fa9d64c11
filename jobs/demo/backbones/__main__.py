"""`python -m jobs.demo.backbones` trains and saves the models again."""

from jobs.demo.backbones.make import main

if __name__ == "__main__":
    main()
