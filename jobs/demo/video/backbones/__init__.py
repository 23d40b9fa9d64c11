"""Random seeds in, the video demo's small audio encoder and language model out; `jobs.demo.backbones` saves them."""
