"""Write the pages of the documentation that are made from the code.

python scripts/site/reference_pages.py
"""

from __future__ import annotations

from pathlib import Path

from api_page import api_page
from flags_page import flags_page

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {"flags.md": flags_page, "api.md": api_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
