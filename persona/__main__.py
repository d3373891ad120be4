# SPDX-License-Identifier: Apache-2.0
from persona.cli import main

raise SystemExit(main())
