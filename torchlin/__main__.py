"""`python -m torchlin` is `torchlin`."""

from torchlin.cli import main

raise SystemExit(main())
