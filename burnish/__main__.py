"""`python -m burnish` is `burnish`; under torchrun: `torchrun --nproc-per-node 2 -m burnish sft ...`."""

import sys

from burnish.cli import main

sys.exit(main())
