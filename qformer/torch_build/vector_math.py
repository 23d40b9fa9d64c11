"""MKL's vector math, called once by one thread before any two of them call it together.

MKL chooses its kernels in a process's first call of any of them (sqrt, exp, tanh, ...). Where the threads of one
operation make that call together, one of them may compute its part in about 12 bits, in that call alone: of 1,000
processes 2 to 5 had relative errors of 5e-5 (tanh) to 3e-4 (sqrt), with 16,384 numbers on two threads (torch 2.13 with
oneMKL 2024.2; pytorch issue 188792). A first forward, or the first step of AdamW after a resume, then does not repeat.

Attention, the frozen encoders and the language models import this module for that call.
"""

import torch

torch.ones(1).sqrt()
